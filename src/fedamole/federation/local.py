"""The training loop, `fit`, which all methods share.

It trains a group of clients in lock-step on one resident base: one forward and one backward pass of a step work on the
batches of all clients, each client's examples under its own adapter. A single client is a group of one.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor
from typing_extensions import TypeVar

from fedamole.errors import FedamoleError
from fedamole.federation.distillation import Followed, FollowedModels
from fedamole.federation.passes import in_passes
from fedamole.federation.penalties import LossFunction, ParameterLayout, Penalty
from fedamole.federation.privacy.mechanism import Mechanism
from fedamole.federation.probe import count_tokens
from fedamole.federation.randomness import derived_seed, torch_generator
from fedamole.federation.request import TrainingRequest, TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.federation.soft_labels import SoftTargets
from fedamole.federation.synthesis_request import Request
from fedamole.model.bank import Bank
from fedamole.model.batch import Batch, TokenPair, batches, collate, token_losses
from fedamole.model.forward_context import ForwardContext
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.mixer import InstanceWeights
from fedamole.model.segments import segment_sum

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all)."""

NAN_EVERY = 16
"""Steps between two checks for NaN; each waits for the device."""


class DivergedError(FedamoleError):
    """The loss or the adapter became NaN or infinite in local training."""


Q = TypeVar("Q", bound=Request, default=TrainingRequest)


@dataclass(frozen=True)
class LocalTask(Generic[Q]):
    """One training of one client, or one optimisation of its synthetic examples."""

    client: str
    fit: Q
    rows: Sequence[TokenPair]
    """Training examples."""
    learning_rate: float
    """Learning rate of Adam in this round."""
    done: float = 0.0
    """Fraction of the round's steps that the client has taken before."""
    mechanism: Mechanism | None = None
    """How the training is noised (`[privacy]`)."""

    def steps(self, settings: TrainingSettings) -> int:
        """Return the optimiser steps of this training, at least 1; of a pair, those of each of the two.

        The steps of a round's trainings add up to those of the round, whatever the rounding; a pair may take one less.
        """
        steps, trainings = settings.steps(len(self.rows)), self.fit.trainings
        fraction = sum(training.fraction_for(settings.budget) for training in trainings)
        return max(1, (round((self.done + fraction) * steps) - round(self.done * steps)) // len(trainings))


def fit(
    bank: Bank,
    tasks: Sequence[LocalTask],
    settings: TrainingSettings,
    *,
    seed: int,
    round_: int,
    fit_index: int = 0,
    on_step: OnStep | None = None,
    group_class: "type[TrainingGroup] | None" = None,
) -> list[TrainingResult | DivergedError]:
    """Train a group of clients and return one result per task, in the order of the tasks.

    The requests must be of one kind. A client's loss is the mean over its batch's answer tokens, mixed with the
    divergence from its teacher or partner if it has one, plus balance_weight times the sum of the modules' balance
    losses, plus the penalty of its request. The optimiser is Adam with a new state. `fit_index` tells the trainings of
    a round apart. `group_class` is a subclass of `TrainingGroup` with another loss.

    Batch order and dropout depend on (seed, client, round, fit_index) alone, so that the composition of a group changes
    results only by the rounding of floating-point sums. A client that has taken all its steps leaves the group. One
    that diverges yields a DivergedError and does not affect the others.
    """
    order = sorted(range(len(tasks)), key=lambda i: -tasks[i].steps(settings))
    group = (tasks[0].fit.group_classes.get(group_class) or group_class or TrainingGroup)(
        bank, [tasks[i] for i in order], settings, seed, round_, fit_index
    )
    bank.base.training(True)
    try:
        for step in range(group.steps[0]):
            group.step(step)
            if on_step is not None:
                on_step(step + 1, group.steps[0])
            if (step + 1) % NAN_EVERY == 0 and len(group.check(step)) == len(group.tasks):
                break
    finally:
        bank.base.training(False)
    results = group.results()
    return [results[order.index(i)] for i in range(len(tasks))]


class TrainingGroup:
    """Clients in lock-step, those with the most steps first, so that the first ones are those still training.

    A client has one place in the bank, or two places in a row if its adapter is trained with a partner. Below, a task
    belongs to one place, and only `step` cuts the group, between clients.
    """

    losses_of_pairs: Callable[[Tensor, Batch], Tensor] | None = None
    """Computes the losses (C) from logits and batch, if they are not those of answers (`preferences.py`)."""

    def __init__(
        self, bank: Bank, tasks: Sequence[LocalTask], settings: TrainingSettings, seed: int, round_: int, fit_index: int
    ) -> None:
        """Load the adapters of the clients' tasks into the bank and prepare optimiser, batches, penalties and masks.

        Raises ValueError for requests of different kinds.
        """
        if len({task.fit.kind() for task in tasks}) > 1:
            raise ValueError("trainings of different kinds cannot be one group")
        self.steps = [task.steps(settings) for task in tasks for _ in task.fit.trainings]
        self.places = len(tasks[0].fit.trainings)
        """Places of a client in the bank."""
        tasks = [replace(task, fit=training) for task in tasks for training in task.fit.trainings]
        self.bank, self.tasks, self.settings, self.seed, self.round = bank, tasks, settings, seed, round_
        self.purpose_suffix = f"/{fit_index}" if fit_index else ""
        self.adapters = [
            task.fit.adapter if task.fit.extra is None else task.fit.extra.read_by(task.fit.adapter) for task in tasks
        ]
        bank.load(self.adapters)
        self.store, self.spec, self.parameters = bank.store, self.adapters[0].spec, bank.trainable()
        requests = [task.fit for task in tasks]
        self.trainable = self._trainable_mask() if any(request.adapter.frozen for request in requests) else None
        self.penalties = self._penalty_losses() if any(request.penalty for request in requests) else []
        self.decay = self._decay_factors() if any(request.weight_decay for request in requests) else None
        self.expert_weights = self._expert_weights() if any(request.expert_weights for request in requests) else None
        soft = requests[0].extra is not None and requests[0].extra.soft is not None
        self.followed = self._followed() if self.places > 1 or requests[0].teacher is not None or soft else None
        self.optimiser = self._new_optimiser()
        self.batches = [
            _batches(
                rows, settings.batch_size, torch_generator(seed, f"order{self.purpose_suffix}", task.client, round_)
            )
            for task, rows in zip(
                tasks,
                bank.prefixed([task.rows if task.fit.extra is None else all_rows(task) for task in tasks]),
                strict=True,
            )
        ]
        self.tokens, self.diverged = [0] * len(tasks), dict[int, DivergedError]()
        self.loss_sums = torch.zeros(len(tasks), dtype=torch.float64, device=bank.base.device)

    def step(self, step: int) -> None:
        """Take one optimiser step for every client that has steps left."""
        accumulation = self.settings.accumulation
        active = sum(step < steps for steps in self.steps)
        micro_batches = [[next(self.batches[client]) for client in range(active)] for _ in range(accumulation)]
        self.store.gradients.zero_()

        def forward_backward(first: int, last: int) -> None:
            for index, rows in enumerate(micro_batches):
                self._add_gradients(rows[first:last], first, last, f"{step}/{index}", accumulation)

        losses_before = self.loss_sums.clone()

        def undo(first: int, last: int) -> None:
            self.store.gradients[first:last].zero_()
            self.loss_sums[first:last] = losses_before[first:last]

        sizes = [count_tokens(rows) for rows in micro_batches[0]]
        in_passes(self.bank, sizes, forward_backward, undo, together=self.places)
        self._add_penalty_gradients()
        self._update(active)
        for rows_of_clients in micro_batches:
            for client, rows in enumerate(rows_of_clients):
                self.tokens[client] += count_tokens(rows)

    def _add_gradients(self, rows: list[list[TokenPair]], first: int, last: int, part: str, parts: int) -> None:
        """Run one pass of the clients `first` to `last` - 1 over their `rows` and add its gradients, over `parts`."""
        bank, weight = self.bank, self.spec.balance_weight
        batch = self._collate(rows, first, part)
        targets = self.followed.targets(batch, first, last) if self.followed else None
        balance_losses: list[Tensor] = []
        bank.select_clients(first, last)
        weights = None if self.expert_weights is None else self.expert_weights[first + batch.segments.owner]
        context = ForwardContext(balance_losses=balance_losses if weight else None, expert_weights=weights)
        with bank.forward(batch, context) as logits:
            losses = (
                segment_sum(token_losses(logits, batch.labels), batch.answers) / batch.answers.counts
                if self.losses_of_pairs is None
                else self.losses_of_pairs(logits, batch)
            )
            balance = weight * torch.stack(balance_losses).sum(0) if balance_losses else 0.0
            self.loss_sums[first:last] += losses.detach().double()
            if self.followed is not None:
                losses = self.followed.losses(losses, logits, targets, batch.answers, first, last)
            bank.backward((losses + balance).sum() / parts)

    def _add_penalty_gradients(self) -> None:
        for clients, loss in self.penalties:
            parameters = self.store.weights.index_select(0, clients).requires_grad_()
            (gradients,) = torch.autograd.grad(loss(parameters).sum(), parameters)
            self.store.gradients.index_add_(0, clients, gradients)

    def _update(self, active: int) -> None:
        """Mask, clip and apply the gradients of the first `active` clients."""
        for parameters in self.parameters[active:]:
            parameters.grad = None  # with a gradient of zero, Adam would still move them by its momentum
        gradients = self.store.gradients
        if self.trainable is not None:
            gradients.mul_(self.trainable)
        if self.settings.clip_norm:
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            gradients.mul_((self.settings.clip_norm / (norms + 1e-6)).clamp(max=1.0))
        if self.decay is not None:
            self.store.weights[:active].mul_(self.decay[:active])
        self.optimiser.step()

    def _collate(self, rows: list[list[TokenPair]], first: int, part: str) -> Batch:
        """Make one batch of the examples of the clients from `first` on, with their dropout seeds."""
        seeds = None
        if self.spec.dropout:
            seeds = [
                derived_seed(self.seed, self._dropout_purpose(part, i), self.tasks[i].client, self.round)
                for i in range(first, first + len(rows))
            ]
        return collate(rows, self.bank.base.pad_id, self.bank.packs, seeds, self.bank.base.device)

    def _dropout_purpose(self, part: str, client: int) -> str:
        """Return what the seed of a client's dropout in one pass is derived from."""
        return f"dropout{self.purpose_suffix}/{part}"

    def _new_optimiser(self) -> torch.optim.Adam:
        """Adam with one parameter per client, and a parameter group per learning rate."""
        groups: dict[float, list[Tensor]] = {}
        for parameters, task in zip(self.parameters, self.tasks, strict=True):
            groups.setdefault(task.learning_rate, []).append(parameters)
        return torch.optim.Adam([{"params": groups[rate], "lr": rate} for rate in sorted(groups)], fused=True)

    def _trainable_mask(self) -> Tensor:
        """1 for parameters that train, 0 for frozen ones, (C, P)."""
        masks = [
            {name: torch.full_like(tensor, name not in adapter.frozen) for name, tensor in adapter.tensors.items()}
            for adapter in self.adapters
        ]
        return torch.stack([self.store.row(i, mask) for i, mask in enumerate(masks)]).to(self.store.weights)

    def _expert_weights(self) -> Tensor:
        """Weights (C, 2) of the two experts in training, by default those of the router."""
        weights, router = [task.fit.expert_weights for task in self.tasks], getattr(self.spec, "router", None)
        if not isinstance(router, InstanceWeights):
            raise ValueError("only experts with instance weights can be given weights for a training")
        default = (router.max_weight, 1 - router.max_weight)
        rows = torch.tensor([default if pair is None else pair for pair in weights], dtype=torch.float64)
        return rows.to(self.store.weights)

    def _followed(self) -> Followed:
        """Load what the adapters follow: soft labels of their extra rows, a teacher each, or each other in pairs."""
        requests = [task.fit for task in self.tasks]
        distillations = [request.distillation for request in requests if request.distillation is not None]
        extras = [request.extra for request in requests if request.extra is not None]
        if any(extra.soft is not None for extra in extras):
            return SoftTargets(extras, distillations, self.bank.base.device)
        teachers = [request.teacher for request in requests if request.teacher is not None]
        if teachers and extras:
            teachers = [extra.read_by(teacher) for extra, teacher in zip(extras, teachers, strict=True)]
        return FollowedModels(self.bank, distillations, teachers)

    def _penalty_losses(self) -> list[tuple[Tensor, LossFunction]]:
        """For each class of penalties the indices of its clients, and the function that computes their terms."""
        by_class: dict[type[Penalty], dict[int, Penalty]] = {}
        for i, task in enumerate(self.tasks):
            if task.fit.penalty is not None:
                by_class.setdefault(type(task.fit.penalty), {})[i] = task.fit.penalty
        losses = []
        for penalty_class, penalties in by_class.items():
            layout = ParameterLayout(self.bank, self.adapters, [*penalties])
            clients = torch.tensor([*penalties], device=self.bank.base.device)
            losses.append((clients, penalty_class.loss([*penalties.values()], layout)))
        return losses

    def _decay_factors(self) -> Tensor:
        """Factors of the parameters in a step with decoupled weight decay, (C, 1) or (C, P)."""
        loss = torch.tensor([[task.learning_rate * task.fit.weight_decay] for task in self.tasks], dtype=torch.float64)
        loss = loss.to(self.store.weights)
        return 1 - (loss if self.trainable is None else loss * self.trainable)

    def check(self, step: int) -> dict[int, DivergedError]:
        """Return the clients that have diverged by now.

        They stay in the group, so that the sums of the others keep their order.
        """
        losses, finite = self.loss_sums.tolist(), self.store.weights.isfinite().all(1).tolist()
        for client, (loss, all_finite) in enumerate(zip(losses, finite, strict=True)):
            if client not in self.diverged and not (math.isfinite(loss) and all_finite):
                last = min(step + 1, self.steps[client])
                first = (last - 1) // NAN_EVERY * NAN_EVERY + 1
                what = "its adapter is no longer finite" if math.isfinite(loss) else f"its loss became {loss}"
                self.diverged[client] = DivergedError(
                    f"client {self.tasks[client].client}, round {self.round}: {what} within steps {first} to {last} of "
                    "local training; lower training.learning_rate or set training.clip_norm"
                )
        return self.diverged

    def results(self) -> list[TrainingResult | DivergedError]:
        """Return the result of each client; of a pair in which one diverged, the error of that one."""
        self.check(self.steps[0] - 1)
        results: list[TrainingResult | DivergedError] = []
        for place, (steps, loss_sum) in enumerate(zip(self.steps, self.loss_sums.tolist(), strict=True)):
            batches_read, tokens = steps * self.settings.accumulation, self.tokens[place]
            trained = TrainingResult(self.store.adapter(place), steps, loss_sum / batches_read, tokens=tokens)
            if self.tasks[place].fit.teacher is not None:
                examples = batches_read * self.settings.batch_size
                trained = replace(trained, teacher_examples=examples, teacher_tokens=tokens)
            results.append(self.diverged.get(place, trained))
        return results if self.places == 1 else [*map(_pair, results[::2], results[1::2])]


def all_rows(task: LocalTask) -> list[TokenPair]:
    """Return the rows that a training with extra rows reads."""
    assert task.fit.extra is not None
    return [*(task.rows if task.fit.own_rows else ()), *task.fit.extra.rows]


def _pair(
    first: TrainingResult | DivergedError, second: TrainingResult | DivergedError
) -> TrainingResult | DivergedError:
    """Return one result for two partners: the error of the one that diverged, if any."""
    if isinstance(first, DivergedError):
        return first
    return second if isinstance(second, DivergedError) else replace(first, partner=second)


def embed(bank: Bank, clients: Sequence[Sequence[TokenPair]], batch_tokens: int) -> list[dict[str, MeanEmbeddings]]:
    """Return the mean router embeddings, by module, of each loaded adapter over all tokens of its client's examples.

    At most `batch_tokens` tokens are read at once.
    """
    sums: dict[str, Tensor] = {}
    bank.select_clients(0, bank.clients)
    with torch.no_grad():
        for batch in batches(clients, bank.base.pad_id, bank.packs, batch_tokens, bank.base.device):
            with bank.forward(batch, ForwardContext(embedding_sums=sums)):
                pass
    return bank.mean_embeddings(sums, [count_tokens(rows) for rows in clients])


def _batches(rows: Sequence[TokenPair], size: int, generator: torch.Generator) -> Iterator[list[TokenPair]]:
    """Yield batches without end: every example once per epoch in a new order, epochs joined without a short batch."""
    batch: list[TokenPair] = []
    while True:
        for i in torch.randperm(len(rows), generator=generator).tolist():
            batch.append(rows[i])
            if len(batch) == size:
                yield batch
                batch = []
