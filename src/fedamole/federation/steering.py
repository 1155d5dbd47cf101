"""Training of a steered LoRA: in each step the LoRA is scaled as a few other examples of the client say.

The chain rule is written out. With A' = s A the scaled factor of a module, the step computes the gradient of A'. That
of A is s times it. The gradient of the scale of a rank is its product with A, and the encoder's follows from it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.federation.local import DivergedError, LocalTask, TrainingGroup
from fedamole.federation.preferences import PreferenceGroup
from fedamole.federation.randomness import torch_generator
from fedamole.federation.request import TrainingRequest, TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair
from fedamole.model.params import Tensors
from fedamole.model.steering import SteeredAdapter, answers_of, example_states, rank_scales


class Peekable:
    """An iterator of batches whose next ones can be read before they are taken."""

    def __init__(self, batches: Iterator[list[TokenPair]]) -> None:
        """Wrap an iterator without end."""
        self._batches, self._waiting = batches, list[list[TokenPair]]()

    def __iter__(self) -> "Peekable":
        return self

    def __next__(self) -> list[TokenPair]:
        return self._waiting.pop(0) if self._waiting else next(self._batches)

    def peek(self, count: int) -> list[TokenPair]:
        """Return the rows of the next `count` batches."""
        self._waiting += islice(self._batches, count - len(self._waiting))
        return [row for batch in self._waiting[:count] for row in batch]


class Steering(TrainingGroup):
    """The part of a group that scales the LoRAs of `SteeredAdapter`s in every step and trains their encoders.

    A step's examples are drawn from the client's training rows that are not in the step's batches. The encoder has an
    Adam of its own with the same learning rate, and its gradient is clipped for itself.
    """

    def __init__(
        self, bank: Bank, tasks: Sequence[LocalTask], settings: TrainingSettings, seed: int, round_: int, fit_index: int
    ) -> None:
        """As `TrainingGroup`; the adapters of the requests are `SteeredAdapter`s."""
        super().__init__(bank, tasks, settings, seed, round_, fit_index)
        self.steered = [adapter for adapter in self.adapters if isinstance(adapter, SteeredAdapter)]
        like, purpose = self.store.weights, f"context{self.purpose_suffix}"
        self.encoders = [
            {name: tensor.to(like).clone().requires_grad_() for name, tensor in adapter.encoder.items()}
            for adapter in self.steered
        ]
        self.encoder_optimisers = [
            torch.optim.Adam(encoder.values(), lr=task.learning_rate)
            for encoder, task in zip(self.encoders, self.tasks, strict=True)
        ]
        self.generators = [torch_generator(seed, purpose, task.client, round_) for task in self.tasks]
        self.peekable = [Peekable(batches) for batches in self.batches]
        self.batches = [*self.peekable]
        self.states: list[dict[int, Tensor]] = [{} for _ in self.tasks]
        """States (2, d) of each client's rows that were read so far, by index."""
        self.context_tokens = [0] * len(self.tasks)
        self.unscaled = self.store.weights
        self.scales: list[Tensor] = []
        """Scales (M, r) of each client in this step, as functions of its encoder."""

    @override
    def step(self, step: int) -> None:
        """Scale the LoRAs of the clients that have steps left, and take the step."""
        active = sum(step < steps for steps in self.steps)
        self.scales = [self._scales(client) for client in range(active)]
        self.unscaled = self.store.weights.clone()
        for module, adapters in enumerate(self._modules(active)):
            factors = torch.stack([scales[module] for scales in self.scales]).detach().unsqueeze(2)
            adapters.parts[0].detach().mul_(factors)
        super().step(step)

    def _modules(self, active: int) -> list[Any]:
        """Return the stacked adapters of the first clients by module, in the order of the names."""
        stacked = self.store.stacked(0, active)
        return [stacked[name] for name in sorted(stacked)]

    def _scales(self, client: int) -> Tensor:
        adapter, rows = self.steered[client], self.tasks[client].rows
        taken = {(tuple(prompt), tuple(answer)) for prompt, answer in self._next_rows(client)}
        free = [i for i, row in enumerate(rows) if (tuple(row[0]), tuple(answers_of(row)[0])) not in taken]
        generator = self.generators[client]
        count = int(torch.randint(adapter.context_examples + 1, (), generator=generator))
        chosen = [free[i] for i in torch.randperm(len(free), generator=generator).tolist()[:count]]
        known = self.states[client]
        if new := [i for i in chosen if i not in known]:
            states, tokens = example_states(self.bank, [rows[i] for i in new])
            known.update(zip(new, states, strict=True))
            self.context_tokens[client] += tokens
        context = torch.stack([known[i] for i in chosen]) if chosen else torch.empty(0, 2, self.bank.base.width)
        assert isinstance(self.spec, AdapterSpec)
        return rank_scales(self.encoders[client], context, adapter.heads, self.spec.rank)

    def _next_rows(self, client: int) -> list[TokenPair]:
        return self.peekable[client].peek(self.settings.accumulation)

    @override
    def _update(self, active: int) -> None:
        """Turn the gradients of the scaled LoRAs into those of LoRAs and encoders, and apply them."""
        scaled_gradients = [adapters.gradients[0] for adapters in self._modules(active)]
        self.store.weights.copy_(self.unscaled)
        to_scales = [
            (gradients * adapters.parts[0].detach()).sum(2)
            for gradients, adapters in zip(scaled_gradients, self._modules(active), strict=True)
        ]
        for module, gradients in enumerate(scaled_gradients):
            gradients.mul_(torch.stack([scales[module] for scales in self.scales]).detach().unsqueeze(2))
        super()._update(active)
        for client, scales in enumerate(self.scales):
            self._update_encoder(client, scales, torch.stack([gradient[client] for gradient in to_scales]))

    def _update_encoder(self, client: int, scales: Tensor, gradient: Tensor) -> None:
        if not scales.requires_grad:  # a step without examples
            return
        parameters = list(self.encoders[client].values())
        gradients = torch.autograd.grad(scales, parameters, gradient)
        for parameter, value in zip(parameters, gradients, strict=True):
            parameter.grad = value
        if self.settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm)
        self.encoder_optimisers[client].step()

    @override
    def results(self) -> list[TrainingResult | DivergedError]:
        """Return the result of each client; the examples that steered it count as read by a teacher."""
        return [
            result if isinstance(result, DivergedError) else self._with_encoder(client, result)
            for client, result in enumerate(super().results())
        ]

    def _with_encoder(self, client: int, result: TrainingResult) -> TrainingResult:
        encoder: Tensors = {name: tensor.detach().cpu() for name, tensor in self.encoders[client].items()}
        return replace(
            result,
            adapter=replace(self.steered[client], tensors=result.adapter.tensors, encoder=encoder),
            teacher_examples=result.teacher_examples + len(self.states[client]),
            teacher_tokens=result.teacher_tokens + self.context_tokens[client],
        )


class SteeredGroup(Steering):
    """A group of steered LoRAs that are trained on answers."""


class SteeredPreferenceGroup(Steering, PreferenceGroup):
    """A group of steered LoRAs that are trained on preference pairs."""


@dataclass(frozen=True)
class SteeredRequest(TrainingRequest):
    """A request to train a `SteeredAdapter`."""

    group_classes: ClassVar[Mapping[Any, Any]] = {None: SteeredGroup, PreferenceGroup: SteeredPreferenceGroup}
