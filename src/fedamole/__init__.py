"""FedAMoLE: personalised federated fine-tuning of large language models.

Importing this package teaches PEFT the AMoLE adapter type, as soon as PEFT itself is imported.
"""

from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from fedamole.personal.saved_models import load_personal_model

__version__ = "0.1.0"
__all__ = ["load_personal_model"]


def __getattr__(name: str) -> Any:
    # Deferred, as importing this package must not wait seconds for torch.
    if name in __all__:
        from fedamole.personal import saved_models as models

        return getattr(models, name)
    raise AttributeError(f"module 'fedamole' has no attribute {name!r}")


@wrapt.when_imported("peft")
def _register(_: Any) -> None:
    # Deferred so that `fedamole --help` does not wait seconds for PEFT and torch.
    from fedamole.model.peft_tuner import register

    register()
