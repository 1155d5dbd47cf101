"""FedAMoLE: personalised federated fine-tuning of large language models.

Importing this package registers the AMoLE adapter type with PEFT, as soon as PEFT is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from fedamole.api.catalogue import list_methods, register_method
    from fedamole.api.results import ComparisonResult, Report, Run
    from fedamole.api.running import compare, resume, run
    from fedamole.federation.progress import ProgressListener as Callback
    from fedamole.personal.saved_models import load_personal_model

__version__ = "0.1.0"
__all__ = [
    "Callback",
    "ComparisonResult",
    "Report",
    "Run",
    "compare",
    "list_methods",
    "load_personal_model",
    "register_method",
    "resume",
    "run",
]

_HOMES = {
    "Callback": ("federation.progress", "ProgressListener"),
    "ComparisonResult": ("api.results", "ComparisonResult"),
    "Report": ("api.results", "Report"),
    "Run": ("api.results", "Run"),
    "compare": ("api.running", "compare"),
    "list_methods": ("api.catalogue", "list_methods"),
    "load_personal_model": ("personal.saved_models", "load_personal_model"),
    "register_method": ("api.catalogue", "register_method"),
    "resume": ("api.running", "resume"),
    "run": ("api.running", "run"),
}
"""Module and name of each public name. They are imported at first use, because importing PyTorch takes seconds."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, attribute = _HOMES[name]
        return getattr(import_module(f"fedamole.{module}"), attribute)
    raise AttributeError(f"module 'fedamole' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


@wrapt.when_imported("peft")
def _register(_: Any) -> None:
    # Imported lazily, because importing PEFT and torch takes seconds. The module registers the adapter type at its end;
    # it may be the one that imports PEFT, so nothing of it can be used here.
    import fedamole.model.peft_tuner  # noqa: F401
