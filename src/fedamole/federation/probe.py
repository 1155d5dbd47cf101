"""Forward passes without training on examples that a client sets aside: its embedding split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.data.tokens import TokenRow
from fedamole.errors import ConfigError
from fedamole.evaluation.likelihood import mean_losses, option_losses
from fedamole.federation.randomness import numpy_generator
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids, TokenPair, batches
from fedamole.model.forward_context import ForwardContext
from fedamole.model.moments import collect_moments, module_runs
from fedamole.model.params import Adapter, expert_ids, indices_by_kind
from fedamole.model.steering import example_states

T = TypeVar("T")


class InputMoments(NamedTuple):
    """Second moments of one module's inputs."""

    mean: Tensor
    """Mean of x x^T over the tokens, (d_in, d_in), float32 on the CPU."""
    tokens: int


class Probe(Protocol):
    """Forward passes of a client's adapters over its embedding split; nothing is trained.

    Of a split with more than `max_examples` examples each call reads a random draw, which is the same in all rounds of
    a run. The examples count as `probed` and their tokens as `forward_tokens`, once per adapter.
    """

    def losses(self, adapters: Sequence[Adapter], max_examples: int) -> list[float]:
        """Return the mean loss per answer token, in nats, of each adapter on the same examples."""

    def hidden_states(self, adapter: Adapter, max_examples: int) -> Tensor:
        """Return the last hidden states (S, d) at the ends of S prompts, float32 on the CPU.

        Of an adapter with two experts that are weighted by instance, the first expert alone is used.
        """

    def moments(self, adapter: Adapter | None, max_examples: int) -> dict[str, InputMoments]:
        """Return the second moments of the inputs of each adapted module; `None` is the untuned base."""

    def usage(self, adapter: Adapter, max_examples: int) -> dict[str, dict[int, float]]:
        """Return the share of the tokens that are routed to each expert, by module and expert id.

        A token counts for every expert to which the router gives a weight above 0.
        """

    def options(self, adapter: Adapter | None, max_examples: int) -> Tensor:
        """Return the log-probabilities (N, options) of every answer option of N examples, in nats, float64.

        Raises a ConfigError for a client whose examples have no options.
        """

    def prompt_logits(self, adapter: Adapter, prompts: Sequence[Ids], tokens: Sequence[int]) -> Tensor:
        """Return the logits (n, tokens) of some tokens at the ends of n given prompts, in the order of their lengths.

        float32 on the CPU.
        """

    def prompt_hidden(self, adapter: Adapter, prompts: Sequence[Ids]) -> Tensor:
        """Return the last hidden states (n, d) at the ends of n given prompts, in their order, float32 on the CPU."""

    def example_states(self, max_examples: int) -> Tensor:
        """Return the hidden states (S, 2, d) of S examples under the untuned base, float32 on the CPU.
        They are those after the chosen and the rejected answer of a preference pair; of other examples those after the
        answer, and zeros.
        """


@dataclass
class ProbeCounts:
    """Examples and tokens that a client's probe has read in a round."""

    examples: int = 0
    tokens: int = 0
    """Tokens without padding."""

    def add(self, rows: Sequence[TokenPair], adapters: int = 1) -> None:
        """Count examples that are read under this many adapters."""
        self.examples += len(rows) * adapters
        self.tokens += count_tokens(rows) * adapters


def count_tokens(rows: Sequence[TokenPair]) -> int:
    """Count the tokens of prompts and answers, without padding."""
    return sum(len(prompt) + len(answer) for prompt, answer in rows)


def draw_examples(rows: Sequence[T], max_examples: int, seed: int, purpose: str, client: str) -> list[T]:
    """Draw at most `max_examples` of a client's examples, in their order; the draw is the same in every round.

    The first examples of a file would not do, because files may be sorted by label.
    """
    order = numpy_generator(seed, f"look/{purpose}", client).permutation(len(rows)).tolist()
    return [rows[i] for i in sorted(order[:max_examples])]


@dataclass
class ClientProbe(Probe):
    """The probe of a client whose data are in this process."""

    bank: Bank
    rows: Sequence[TokenRow]
    """The embedding split."""
    client: str
    seed: int
    batch_tokens: int
    """Largest number of tokens that are read at once."""
    counts: ProbeCounts
    """Updated with all that is read."""

    @override
    def losses(self, adapters: Sequence[Adapter], max_examples: int) -> list[float]:
        rows = self._draw(max_examples, "losses")
        losses = [0.0] * len(adapters)
        for indices in indices_by_kind(dict(enumerate(adapters))):
            self.bank.load([adapters[i] for i in indices])
            self.counts.add(self.bank.prefixed([rows])[0], len(indices))
            values = mean_losses(self.bank, [rows] * len(indices), self.batch_tokens)
            for i, value in zip(indices, values, strict=True):
                losses[i] = value
        return losses

    @override
    def hidden_states(self, adapter: Adapter, max_examples: int) -> Tensor:
        prompts = [prompt for prompt, _ in self._draw(max_examples, "hidden")]
        self.counts.add([(prompt, (0,)) for prompt in prompts])
        self.bank.load([adapter])
        return self.bank.last_hidden([prompts]).cpu()

    @override
    def moments(self, adapter: Adapter | None, max_examples: int) -> dict[str, InputMoments]:
        rows, moments = self._loaded(adapter, max_examples, "moments"), dict[str, InputMoments]()
        for i, modules in enumerate(module_runs(self.bank.base.shapes, outputs=False)):
            if i > 0:
                self.counts.tokens += count_tokens(rows)
            for name, sums in collect_moments(self.bank, modules, rows, self.batch_tokens, outputs=False).items():
                moments[name] = InputMoments((sums.xx / max(sums.tokens, 1)).float().cpu(), sums.tokens)
        return moments

    @override
    def usage(self, adapter: Adapter, max_examples: int) -> dict[str, dict[int, float]]:
        rows, bank = self._loaded(adapter, max_examples, "usage"), self.bank
        routed: dict[str, Tensor] = {}
        with torch.no_grad():
            for batch in batches([rows], bank.base.pad_id, bank.packs, self.batch_tokens, bank.base.device):
                weights: dict[str, Tensor] = {}
                with bank.forward(batch, ForwardContext(routing_weights=weights)):
                    pass
                not_padding = slice(None) if batch.not_padding is None else batch.not_padding
                for name, values in weights.items():
                    routed[name] = routed.get(name, 0) + (values[not_padding] > 0).sum(0)
        tokens, held = count_tokens(rows), expert_ids(adapter.tensors)
        return {
            name: dict(zip(held[name], (counts.double() / tokens).tolist(), strict=True))
            for name, counts in sorted(routed.items())
        }

    @override
    def options(self, adapter: Adapter | None, max_examples: int) -> Tensor:
        rows = draw_examples(self.rows, max_examples, self.seed, "options", self.client)
        if not all(row.options for row in rows):
            raise ConfigError(f"client {self.client}: its examples have no answer options")
        self.bank.load([] if adapter is None else [adapter])
        self.counts.add(self.bank.prefixed([[(row.prompt, sum(row.options, ())) for row in rows]])[0])
        (losses,) = option_losses(self.bank, [[(row.prompt, row.options) for row in rows]], self.batch_tokens)
        lengths = [[len(option) for option in row.options] for row in rows]
        return -torch.tensor(losses, dtype=torch.float64) * torch.tensor(lengths)

    @override
    def prompt_logits(self, adapter: Adapter, prompts: Sequence[Ids], tokens: Sequence[int]) -> Tensor:
        self.bank.load([adapter])
        (rows,) = self.bank.prefixed([[(prompt, (0,)) for prompt in prompts]])
        self.counts.add(rows)
        base, logits = self.bank.base, [torch.zeros(0, len(tokens))]
        with torch.no_grad():
            for batch in batches([rows], base.pad_id, self.bank.packs, self.batch_tokens, base.device):
                with self.bank.forward(batch) as values:
                    logits.append(values[:, list(tokens)].float().cpu())
        return torch.cat(logits)

    @override
    def prompt_hidden(self, adapter: Adapter, prompts: Sequence[Ids]) -> Tensor:
        self.bank.load([adapter])
        (rows,) = self.bank.prefixed([[(prompt, (0,)) for prompt in prompts]])
        self.counts.add(rows)
        count = max(self.batch_tokens // (max((len(prompt) for prompt in prompts), default=0) + 1), 1)
        parts = [torch.zeros(0, self.bank.base.width)]
        for first in range(0, len(prompts), count):
            parts.append(self.bank.last_hidden([prompts[first : first + count]]).cpu())
        return torch.cat(parts)

    @override
    def example_states(self, max_examples: int) -> Tensor:
        drawn = draw_examples(self.rows, max_examples, self.seed, "states", self.client)
        answers = [(row.answer, row.rejected) if row.rejected else row.answer for row in drawn]
        states, tokens = example_states(self.bank, list(zip([row.prompt for row in drawn], answers, strict=True)))
        self.counts.examples += len(drawn)
        self.counts.tokens += tokens
        return states.cpu()

    def _draw(self, max_examples: int, purpose: str) -> list[TokenPair]:
        rows = draw_examples(self.rows, max_examples, self.seed, purpose, self.client)
        return [(row.prompt, row.answer) for row in rows]

    def _loaded(self, adapter: Adapter | None, max_examples: int, purpose: str) -> list[TokenPair]:
        """Load an adapter and return the examples that are read under it, with its virtual tokens, counted."""
        self.bank.load([] if adapter is None else [adapter])
        (rows,) = self.bank.prefixed([self._draw(max_examples, purpose)])
        self.counts.add(rows)
        return rows


class DryProbe(Probe):
    """A probe that reads nothing and returns zeros of the right shapes, for dry runs and plans."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], width: int) -> None:
        """Return results for a base with these adapted modules and this width."""
        self.shapes, self.width = shapes, width

    @override
    def losses(self, adapters: Sequence[Adapter], max_examples: int) -> list[float]:
        return [0.0] * len(adapters)

    @override
    def hidden_states(self, adapter: Adapter, max_examples: int) -> Tensor:
        return torch.zeros(max_examples, self.width)

    @override
    def moments(self, adapter: Adapter | None, max_examples: int) -> dict[str, InputMoments]:
        return {name: InputMoments(torch.zeros(d_in, d_in), 0) for name, (d_in, _) in self.shapes.items()}

    @override
    def usage(self, adapter: Adapter, max_examples: int) -> dict[str, dict[int, float]]:
        held = expert_ids(adapter.tensors)
        return {name: dict.fromkeys(experts, 0.0) for name, experts in held.items() if experts}

    @override
    def options(self, adapter: Adapter | None, max_examples: int) -> Tensor:
        """Return (max_examples, 1): how many options a client's examples have is not known."""
        return torch.zeros(max_examples, 1, dtype=torch.float64)

    @override
    def prompt_logits(self, adapter: Adapter, prompts: Sequence[Ids], tokens: Sequence[int]) -> Tensor:
        return torch.zeros(len(prompts), len(tokens))

    @override
    def prompt_hidden(self, adapter: Adapter, prompts: Sequence[Ids]) -> Tensor:
        return torch.zeros(len(prompts), self.width)

    @override
    def example_states(self, max_examples: int) -> Tensor:
        return torch.zeros(max_examples, 2, self.width)
