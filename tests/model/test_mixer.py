"""LoRA experts weighted by a learned mixer or by given weights, against a loop over experts written here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import fedamole  # noqa: F401 - makes the adapter type known to PEFT
from fedamole.evaluation.generation import generate_answers
from fedamole.evaluation.likelihood import mean_losses, option_losses
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import Ids, TokenPair, collate, token_losses
from fedamole.model.mixer import InstanceWeights, LearnedRouter, mixer_linear, weights_from_logits
from fedamole.model.params import OWN, REFERENCES, Adapter, delta_key, expert_keys, mixer_key, new_shared, shared_keys
from fedamole.model.pretrained import load_adapter, save_adapter
from fedamole.model.router import LinearAdapters
from fedamole.model.segments import Segments

R, D_IN, D_OUT = 2, 5, 4
SPEC = AdapterSpec(rank=R, alpha=6.0, dropout=0.0, router=LearnedRouter(), balance_weight=0.0)
ROWS: list[list[TokenPair]] = [[((5, 9, 30), (7, 0)), ((8, 2), (41, 12, 0))], [((50, 19, 3), (17, 22, 0))]]


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(
    x: torch.Tensor,
    base_out: torch.Tensor,
    w: torch.Tensor,
    a: list[torch.Tensor],
    b: list[torch.Tensor],
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
            assert expert is not None
            y = y + 3.0 * p[i] / total * (b[expert] @ (a[expert] @ token))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize(("n", "logits", "own"), [(2, 2, None), (3, 5, 1), (3, 5, 2), (1, 1, None), (4, 4, None)])
def test_equals_a_loop_and_so_do_the_gradients(n: int, logits: int, own: int | None) -> None:
    x, base_out = draw(7, D_IN, seed=1), draw(7, D_OUT, seed=2)
    leaves = [
        draw(logits, D_IN, seed=3),
        *(draw(R, D_IN, seed=10 + i) for i in range(n)),
        *(draw(D_OUT, R, seed=20 + i) for i in range(n)),
    ]
    results = []
    for loop in (True, False):
        w, *rest = [leaf.clone().requires_grad_() for leaf in leaves]
        a, b = rest[:n], rest[n:]
        if loop:
            y = by_loop(x, base_out, w, a, b, own)
        else:
            down, up = torch.cat([w, *a])[None], torch.cat([part.T for part in b])[None]
            one_hot = None if own is None else torch.eye(n, dtype=torch.float64)[own][None]
            y = mixer_linear(x, base_out, LinearAdapters(down, up, None, one_hot), SPEC, None, Segments((7,))).y
        (y**2).sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in (w, *rest))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_the_own_expert_may_take_all() -> None:
    """Logits 0, 1, 0 | 3, 2 with expert 1 the own one: the largest are 3, 2 and 1, all of them the own expert's."""
    logits = torch.tensor([[0.0, 1.0, 0.0, 3.0, 2.0]])
    assert weights_from_logits(logits, 3, torch.tensor([[0.0, 1.0, 0.0]])).tolist() == [[0.0, pytest.approx(1.0), 0.0]]


# --- in a bank ------------------------------------------------------------------------------------------------


def mixture(base: Base, seed: int, router: str, own: int | None = None) -> Adapter:
    """Two experts (three with an own one) in every module."""
    generator, n = torch.Generator().manual_seed(seed), 2 if own is None else 3
    tensors = {}
    for module, (d_in, d_out) in base.shapes.items():
        for expert in range(n):
            a, b = expert_keys(module, expert)
            tensors[a], tensors[b] = (
                torch.randn(R, d_in, generator=generator) * 0.3,
                torch.randn(d_out, R, generator=generator) * 0.3,
            )
        if router == "mixer":
            tensors[mixer_key(module)] = torch.randn(n if own is None else 2 * n - 1, d_in, generator=generator)
    spec = AdapterSpec(rank=R, alpha=4.0, router=InstanceWeights(0.8))
    if router == "mixer":
        spec = AdapterSpec(rank=R, alpha=4.0, router=LearnedRouter(extra_own_logits=own is not None))
    fixed = {} if own is None else {OWN: torch.eye(n)[own]}
    if router == "instance":
        fixed[REFERENCES] = torch.randn(3, base.width, generator=generator)
    return Adapter(spec, tensors, fixed)


def changed(base: Base, seed: int) -> Adapter:
    """A LoRA on linears that are changed themselves."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) * 0.2
        for name, tensor in new_shared(base.shapes, R, generator).items()
    }
    deltas = {
        delta_key(m): torch.randn(d_out, d_in, generator=generator) * 0.1 for m, (d_in, d_out) in base.shapes.items()
    }
    return Adapter(AdapterSpec(rank=R, alpha=4.0), tensors, deltas)


KINDS: dict[str, Callable[[Base, int], Adapter]] = {
    "softmax of two": lambda base, seed: mixture(base, seed, "mixer"),
    "own expert again": lambda base, seed: mixture(base, seed, "mixer", own=seed % 3),
    "by instance": lambda base, seed: mixture(base, seed, "instance"),
    "changed linears": changed,
}


def logits_of(bank: Bank, adapters: list[Adapter], rows: list[list[TokenPair]], packed: bool) -> torch.Tensor:
    bank.load(adapters)
    with torch.no_grad(), bank.forward(collate(rows, bank.base.pad_id, packed)) as logits:
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
    expected = logits_of(bank, [adapter], ROWS[:1], True)
    save_adapter(adapter, tmp_path / "adapter", bank.base.name, bank.base.identity)
    again = load_adapter(tmp_path / "adapter", bank.base.identity)
    torch.testing.assert_close(logits_of(bank, [again], ROWS[:1], True), expected, rtol=0, atol=1e-4)
    model = PeftModel.from_pretrained(base().model, str(tmp_path / "adapter"))
    results = []
    for prompt, answer in ROWS[0]:
        with torch.no_grad():
            if kind == "by instance":  # the prompt alone decides the weights, so it goes first
                out = model(torch.tensor([prompt]), use_cache=True)
                more = model(torch.tensor([answer[:-1]]), past_key_values=out.past_key_values).logits[0]
                results += [out.logits[0, -1:], more]
            else:
                results.append(model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :])
    torch.testing.assert_close(torch.cat(results), expected, rtol=0, atol=1e-4)


def test_a_changed_linear_is_a_base_with_another_weight(base: Callable[..., Base]) -> None:
    bank, other = Bank(base()), base()
    adapter = changed(bank.base, 3)
    for module in other.shapes:
        a, b = (adapter.tensors[key] for key in shared_keys(module))
        linear = other.model.get_submodule(module)
        linear.weight.data += adapter.fixed[delta_key(module)] + 2.0 * b @ a
    expected = logits_of(Bank(other), [], ROWS, True)
    torch.testing.assert_close(logits_of(bank, [adapter, adapter], ROWS, True), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_options_and_losses_agree_with_whole_forward_passes(kind: str, base: Callable[..., Base]) -> None:
    bank = Bank(base())
    adapter = KINDS[kind](bank.base, 1)
    prompt, options = (5, 9, 30, 2), ((7, 0), (7, 8, 0), (41, 12, 0))
    expected = []
    for option in options:
        logits = logits_of(bank, [adapter], [[(prompt, option)]], False)
        expected.append(float(token_losses(logits, torch.tensor(option)).mean()))
    bank.load([adapter])
    assert option_losses(bank, [[(prompt, options)]], 4096)[0][0] == pytest.approx(expected, abs=1e-4)
    assert mean_losses(bank, [[(prompt, options[1])]], 4096) == pytest.approx([expected[1]], abs=1e-4)


def test_weights_by_instance_by_hand(base: Callable[..., Base]) -> None:
    """0.8 times the mean cosine: with twice the prompt itself, with it and nothing, with its opposite (0)."""
    bank = Bank(base())
    adapter = mixture(bank.base, 1, "instance")
    bank.load([adapter])
    (hidden,) = bank.last_hidden([[(5, 9, 30)]])
    for references, weight in (([hidden, hidden], 0.8), ([hidden, torch.zeros_like(hidden)], 0.4), ([-hidden], 0.0)):
        bank.load([Adapter(adapter.spec, adapter.tensors, {REFERENCES: torch.stack(references)})])
        result = bank.instance_weights([[(5, 9, 30)]])
        assert result is not None
        assert result[0].tolist() == pytest.approx([weight, 1 - weight], abs=1e-5)


# --- several clients, uneven, and given weights ---------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(4, 4, 4), (2, 7, 3), (5, 0, 1)])
@pytest.mark.parametrize("kind", ["softmax", "own", "gates"])
def test_each_client_is_weighted_by_its_own(kind: str, lengths: tuple[int, ...]) -> None:
    """Three clients' tokens in one tensor, outputs and all gradients, against the loop client by client."""
    n, logits = 3, {"softmax": 3, "own": 5, "gates": 0}[kind]
    leaves = [draw(sum(lengths), D_IN, seed=1), draw(3, logits + n * R, D_IN, seed=2), draw(3, n * R, D_OUT, seed=3)]
    base_out, gates = draw(sum(lengths), D_OUT, seed=4), draw(sum(lengths), n, seed=5).abs()
    own, results = (2, 0, 1), []
    for loop in (True, False):
        x, down, up = (leaf.clone().requires_grad_() for leaf in leaves)
        if loop:
            parts = []
            for c, (tokens, y, g) in enumerate(
                zip(x.split(lengths), base_out.split(lengths), gates.split(lengths), strict=True)
            ):
                a, b = down[c, logits:].split(R), [part.T for part in up[c].split(R)]
                if not len(tokens):
                    parts.append(y)
                elif kind == "gates":
                    added = [3.0 * g[:, [i]] * (tokens @ a[i].T @ b[i].T) for i in range(n)]
                    parts.append(y + sum(added))
                else:
                    parts.append(by_loop(tokens, y, down[c, :logits], [*a], b, own[c] if kind == "own" else None))
            y = torch.cat(parts)
        else:
            one_hot = torch.eye(n, dtype=torch.float64)[list(own)] if kind == "own" else None
            given = gates if kind == "gates" else None
            y = mixer_linear(
                x, base_out, LinearAdapters(down, up, None, one_hot, given), SPEC, None, Segments(lengths)
            ).y
        (y**2).sum().backward()
        results.append([y.detach(), x.grad, down.grad, up.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_experts_see_dropped_inputs_the_mixer_all_of_them() -> None:
    """The first input is dropped, of the mixer's logits nothing is; what is left is scaled by 1 / (1 - 0.5)."""
    spec = AdapterSpec(rank=1, alpha=1.0, dropout=0.5, router=LearnedRouter())
    x, w = torch.tensor([[1.0, 1.0]]), torch.tensor([[torch.log(torch.tensor(3.0)), 0.0], [0.0, 0.0]])
    a, b = torch.tensor([[10.0, 1.0], [10.0, 2.0]]), torch.tensor([[1.0], [1.0]])

    def drop(values: torch.Tensor) -> torch.Tensor:
        return values * torch.tensor([0.0, 1.0])

    y = mixer_linear(
        x, torch.zeros(1, 1), LinearAdapters(torch.cat([w, a])[None], b[None]), spec, drop, Segments((1,))
    ).y
    assert y.item() == pytest.approx(2 * (0.75 * 1 + 0.25 * 2))  # weights 3 : 1


# --- the whole base against hooks written here ----------------------------------------------------------------


@contextmanager
def hooked(base: Base, adapter: Adapter, gates: tuple[float, float] | None = None) -> Iterator[None]:
    """A plain base whose linears add the experts of an adapter, one after the other."""
    spec: Any = adapter.spec

    def hook(module: str) -> Callable[..., torch.Tensor]:
        held = [name for name in adapter.tensors if name.startswith(f"{module}/expert-") and name.endswith("A")]

        def add(_: Any, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            for expert in range(len(held)):
                a, b = (adapter.tensors[key].to(x) for key in expert_keys(module, expert))
                weight: Any = None if gates is None else gates[expert]
                if weight is None:
                    p = torch.softmax(x @ adapter.tensors[mixer_key(module)].to(x).T, -1)
                    best = p.topk(len(held), -1).indices
                    p = torch.where((torch.arange(p.shape[-1]) == best[..., None]).any(-2), p, 0.0)
                    p = p / p.sum(-1, keepdim=True)
                    weight = p[..., [expert]]
                    if OWN in adapter.fixed and adapter.fixed[OWN][expert]:
                        weight = weight + p[..., len(held) :].sum(-1, keepdim=True)
                y = y + spec.scaling * weight * (x @ a.T @ b.T)
            return y

        return add

    handles = [base.model.get_submodule(module).register_forward_hook(hook(module)) for module in base.shapes]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("kind", ["softmax of two", "own expert again"])
def test_a_bank_equals_hooks_on_a_plain_base(kind: str, base: Callable[..., Base]) -> None:
    bank, plain = Bank(base()), base()
    for opened in (bank.base, plain):
        opened.model.double()
    adapters = [KINDS[kind](plain, seed) for seed in (1, 2)]
    result = logits_of(bank, adapters, ROWS, True)
    expected = []
    for adapter, rows in zip(adapters, ROWS, strict=True):
        with hooked(plain, adapter):
            for prompt, answer in rows:
                expected.append(plain.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1])
    torch.testing.assert_close(result, torch.cat(expected), rtol=0, atol=1e-9)


def instances(base: Base, seed: int, references: int) -> Adapter:
    """Weighted by instance, with as many references, near the prompts so that no weight is 0."""
    adapter, bank = mixture(base, seed, "instance"), Bank(base)
    bank.load([adapter])
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 200, (4,), generator=generator).tolist() for _ in range(references)]
    return Adapter(adapter.spec, adapter.tensors, {REFERENCES: bank.last_hidden([prompts])})


def weighed(plain: Base, adapter: Adapter, prompt: Ids) -> tuple[float, float]:
    """0.8 times the mean cosine of the prompt's last hidden state, under the first expert alone, and the rest."""
    with hooked(plain, adapter, (1.0, 0.0)):
        hidden = plain.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1]
    seen = adapter.fixed[REFERENCES]
    cosines = [float(hidden @ row / hidden.norm() / row.norm()) for row in seen]
    first = min(max(0.8 * sum(cosines) / len(cosines), 0.0), 1.0)
    return first, 1 - first


PROMPTS: list[list[Ids]] = [[(5, 9, 30), (8, 2, 77, 31, 4)], [(50, 19, 3, 3)]]


def with_references(base: Callable[..., Base], *counts: int) -> tuple[Bank, Base, list[Adapter]]:
    """A bank, a plain base, and clients with these numbers of references."""
    adapters = [instances(base(), seed, count) for seed, count in enumerate(counts, start=1)]
    return Bank(base()), base(), adapters


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("counts", [(3, 3), (1, 5)])
def test_every_prompt_is_weighed_by_its_own_clients_references(
    counts: tuple[int, int], packed: bool, base: Callable[..., Base], monkeypatch: Any
) -> None:
    """Clients may have seen as few prompts as their splits hold."""
    bank, plain, adapters = with_references(base, *counts)
    monkeypatch.setattr(bank, "packs", packed)
    pairs = [(adapter, prompt) for adapter, part in zip(adapters, PROMPTS, strict=True) for prompt in part]
    expected = [weighed(plain, adapter, prompt) for adapter, prompt in pairs]
    assert len({round(first, 3) for first, _ in expected}) == 3
    bank.load(adapters)
    torch.testing.assert_close(bank.instance_weights(PROMPTS), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("packed", [True, False])
def test_losses_options_and_answers_are_weighed_by_the_prompt(
    packed: bool, base: Callable[..., Base], monkeypatch: Any
) -> None:
    """Whole forward passes of a plain base with the prompt's weights, also for the tokens of the answer."""
    bank, plain, adapters = with_references(base, 2, 4)
    monkeypatch.setattr(bank, "packs", packed)
    options: list[Ids] = [(7, 0), (7, 8, 0), (41, 12, 0), (99, 98, 97, 0)]
    wanted_losses, wanted_answers = [], []
    for adapter, part in zip(adapters, PROMPTS, strict=True):
        for prompt in part:
            with hooked(plain, adapter, weighed(plain, adapter, prompt)):
                results = []
                for option in options:
                    logits = plain.model(torch.tensor([[*prompt, *option]])).logits[0, len(prompt) - 1 : -1]
                    results.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(option))))
                wanted_losses.append(results)
                tokens = list(prompt)
                while len(tokens) < len(prompt) + 6 and (len(tokens) == len(prompt) or tokens[-1] != 0):
                    tokens.append(int(plain.model(torch.tensor([tokens])).logits[0, -1].argmax()))
                wanted_answers.append(plain.tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True).strip())
    bank.load(adapters)
    by_option = option_losses(bank, [[(prompt, options) for prompt in part] for part in PROMPTS], 4096)
    for mine, theirs in zip([row for part in by_option for row in part], wanted_losses, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    rows = [[(prompt, options[1]) for prompt in part] for part in PROMPTS]
    means = [(wanted_losses[0][1] + wanted_losses[1][1]) / 2, wanted_losses[2][1]]
    assert mean_losses(bank, rows, 4096) == pytest.approx(means, abs=1e-4)
    answers = generate_answers(bank, PROMPTS, 6, 4096)
    assert [answer for part in answers for answer in part] == wanted_answers


@pytest.mark.parametrize("weight", [0.5, 0.3])
def test_in_training_the_weights_are_fixed(weight: float, base: Callable[..., Base]) -> None:
    bank, plain = Bank(base()), base()
    adapter_ = mixture(plain, 1, "instance")
    adapter = Adapter(AdapterSpec(rank=R, alpha=4.0, router=InstanceWeights(weight)), adapter_.tensors)
    result = logits_of(bank, [adapter, adapter], ROWS, True)
    expected = []
    with hooked(plain, adapter, (weight, 1 - weight)):
        for prompt, answer in (row for part in ROWS for row in part):
            expected.append(plain.model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1])
    torch.testing.assert_close(result, torch.cat(expected), rtol=0, atol=1e-4)
