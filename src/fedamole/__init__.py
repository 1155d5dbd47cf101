"""FedAMoLE: personalised federated fine-tuning of large language models.

Importing this package registers the AMoLE adapter type with PEFT, as soon as PEFT is imported.
"""

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from fedamole.personal.saved_models import load_personal_model

__version__ = "0.1.0"
__all__ = ["load_personal_model"]


def __getattr__(name: str) -> Any:
    # Imported lazily, because importing torch takes seconds.
    if name in __all__:
        from fedamole.personal import saved_models

        return getattr(saved_models, name)
    raise AttributeError(f"module 'fedamole' has no attribute {name!r}")


@wrapt.when_imported("peft")
def _register(_: Any) -> None:
    # Imported lazily, because importing PEFT and torch takes seconds. The module registers the adapter type at its end;
    # it may be the one that imports PEFT, so nothing of it can be used here.
    import fedamole.model.peft_tuner  # noqa: F401
