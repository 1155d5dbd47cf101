"""Gradient inversion, in a cheap form: which tokens did a client read, by the first update that it sends?

In the first layer, an adapter's input at a token depends on the token alone. The gradient of a factor A (r, d_in) is a
sum of these inputs over the tokens of the batch, each times a factor. The attack computes the input of every token of
the vocabulary, whitens the inputs, and ranks the tokens by the norm of the change of A in their directions. Factor B
starts at 0, so A moves from the second step on. Attacks that optimise texts recover far more (for LoRA, for example,
https://arxiv.org/abs/2601.17533): a low recall here is no protection.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from fedamole.auditing.release import NotApplicableError, Release, sent_tensors
from fedamole.federation.local import LocalTask, TrainingGroup
from fedamole.federation.privacy.training import PrivateGroup
from fedamole.federation.request import TrainingResult
from fedamole.federation.settings import TrainingSettings
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair, collate
from fedamole.model.params import Adapter, layer_of

RANDOM_UPDATES = 39
"""Random updates that are attacked in the same way, for the level of chance."""
SMALLEST_DIRECTION = 1e-3
"""Directions in which the inputs spread less than this share of the most are left out."""
TOKENS_AT_ONCE = 1024


class Recorded(TrainingGroup):
    """A training of one client that records the tokens that it reads."""

    def __init__(self, bank: Bank, task: LocalTask, settings: TrainingSettings, seed: int) -> None:
        """Prepare the training of round 0."""
        super().__init__(bank, [task], settings, seed, 0, 0)
        self.tokens_read = set[int]()

    @override
    def _add_gradients(self, rows: list[list[TokenPair]], first: int, last: int, part: str, parts: int) -> None:
        self.tokens_read.update(token for row in rows[0] for tokens in row for token in tokens)
        super()._add_gradients(rows, first, last, part, parts)


class RecordedPrivate(Recorded, PrivateGroup):
    """The same with noise."""


@dataclass(frozen=True)
class Inversion:
    """How many of the tokens are recovered."""

    recall: float
    """Share of the true tokens among the k with the largest scores, where k is the number of the true ones."""
    chance: float
    """Mean recall of the attack on random updates."""
    highest: float
    """Highest recall of the attack on `RANDOM_UPDATES` random updates."""
    tokens: int
    """Number k of distinct tokens that the client has read."""
    vocabulary: int


class TokenAttack:
    """Ranks the tokens of a vocabulary by the change of the first layer's factors A."""

    def __init__(self, bank: Bank, modules: Sequence[str]) -> None:
        """Compute the whitened inputs of all tokens in those of the modules that share the first one's input."""
        inputs = _token_inputs(bank, modules)
        first = next(iter(inputs.values()))
        self.modules = [name for name, values in inputs.items() if torch.equal(values, first)]
        centred = first - first.mean(0)
        variances, directions = torch.linalg.eigh(centred.T.double() @ centred.double())
        spread = variances.clamp(min=0).sqrt()
        kept = spread > SMALLEST_DIRECTION * spread.max()
        self.whiten = (directions[:, kept] / spread[kept]).float()
        """Maps inputs (d_in) to directions of equal spread."""
        self.tokens = nn.functional.normalize(centred @ self.whiten, dim=1)

    def scores(self, changes: Mapping[str, Tensor]) -> Tensor:
        """Return a score for each token (V) from the changes of factors A (r, d_in), by tensor name."""
        total = torch.zeros(len(self.tokens), device=self.tokens.device)
        for module in self.modules:
            factors = [change for name, change in changes.items() if _is_factor(name, module)]
            if not factors or not any(bool(factor.any()) for factor in factors):
                continue
            moved = torch.cat(factors).to(self.tokens) @ self.whiten
            norms = (self.tokens @ moved.T).norm(dim=1)
            total += (norms - norms.mean()) / norms.std().clamp(min=1e-12)
        return total


def _is_factor(name: str, module: str) -> bool:
    return name.startswith(f"{module}/") and name.endswith("/A")


def _token_inputs(bank: Bank, modules: Sequence[str]) -> dict[str, Tensor]:
    """Return the inputs (V, d_in) of modules of the untuned base at each token alone."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in modules}
    handles = []
    for name in modules:

        def keep(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
            inputs[name].append(arguments[0].flatten(0, 1).float())

        handles.append(bank.layers[name].register_forward_pre_hook(keep))
    bank.load([])
    try:
        with torch.no_grad():
            for start in range(0, bank.base.vocabulary, TOKENS_AT_ONCE):
                tokens = range(start, min(start + TOKENS_AT_ONCE, bank.base.vocabulary))
                # Two tokens each, of which the second is never read by the first.
                rows: list[TokenPair] = [((token,), (token,)) for token in tokens]
                with bank.forward(collate([rows], bank.base.pad_id, bank.packs, device=bank.base.device)):
                    pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts)[::2] for name, parts in inputs.items()}


def _sent_changes(release: Release, start: Adapter, result: TrainingResult) -> dict[str, Tensor]:
    """Return how the tensors have changed that the client sends as they are."""
    trained = result.adapter.tensors
    names = sent_tensors(release.reply(result), trained)
    return {name: trained[name].float().cpu() - start.tensors[name].float().cpu() for name in names}


def recall(scores: Tensor, tokens: set[int]) -> float:
    """Return the share of `tokens` among as many tokens with the largest scores."""
    top = torch.topk(scores, len(tokens)).indices.tolist()
    return len(tokens.intersection(top)) / len(tokens)


def invert_update(bank: Bank, release: Release, task: LocalTask, training: TrainingSettings, seed: int) -> Inversion:
    """Train a client as in round 0 of the run, and read the tokens of its rows from what it sends.

    `task` has a mechanism if the run is private. Raises DivergedError, and NotApplicableError if no factor A of the
    first layer is sent or has moved.
    """
    start = release.request.adapter
    group = (Recorded if task.mechanism is None else RecordedPrivate)(bank, task, training, seed)
    bank.base.training(True)
    try:
        for step in range(group.steps[0]):
            group.step(step)
    finally:
        bank.base.training(False)
    (result,) = group.results()
    if isinstance(result, Exception):
        raise result
    changes = _sent_changes(release, start, result)
    tokens = {token for token in group.tokens_read if 0 <= token < bank.base.vocabulary}
    attack = TokenAttack(bank, [name for name in bank.layers if layer_of(name) == layer_of(next(iter(bank.layers)))])
    changes = {name: change for name, change in changes.items() if any(_is_factor(name, m) for m in attack.modules)}
    if not any(bool(change.any()) for change in changes.values()):
        raise NotApplicableError(
            "this attack reads the first layer's factors A, which are not sent or have not moved (B starts at 0, so A "
            "moves from the second step on)"
        )
    generator = torch.Generator().manual_seed(0)
    random = []
    for _ in range(RANDOM_UPDATES):
        noise = {name: torch.randn(c.shape, generator=generator) * c.std() for name, c in changes.items()}
        random.append(recall(attack.scores(noise), tokens))
    return Inversion(
        recall(attack.scores(changes), tokens),
        sum(random) / len(random),
        max(random),
        len(tokens),
        bank.base.vocabulary,
    )
