"""FedAMoLE: personalised federated fine-tuning of large language models.

Importing this package teaches PEFT the AMoLE adapter type, as soon as PEFT itself is imported.
"""

from typing import Any

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("peft")
def _register(_: Any) -> None:
    # Deferred so that `fedamole --help` does not wait seconds for PEFT and torch.
    from fedamole.model.peft_tuner import register

    register()
