"""Which examples a probe reads, how they are counted, and what it returns."""

from collections.abc import Callable, Sequence

import pytest
import torch
from tests.model.conftest import base, folder  # noqa: F401 - fixtures
from torch import Tensor

from fedamole.data.tokens import TokenRow
from fedamole.errors import ConfigError
from fedamole.federation.probe import ClientProbe, DryProbe, ProbeCounts, count_tokens, draw_examples
from fedamole.model import moments
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter, expert_keys, new_pool, new_shared, router_key

ROWS: list[TokenPair] = [((i,), (i // 10, 0)) for i in range(100)]
"""Ten labels of ten rows each, sorted by label, as some data sets are."""


def labels(rows: list[TokenPair]) -> set[int]:
    return {row[1][0] for row in rows}


def test_a_few_examples_of_sorted_data_have_many_labels() -> None:
    """The first 16 have two labels; 16 of a draw without replacement have 8.3 of 10 on average."""
    counts = [len(labels(draw_examples(ROWS, 16, seed, "losses", "north"))) for seed in range(200)]
    assert 7.9 < sum(counts) / len(counts) < 8.7
    assert labels(ROWS[:16]) == {0, 1}


def test_the_draw_depends_on_seed_client_and_purpose_alone() -> None:
    result = draw_examples(ROWS, 5, 0, "losses", "north")
    assert result == draw_examples(ROWS, 5, 0, "losses", "north")
    others = [draw_examples(ROWS, 5, 1, "losses", "north"), draw_examples(ROWS, 5, 0, "hidden", "north")]
    for other in (*others, draw_examples(ROWS, 5, 0, "losses", "south")):
        assert other != result
        assert len(set(other)) == len(other) == 5
    assert result == sorted(result), "rows keep their order"
    assert set(result) < set(draw_examples(ROWS, 16, 0, "losses", "north")), "more examples are these and others"


def test_fewer_rows_than_asked_for_are_all_read() -> None:
    assert (
        draw_examples(ROWS[:4], 5, 0, "losses", "north") == draw_examples(ROWS[:4], 4, 0, "losses", "north") == ROWS[:4]
    )


def test_rows_and_tokens_are_counted() -> None:
    """3 + 5 tokens; once, then under two adapters."""
    rows: list[TokenPair] = [((1, 2), (0,)), ((1, 2, 3), (4, 0))]
    counts = ProbeCounts()
    counts.add(rows)
    assert (counts.examples, counts.tokens) == (2, 8)
    counts.add(rows[:1], 2)
    assert (counts.examples, counts.tokens) == (4, 14)
    assert count_tokens([]) == 0


EXAMPLES = [
    TokenRow((5, 9, 30), (7, 0), ((7, 0), (8, 0), (7, 9, 0))),
    TokenRow((8, 2), (41, 12, 0), ((41, 12, 0), (3, 0), (4, 4, 0))),
    TokenRow((3, 3, 3, 60, 11), (1, 0), ((1, 0), (2, 0), (1, 5, 0))),
]
TOKENS = sum(len(row.prompt) + len(row.answer) for row in EXAMPLES)


@pytest.fixture
def bank(base: Callable[..., Base]) -> Bank:  # noqa: F811
    return Bank(base())


def probe_of(bank: Bank, rows: Sequence[TokenRow] = EXAMPLES) -> ClientProbe:
    return ClientProbe(bank, rows, "north", 0, 12, ProbeCounts())


def lora(bank: Bank, seed: int, rank: int = 2) -> Adapter:
    """A LoRA whose B is not 0."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor if name.endswith("/A") else torch.randn(tensor.shape, generator=draw) * 0.2
        for name, tensor in new_shared(bank.base.shapes, rank, draw).items()
    }
    return Adapter(AdapterSpec(rank=rank, alpha=4.0), tensors)


def mixture(bank: Bank) -> Adapter:
    """A mixture of three experts, of which each token uses two; the ids are 1, 4 and 7."""
    tensors = new_pool(bank.base.shapes, 2, 3, torch.Generator().manual_seed(0))
    ids = {"expert-00": "expert-01", "expert-01": "expert-04", "expert-02": "expert-07"}
    renamed = {}
    for name, tensor in tensors.items():
        module, owner, factor = name.rsplit("/", 2)
        renamed[f"{module}/{ids.get(owner, owner)}/{factor}"] = tensor
    return Adapter(AdapterSpec(rank=2, alpha=4.0, top_k=2), renamed)


def log_probability(bank: Bank, adapter: Adapter | None, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log-probabilities of the answer's tokens, one whole forward pass, no batching."""
    bank.load([] if adapter is None else [adapter])
    with torch.no_grad():
        logits = bank.base.model(torch.tensor([[*prompt, *answer]])).logits[0].double()
    result: Tensor = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor([answer]).T)[:, 0]
    return result


def inputs(bank: Bank, adapter: Adapter | None) -> dict[str, Tensor]:
    """Inputs (tokens, d_in) of each module over all examples, each in a forward pass of its own."""
    seen: dict[str, list[Tensor]] = {name: [] for name in bank.layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, x, name=name: seen[name].append(x[0].flatten(0, -2).double()))
        for name, layer in bank.layers.items()
    ]
    for row in EXAMPLES:
        log_probability(bank, adapter, row.prompt, row.answer)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def test_losses_are_means_over_answer_tokens(bank: Bank) -> None:
    """Adapters of two kinds, in any order; each reads the same examples."""
    adapters, probe = [lora(bank, 0), lora(bank, 1, rank=3), lora(bank, 2)], probe_of(bank)
    losses = probe.losses(adapters, 64)
    for adapter, loss in zip(adapters, losses, strict=True):
        tokens = torch.cat([log_probability(bank, adapter, row.prompt, row.answer) for row in EXAMPLES])
        assert loss == pytest.approx(-float(tokens.mean()), abs=1e-5)
    assert len(set(losses)) == 3
    assert (probe.counts.examples, probe.counts.tokens) == (9, 3 * TOKENS)


def test_hidden_states_are_those_at_the_prompts_ends(bank: Bank) -> None:
    adapter, probe = lora(bank, 0), probe_of(bank)
    states = probe.hidden_states(adapter, 2)
    chosen = draw_examples(EXAMPLES, 2, 0, "hidden", "north")
    bank.load([adapter])
    for state, row in zip(states, chosen, strict=True):
        with torch.no_grad():
            out = bank.base.model(torch.tensor([row.prompt]), output_hidden_states=True)
        torch.testing.assert_close(state, out.hidden_states[-1][0, -1].float(), rtol=0, atol=1e-4)
    assert states.shape == (2, bank.base.width)
    assert probe.counts.examples == 2
    assert probe.counts.tokens == sum(len(row.prompt) + 1 for row in chosen)


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("packs", [True, False])
def test_moments_by_brute_force(bank: Bank, packs: bool, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the untuned base and of a LoRA; in one pass over the examples or in several, with padding or without."""
    bank.packs = packs
    if runs > 1:
        largest = max(8 * d_in * d_in for d_in, _ in bank.base.shapes.values())
        monkeypatch.setattr(moments, "SUMS_AT_ONCE", largest)
    for adapter in (None, lora(bank, 0)):
        probe = probe_of(bank)
        result = probe.moments(adapter, 64)
        assert set(result) == set(bank.base.shapes)
        for name, x in inputs(bank, adapter).items():
            assert result[name].tokens == TOKENS
            assert result[name].mean.dtype == torch.float32
            torch.testing.assert_close(result[name].mean, (x.T @ x / TOKENS).float(), rtol=1e-3, atol=1e-4)
        passes = len(bank.base.shapes) if runs > 1 else 1
        assert (probe.counts.examples, probe.counts.tokens) == (3, passes * TOKENS)


@pytest.mark.parametrize("packs", [True, False])
def test_usage_by_brute_force(bank: Bank, packs: bool) -> None:
    """The two experts with the largest products of t = W_t x and e_i = A_i x, token by token."""
    bank.packs = packs
    adapter, probe = mixture(bank), probe_of(bank)
    usage = probe.usage(adapter, 64)
    for name, x in inputs(bank, adapter).items():
        t = x @ adapter.tensors[router_key(name)].double().T
        experts = [x @ adapter.tensors[expert_keys(name, i)[0]].double().T for i in (1, 4, 7)]
        chosen = torch.stack([(t * e).sum(1) for e in experts], dim=1).topk(2, dim=1).indices
        shares = {i: float((chosen == column).any(1).double().mean()) for column, i in enumerate((1, 4, 7))}
        assert usage[name] == pytest.approx(shares)
        assert sum(usage[name].values()) == pytest.approx(2)
    assert (probe.counts.examples, probe.counts.tokens) == (3, TOKENS)


def test_options_are_log_probabilities(bank: Bank) -> None:
    for adapter in (None, lora(bank, 0)):
        probe = probe_of(bank)
        result = probe.options(adapter, 64)
        assert result.shape == (3, 3)
        for row, values in zip(EXAMPLES, result.tolist(), strict=True):
            for option, value in zip(row.options, values, strict=True):
                assert value == pytest.approx(float(log_probability(bank, adapter, row.prompt, option).sum()), abs=1e-4)
        assert probe.counts.examples == 3
    with pytest.raises(ConfigError, match="client north: its examples have no answer options"):
        probe_of(bank, [TokenRow((1, 2), (3, 0), ())]).options(None, 64)


def test_prompt_logits_are_those_at_the_prompts_ends(bank: Bank) -> None:
    """In the order of the lengths, and not of the prompts that were given."""
    adapter, probe = lora(bank, 0), probe_of(bank)
    prompts = [row.prompt for row in EXAMPLES]
    result = probe.prompt_logits(adapter, prompts, (7, 3))
    bank.load([adapter])
    for prompt, values in zip(sorted(prompts, key=len), result, strict=True):
        with torch.no_grad():
            logits = bank.base.model(torch.tensor([prompt])).logits[0, -1, [7, 3]].float()
        torch.testing.assert_close(values, logits, rtol=0, atol=1e-4)
    assert (probe.counts.examples, probe.counts.tokens) == (3, sum(len(prompt) + 1 for prompt in prompts))
    assert probe.prompt_logits(adapter, [], (7, 3)).shape == (0, 2)


def test_hidden_states_of_prompts_are_in_their_order_whatever_is_read_at_once(bank: Bank) -> None:
    adapter, probe = lora(bank, 0), probe_of(bank)
    prompts = [row.prompt for row in EXAMPLES]
    result = probe.prompt_hidden(adapter, prompts)
    bank.load([adapter])
    for prompt, state in zip(prompts, result, strict=True):
        torch.testing.assert_close(state, bank.last_hidden([[prompt]])[0], rtol=0, atol=1e-4)
    assert (probe.counts.examples, probe.counts.tokens) == (3, sum(len(prompt) + 1 for prompt in prompts))
    probe.batch_tokens = 1
    torch.testing.assert_close(probe.prompt_hidden(adapter, prompts), result, rtol=0, atol=1e-4)
    assert probe.prompt_hidden(adapter, []).shape == (0, bank.base.width)


def test_the_dry_probe_returns_zeros_of_the_same_shapes(bank: Bank) -> None:
    real, dry, adapter = probe_of(bank), DryProbe(bank.base.shapes, bank.base.width), mixture(bank)
    assert dry.losses([adapter, adapter], 3) == [0.0, 0.0]
    assert dry.prompt_logits(adapter, [(1,)], (7, 3)).tolist() == [[0.0, 0.0]]
    assert dry.prompt_hidden(adapter, [(1,)]).shape == real.prompt_hidden(adapter, [(1,)]).shape
    assert dry.hidden_states(adapter, 3).shape == real.hidden_states(adapter, 3).shape
    for name, (mean, _) in real.moments(adapter, 3).items():
        assert dry.moments(adapter, 3)[name].mean.shape == mean.shape
        assert not dry.moments(adapter, 3)[name].mean.any()
    usage = real.usage(adapter, 3)
    assert {name: set(shares) for name, shares in dry.usage(adapter, 3).items()} == {
        name: set(shares) for name, shares in usage.items()
    }
    assert dry.options(adapter, 3).dtype == real.options(adapter, 3).dtype
