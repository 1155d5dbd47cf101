"""LoRA experts weighted by a learned mixer or by given weights, against a loop over experts written here."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import fedamole  # noqa: F401 - makes the adapter type known to PEFT
from fedamole.evaluation.likelihood import mean_losses, option_losses
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import Row, collate, token_losses
from fedamole.model.mixer import mixed, mixer_linear
from fedamole.model.params import OWN, REFERENCES, Adapter, delta_key, expert_keys, mixer_key, new_shared, shared_keys
from fedamole.model.pretrained import load_adapter, save_adapter
from fedamole.model.segments import Shares

R, D_IN, D_OUT = 2, 5, 4
SPEC = AdapterSpec(rank=R, alpha=6.0, dropout=0.0, router="mixer", balance_weight=0.0)
ROWS: list[list[Row]] = [[((5, 9, 30), (7, 0)), ((8, 2), (41, 12, 0))], [((50, 19, 3), (17, 22, 0))]]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(
    x: torch.Tensor, base_out: torch.Tensor, w: torch.Tensor, a: list[torch.Tensor], b: list[torch.Tensor],
    own: int | None,
) -> torch.Tensor:
    """Token by token: a softmax; the n largest logits, scaled to 1; those beyond the n-th are the own expert again."""
    rows = []
    for token, y in zip(x, base_out, strict=True):
        p = torch.softmax(w @ token, 0)
        chosen = p.detach().argsort(descending=True)[: len(a)].tolist()
        total = sum(p[i] for i in chosen)
        for i in chosen:
            expert = i if i < len(a) else own
            y = y + 3.0 * p[i] / total * (b[expert] @ (a[expert] @ token))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(("n", "logits", "own"), [(2, 2, None), (3, 5, 1), (3, 5, 2), (1, 1, None), (4, 4, None)])
def test_equals_a_loop_and_so_do_the_gradients(n: int, logits: int, own: int | None) -> None:
    x, base_out = draw(7, D_IN, seed=1), draw(7, D_OUT, seed=2)
    leaves = [draw(logits, D_IN, seed=3), *(draw(R, D_IN, seed=10 + i) for i in range(n)),
              *(draw(D_OUT, R, seed=20 + i) for i in range(n))]
    results = []
    for loop in (True, False):
        w, *rest = [leaf.clone().requires_grad_() for leaf in leaves]
        a, b = rest[:n], rest[n:]
        if loop:
            y = by_loop(x, base_out, w, a, b, own)
        else:
            down, up = torch.cat([w, *a])[None], torch.cat([part.T for part in b])[None]
            one_hot = None if own is None else torch.eye(n, dtype=torch.float64)[own][None]
            y = mixer_linear(x, base_out, down, up, SPEC, None, Shares((7,)), one_hot)
        (y**2).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in (w, *rest))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_the_own_expert_may_take_all() -> None:
    """Logits 0, 1, 0 | 3, 2 with expert 1 the own one: the largest are 3, 2 and 1, all of them the own expert's."""
    logits = torch.tensor([[0.0, 1.0, 0.0, 3.0, 2.0]])
    assert mixed(logits, 3, torch.tensor([[0.0, 1.0, 0.0]])).tolist() == [[0.0, pytest.approx(1.0), 0.0]]


# --- in a bank ------------------------------------------------------------------------------------------------


def mixture(base: Base, seed: int, router: str, own: int | None = None) -> Adapter:
    """Two experts (three with an own one) in every module."""
    generator, n = torch.Generator().manual_seed(seed), 2 if own is None else 3
    tensors = {}
    for module, (d_in, d_out) in base.shapes.items():
        for expert in range(n):
            a, b = expert_keys(module, expert)
            tensors[a], tensors[b] = torch.randn(R, d_in, generator=generator) * 0.3, torch.randn(
                d_out, R, generator=generator) * 0.3
        if router == "mixer":
            tensors[mixer_key(module)] = torch.randn(n if own is None else 2 * n - 1, d_in, generator=generator)
    spec = AdapterSpec(rank=R, alpha=4.0, router=router, instance_weight=0.8)  # type: ignore[arg-type]
    fixed = {} if own is None else {OWN: torch.eye(n)[own]}
    if router == "instance":
        fixed[REFERENCES] = torch.randn(3, base.width, generator=generator)
    return Adapter(spec, tensors, fixed)


def changed(base: Base, seed: int) -> Adapter:
    """A LoRA on linears that are changed themselves."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(tensor.shape, generator=generator) * 0.2
               for name, tensor in new_shared(base.shapes, R, generator).items()}
    deltas = {delta_key(m): torch.randn(d_out, d_in, generator=generator) * 0.1
              for m, (d_in, d_out) in base.shapes.items()}
    return Adapter(AdapterSpec(rank=R, alpha=4.0), tensors, deltas)


KINDS: dict[str, Callable[[Base, int], Adapter]] = {
    "softmax of two": lambda base, seed: mixture(base, seed, "mixer"),
    "own expert again": lambda base, seed: mixture(base, seed, "mixer", own=seed % 3),
    "by instance": lambda base, seed: mixture(base, seed, "instance"),
    "changed linears": changed,
}


def logits_of(bank: Bank, adapters: list[Adapter], rows: list[list[Row]], packed: bool) -> torch.Tensor:
    bank.load(adapters)
    with torch.no_grad(), bank.reading(collate(rows, bank.base.pad_id, packed)) as logits:
        return logits.clone()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_clients_at_once_equal_each_alone(kind: str, packed: bool, base: Callable[..., Base]) -> None:
    bank = Bank(base())
    bank.base.model.double()
    adapters = [KINDS[kind](bank.base, seed) for seed in (1, 2)]
    together = logits_of(bank, adapters, ROWS, packed)
    alone = [logits_of(bank, [adapter], [rows], True) for adapter, rows in zip(adapters, ROWS, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)
    bank.load([])
    assert not torch.allclose(together[:2], logits_of(bank, [], ROWS, packed)[:2], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_gives_the_same_logits(kind: str, base: Callable[..., Base], tmp_path: Path) -> None:
    bank = Bank(base())
    adapter = KINDS[kind](bank.base, 1)
    wanted = logits_of(bank, [adapter], ROWS[:1], True)
    save_adapter(adapter, tmp_path / "adapter", bank.base.name, bank.base.identity)
    again = load_adapter(tmp_path / "adapter", bank.base.identity)
    torch.testing.assert_close(logits_of(bank, [again], ROWS[:1], True), wanted, rtol=0, atol=1e-4)
    model = PeftModel.from_pretrained(base().model, str(tmp_path / "adapter"))
    found = []
    for prompt, answer in ROWS[0]:
        with torch.no_grad():
            if kind == "by instance":  # the prompt alone decides the weights, so it goes first
                out = model(torch.tensor([prompt]), use_cache=True)
                more = model(torch.tensor([answer[:-1]]), past_key_values=out.past_key_values).logits[0]
                found += [out.logits[0, -1:], more]
            else:
                found.append(model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :])
    torch.testing.assert_close(torch.cat(found), wanted, rtol=0, atol=1e-4)


def test_a_changed_linear_is_a_base_with_another_weight(base: Callable[..., Base]) -> None:
    bank, other = Bank(base()), base()
    adapter = changed(bank.base, 3)
    for module in other.shapes:
        a, b = (adapter.tensors[key] for key in shared_keys(module))
        linear = other.model.get_submodule(module)
        linear.weight.data += adapter.fixed[delta_key(module)] + 2.0 * b @ a
    wanted = logits_of(Bank(other), [], ROWS, True)
    torch.testing.assert_close(logits_of(bank, [adapter, adapter], ROWS, True), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_options_and_losses_agree_with_whole_forward_passes(kind: str, base: Callable[..., Base]) -> None:
    bank = Bank(base())
    adapter = KINDS[kind](bank.base, 1)
    prompt, options = (5, 9, 30, 2), ((7, 0), (7, 8, 0), (41, 12, 0))
    wanted = []
    for option in options:
        logits = logits_of(bank, [adapter], [[(prompt, option)]], False)
        wanted.append(float(token_losses(logits, torch.tensor(option)).mean()))
    bank.load([adapter])
    assert option_losses(bank, [[(prompt, options)]], 4096)[0][0] == pytest.approx(wanted, abs=1e-4)
    assert mean_losses(bank, [[(prompt, options[1])]], 4096) == pytest.approx([wanted[1]], abs=1e-4)


def test_weights_by_instance_by_hand(base: Callable[..., Base]) -> None:
    """0.8 times the mean cosine: with twice the prompt itself, with it and nothing, with its opposite (0)."""
    bank = Bank(base())
    adapter = mixture(bank.base, 1, "instance")
    bank.load([adapter])
    (hidden,) = bank.last_hidden([[(5, 9, 30)]])
    for references, weight in (([hidden, hidden], 0.8), ([hidden, torch.zeros_like(hidden)], 0.4), ([-hidden], 0.0)):
        bank.load([Adapter(adapter.spec, adapter.tensors, {REFERENCES: torch.stack(references)})])
        found = bank.gates([[(5, 9, 30)]])
        assert found is not None
        assert found[0].tolist() == pytest.approx([weight, 1 - weight], abs=1e-5)
