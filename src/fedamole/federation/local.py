"""fit(): the only training loop. It belongs to nobody: no method copies or overrides it."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fedamole.errors import FedamoleError
from fedamole.federation.method import Trained
from fedamole.federation.randomness import derived_seed, torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank, MeanEmbeddings
from fedamole.model.batch import Batch, Ids, answer_losses, collate
from fedamole.model.params import Adapter

Row = tuple[Ids, Ids]
"""Token ids of a prompt and of its answer."""
OnStep = Callable[[int, int], None]
"""Called with (steps done, steps to do)."""

NAN_EVERY = 16
"""Steps between two looks at the losses; each look waits for the device."""


class DivergedError(FedamoleError):
    """The loss became NaN or infinite in local training."""


def fit(
    bank: Bank,
    adapter: Adapter,
    rows: Sequence[Row],
    settings: TrainingSettings,
    *,
    seed: int,
    client: str,
    round_: int,
    on_step: OnStep | None = None,
) -> Trained:
    """Train an adapter on a client's rows for one round and return it (steps 2 of a round).

    Adam starts anew each round at learning_rate * lr_decay^round. The loss is the mean over a batch's answer tokens
    plus balance_weight times the sum of the modules' balance losses. Order and dropout come from (seed, client,
    round) alone. Errors: DivergedError naming client, round and step.
    """
    bank.load(adapter)
    bank.base.training(True)
    parameters = bank.parameters()
    rate = settings.learning_rate * settings.lr_decay**round_
    optimiser = torch.optim.Adam(parameters, lr=rate, fused=True)
    batches = _batches(rows, settings, bank, torch_generator(seed, "order", client, round_))
    steps, losses = settings.steps(len(rows)), []
    for step in range(steps):
        optimiser.zero_grad(set_to_none=True)
        for part in range(settings.accumulation):
            masks = derived_seed(seed, f"dropout/{step}/{part}", client, round_)
            losses.append(_backward(bank, next(batches), adapter.spec.balance_weight, settings.accumulation, masks))
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        optimiser.step()
        if (step + 1) % NAN_EVERY == 0 or step + 1 == steps:
            _check_finite(losses[-NAN_EVERY * settings.accumulation :], parameters, client, round_, step)
        if on_step is not None:
            on_step(step + 1, steps)
    bank.base.training(False)
    return Trained(bank.adapter(), steps, float(torch.stack(losses).double().mean()))


def embed(bank: Bank, rows: Sequence[Row], batch_size: int) -> dict[str, MeanEmbeddings]:
    """Mean router embeddings of the loaded adapter over all tokens of the rows (step 3 of a round)."""
    tokens = sum(len(prompt) + len(answer) for prompt, answer in rows)
    with torch.no_grad(), bank.recording(embeddings={}) as tape:
        for start in range(0, len(rows), batch_size):
            batch = collate(rows[start : start + batch_size], bank.base.pad_id).to(bank.base.device)
            tape.counted = batch.counted
            bank.logits(batch.ids)
        return bank.mean_embeddings(tape, tokens)


def _backward(bank: Bank, batch: Batch, balance_weight: float, accumulation: int, dropout_seed: int) -> Tensor:
    """Add one batch's share of a step's gradient; return its mean answer loss, detached.

    The backward pass stays inside the recording: gradient checkpointing repeats the forward there and must meet
    the same dropout masks.
    """
    with bank.recording(counted=batch.counted, balance=[], dropout_seed=dropout_seed) as tape:
        loss = answer_losses(bank.logits(batch.ids), batch).mean()
        total = loss + balance_weight * torch.stack(tape.balance).sum() if tape.balance else loss
        (total / accumulation).backward()
    return loss.detach()


def _batches(
    rows: Sequence[Row], settings: TrainingSettings, bank: Bank, generator: torch.Generator
) -> Iterator[Batch]:
    """Endless batches: every row once per pass, a new order each pass, passes joined without a short batch."""

    def order() -> Iterator[int]:
        while True:
            yield from torch.randperm(len(rows), generator=generator).tolist()

    indices = order()
    while True:
        batch = [rows[next(indices)] for _ in range(settings.batch_size)]
        yield collate(batch, bank.base.pad_id).to(bank.base.device)


def _check_finite(losses: list[Tensor], parameters: Sequence[Tensor], client: str, round_: int, step: int) -> None:
    values = torch.stack(losses).tolist()
    bad = next((value for value in values if not math.isfinite(value)), None)
    if bad is None and all(bool(parameter.isfinite().all()) for parameter in parameters):
        return
    what = "its adapter is no longer finite" if bad is None else f"its loss became {bad}"
    raise DivergedError(
        f"client {client}, round {round_}: {what} within steps {max(step - NAN_EVERY + 2, 1)} to {step + 1} of "
        "local training; lower training.learning_rate or set training.clip_norm"
    )
