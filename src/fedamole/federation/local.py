"""fit(): the only training loop. It belongs to nobody: no method copies or overrides it.

It trains a group of clients in lock-step on one resident base: in each step one forward and one backward pass work on
the batches of all of them, each client's rows under its own adapter. One client is a group of one.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedamole.errors import FedamoleError
from fedamole.federation.looks import count_tokens
from fedamole.federation.method import TrainingRequest, TrainingResult
from fedamole.federation.randomness import derived_seed, torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair, batches, collate, token_losses
from fedamole.model.layers import EmbeddingSum, MeanEmbeddings
from fedamole.model.memory import out_of_memory, release_memory
from fedamole.model.segments import segment_sum

log = logging.getLogger(__name__)

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps to do)."""

NAN_EVERY = 16
"""Steps between two looks at the losses; each look waits for the device."""
TOKENS_AT_ONCE = 2048
"""Tokens of a forward pass on a CPU beyond which more clients at once no longer gain (docs/performance.md)."""


class DivergedError(FedamoleError):
    """The loss became NaN or infinite in local training."""


@dataclass(frozen=True)
class LocalTask:
    """One client's local training: what it starts from and what it learns from."""

    client: str
    fit: TrainingRequest
    rows: Sequence[TokenPair]
    learning_rate: float
    """Adam's learning rate in this round."""
    done: float = 0.0
    """Share of the round's steps that earlier pieces of training took, under the budget in force."""

    def steps(self, settings: TrainingSettings) -> int:
        """Optimiser steps of this piece of training, at least 1: those of a round's pieces add up to the round's."""
        steps, share = settings.steps(len(self.rows)), self.fit.share_in(settings.budget)
        return max(1, round((self.done + share) * steps) - round(self.done * steps))


def fit(
    bank: Bank,
    tasks: Sequence[LocalTask],
    settings: TrainingSettings,
    *,
    seed: int,
    round_: int,
    turn: int = 0,
    on_step: OnStep | None = None,
) -> list[TrainingResult | DivergedError]:
    """Train a group of clients for one round (step 2 of a round); return what each became, in the order given.

    Adapters must be of one kind. Adam starts anew each time. A client's loss is the mean over its batch's answer
    tokens plus balance_weight times the sum of the modules' balance losses, and the penalties of its request.
    The `turn` tells several trainings of a round apart. Order and dropout come from (seed, client,
    round) alone, so a group changes no result beyond the order of floating-point sums. A client that has taken all its
    steps leaves; one whose training diverges changes no bit of the others and ends as a DivergedError that names
    client, round and step.
    """
    order = sorted(range(len(tasks)), key=lambda i: -tasks[i].steps(settings))
    group = _Group(bank, [tasks[i] for i in order], settings, seed, round_, turn)
    bank.base.training(True)
    try:
        for step in range(group.steps[0]):
            group.step(step)
            if on_step is not None:
                on_step(step + 1, group.steps[0])
            if (step + 1) % NAN_EVERY == 0 and len(group.check(step)) == len(tasks):
                break
    finally:
        bank.base.training(False)
    results = group.results()
    return [results[order.index(i)] for i in range(len(tasks))]


class _Group:
    """Clients in lock-step, those with the most steps first: the ones still at work are always the first few."""

    def __init__(
        self, bank: Bank, tasks: Sequence[LocalTask], settings: TrainingSettings, seed: int, round_: int, turn: int
    ) -> None:
        self.bank, self.tasks, self.settings, self.seed, self.round = bank, tasks, settings, seed, round_
        self.turn = f"/{turn}" if turn else ""
        self.steps = [task.steps(settings) for task in tasks]
        bank.load([task.fit.adapter for task in tasks])
        self.flat = bank.trainable()
        self.learning = self._learning()
        self.anchors = self._anchors()
        self.decay = self._decay()
        rates = sorted({task.learning_rate for task in tasks})
        self.optimiser = torch.optim.Adam(
            [
                {
                    "params": [row for row, task in zip(self.flat, tasks, strict=True) if task.learning_rate == rate],
                    "lr": rate,
                }
                for rate in rates
            ],
            fused=True,
        )
        self.batches = [
            _batches(rows, settings, torch_generator(seed, f"order{self.turn}", task.client, round_))
            for task, rows in zip(tasks, bank.prefixed([task.rows for task in tasks]), strict=True)
        ]
        self.tokens = [0] * len(tasks)
        self.loss = torch.zeros(len(tasks), dtype=torch.float64, device=bank.base.device)
        self.diverged: dict[int, DivergedError] = {}

    def _learning(self) -> Tensor | None:
        """1 for the numbers of each client's row that train, 0 for those that do not, (C, P); None where all do."""
        if not any(task.fit.adapter.frozen for task in self.tasks):
            return None
        rows = [
            {
                name: torch.full_like(tensor, name not in task.fit.adapter.frozen)
                for name, tensor in task.fit.adapter.tensors.items()
            }
            for task in self.tasks
        ]
        return torch.stack([self.bank.row(place, row) for place, row in enumerate(rows)]).to(self.bank.weights)

    def _anchors(self) -> tuple[Tensor, Tensor] | None:
        """Centres and weights of the proximal terms, (C, P) each, 0 for what has none; None where nobody has any."""
        if not any(task.fit.anchor for task in self.tasks):
            return None
        centres, weights = [], []
        for place, asked in enumerate(task.fit for task in self.tasks):
            tensors = asked.adapter.tensors
            pull = {name: asked.anchor_weight if name in asked.anchor else 0.0 for name in tensors}
            centres.append(self.bank.row(place, {**tensors, **asked.anchor}))
            weights.append(
                self.bank.row(
                    place, {name: torch.full_like(t, pull[name], dtype=torch.float64) for name, t in tensors.items()}
                )
            )
        return torch.stack(centres).to(self.bank.weights), torch.stack(weights).to(self.bank.weights)

    def _decay(self) -> Tensor | None:
        """What a step leaves of each number by decoupled weight decay, (C, 1) or (C, P); None where nothing decays."""
        lost = torch.tensor([[task.learning_rate * task.fit.weight_decay] for task in self.tasks], dtype=torch.float64)
        if not lost.any():
            return None
        lost = lost.to(self.bank.weights)
        return 1 - (lost if self.learning is None else lost * self.learning)

    def step(self, step: int) -> None:
        """Take one optimiser step for every client that is still at work."""
        active = sum(step < steps for steps in self.steps)
        for row in self.flat[active:]:
            row.grad = None  # Adam would move even a zero gradient on by its momentum
        self.bank.gradients.zero_()
        parts = [[next(self.batches[place]) for place in range(active)] for _ in range(self.settings.accumulation)]
        for part in parts:
            for place, rows in enumerate(part):
                self.tokens[place] += count_tokens(rows)
        self._backward(step, parts, 0, active)
        if self.anchors is not None:
            centres, weights = self.anchors
            self.bank.gradients.add_((self.bank.weights - centres) * weights)
        if self.learning is not None:
            self.bank.gradients.mul_(self.learning)
        if self.settings.clip_norm:
            norms = torch.linalg.vector_norm(self.bank.gradients, dim=1, keepdim=True)
            self.bank.gradients.mul_((self.settings.clip_norm / (norms + 1e-6)).clamp(max=1.0))
        if self.decay is not None:
            self.bank.weights[:active].mul_(self.decay[:active])
        self.optimiser.step()

    def _backward(self, step: int, parts: list[list[list[TokenPair]]], first: int, last: int) -> None:
        """Add the gradients of the clients `first` .. `last` - 1, in as many passes as device and speed ask for."""
        for begin, end in self._windows(parts[0], first, last):
            before = self.loss[begin:end].clone()
            try:
                for part, rows in enumerate(parts):
                    self._pass(step, part, rows, begin, end)
                continue
            except RuntimeError as error:
                if end - begin == 1 or not out_of_memory(error):
                    raise
            # Outside the handler, where the error no longer holds on to the pass that failed.
            release_memory(self.bank.base.device)
            self.bank.at_once = (end - begin + 1) // 2
            log.warning("out of memory with %d clients in a pass, going on with %d", end - begin, self.bank.at_once)
            self.bank.gradients[begin:end].zero_()
            self.loss[begin:end] = before
            self._backward(step, parts, begin, end)

    def _windows(self, rows: list[list[TokenPair]], first: int, last: int) -> Iterator[tuple[int, int]]:
        """Cut the clients at work into runs that are worth one pass together."""
        most = TOKENS_AT_ONCE if self.bank.base.device.type == "cpu" else None
        begin, tokens = first, 0
        for place in range(first, last):
            more = count_tokens(rows[place])
            full = most is not None and tokens + more > most
            if place > begin and (full or place - begin >= self.bank.at_once):
                yield begin, place
                begin, tokens = place, 0
            tokens += more
        yield begin, last

    def _pass(self, step: int, part: int, rows: list[list[TokenPair]], begin: int, end: int) -> None:
        """One forward and backward pass of some clients."""
        bank, names = self.bank, [task.client for task in self.tasks[begin:end]]
        first, seeds = self.tasks[begin].fit, None
        spec = first.adapter.spec
        if spec.dropout:
            seeds = [derived_seed(self.seed, f"dropout{self.turn}/{step}/{part}", name, self.round) for name in names]
        batch = collate(rows[begin:end], bank.base.pad_id, bank.packs, seeds).to(bank.base.device)
        balance: list[Tensor] | None = [] if spec.balance_weight else None
        bank.select_clients(begin, end)
        with bank.forward(batch, balance_losses=balance) as logits:
            losses = segment_sum(token_losses(logits, batch.labels), batch.answers) / batch.answers.counts
            total = losses + spec.balance_weight * torch.stack(balance).sum(0) if balance else losses
            if first.tail_weight:
                total = total + first.tail_weight * bank.tail_norms(first.tail)
            bank.backward(total.sum() / self.settings.accumulation)
        self.loss[begin:end] += losses.detach().double()

    def check(self, step: int) -> dict[int, DivergedError]:
        """Look which clients have diverged; they stay in the group, so that the others' sums keep their order."""
        losses, finite = self.loss.tolist(), self.bank.weights.isfinite().all(1).tolist()
        for place, (loss, whole) in enumerate(zip(losses, finite, strict=True)):
            if place not in self.diverged and not (math.isfinite(loss) and whole):
                last = min(step + 1, self.steps[place])
                first = (last - 1) // NAN_EVERY * NAN_EVERY + 1
                what = "its adapter is no longer finite" if math.isfinite(loss) else f"its loss became {loss}"
                self.diverged[place] = DivergedError(
                    f"client {self.tasks[place].client}, round {self.round}: {what} within steps {first} to {last} of "
                    "local training; lower training.learning_rate or set training.clip_norm"
                )
        return self.diverged

    def results(self) -> list[TrainingResult | DivergedError]:
        """What became of each client."""
        self.check(self.steps[0] - 1)
        means = self.loss.tolist()
        return [
            self.diverged.get(place)
            or TrainingResult(
                self.bank.adapter(place),
                steps,
                means[place] / (steps * self.settings.accumulation),
                tokens=self.tokens[place],
            )
            for place, steps in enumerate(self.steps)
        ]


def embed(bank: Bank, clients: Sequence[Sequence[TokenPair]], most_tokens: int) -> list[dict[str, MeanEmbeddings]]:
    """Mean router embeddings of the loaded adapters over all tokens of each client's rows (step 3 of a round).

    At most `most_tokens` tokens are read at a time.
    """
    tokens = [count_tokens(rows) for rows in clients]
    found: dict[str, EmbeddingSum] = {}
    bank.select_clients(0, bank.clients)
    with torch.no_grad():
        for batch in batches(clients, bank.base.pad_id, bank.packs, most_tokens):
            with bank.forward(batch.to(bank.base.device), embedding_sums=found):
                pass
    return bank.mean_embeddings(found, tokens)


def _batches(
    rows: Sequence[TokenPair], settings: TrainingSettings, generator: torch.Generator
) -> Iterator[list[TokenPair]]:
    """Endless batches: every row once per pass, a new order each pass, passes joined without a short batch."""

    def order() -> Iterator[int]:
        while True:
            yield from torch.randperm(len(rows), generator=generator).tolist()

    indices = order()
    while True:
        yield [rows[next(indices)] for _ in range(settings.batch_size)]
