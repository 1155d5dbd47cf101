"""LoRAs that were trained apart on clients of the bundled task, from the same start."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedamole.cli.options import bundled_config
from fedamole.config import load_config
from fedamole.evaluation.likelihood import mean_losses
from fedamole.experiment import Prepared, prepare
from fedamole.federation.local import LocalTask, fit
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.probe import ClientProbe, ProbeCounts
from fedamole.federation.randomness import torch_generator
from fedamole.merging.adapters import adapter_of, lora_factors
from fedamole.merging.low_rank import LoraFactors
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter, new_shared

RANK = 8


@dataclass(frozen=True)
class Zoo:
    """The clients' data, the base, and a LoRA of each client."""

    prepared: Prepared
    bank: Bank
    loras: Mapping[str, LoraFactors]

    @staticmethod
    def train(names: tuple[str, ...], steps: int) -> "Zoo":
        """Train a LoRA of rank 8 on each client's data."""
        config = load_config(
            bundled_config("fedit"), [f"training.local_steps={steps}", "training.learning_rate=3e-3", "run.device=cpu"]
        )
        prepared = prepare(config)
        bank, spec, shapes = Bank(prepared.base), AdapterSpec(RANK, float(RANK)), prepared.base.shapes
        start, loras = Adapter(spec, new_shared(shapes, RANK, torch_generator(0, "lora"))), dict[str, LoraFactors]()
        for name in names:
            rows, training = prepared.clients[name].train.pairs(), config.training
            task = LocalTask(name, TrainingRequest(start), rows, training.learning_rate)
            (result,) = fit(bank, [task], training, seed=0, round_=0)
            assert isinstance(result, TrainingResult)
            loras[name] = lora_factors(result.adapter.tensors)
        return Zoo(prepared, bank, loras)

    def only(self, *names: str) -> "Zoo":
        """The zoo of some of the clients."""
        return replace(self, loras={name: self.loras[name] for name in names})

    def probe(self, name: str) -> ClientProbe:
        """The probe of a client."""
        return ClientProbe(self.bank, self.prepared.clients[name].embedding.rows, name, 0, 4096, ProbeCounts())

    def losses(self, lora: LoraFactors | None, split: str = "validation") -> dict[str, float]:
        """Loss of a LoRA, or of the untuned base, at each client."""
        self.bank.load([] if lora is None else [adapter_of(lora)])
        return {
            name: mean_losses(self.bank, [getattr(self.prepared.clients[name], split).pairs()], 4096)[0]
            for name in self.loras
        }

    def mean_loss(self, lora: LoraFactors | None) -> float:
        """Mean validation loss over the clients."""
        return sum(self.losses(lora).values()) / len(self.loras)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Moments of each client's inputs under its own LoRA, by client and module."""
        result = {}
        for name, lora in self.loras.items():
            moments = self.probe(name).moments(adapter_of(lora), 64)
            result[name] = {module: it.mean for module, it in moments.items()}
        return result
