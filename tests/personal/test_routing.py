"""Expert weights as reported, against the definition written out here and against what the layers put out."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedamole.config import load_config
from fedamole.data.manifest import read_manifest
from fedamole.errors import ConfigError, DataError
from fedamole.evaluation.generation import generate_answers
from fedamole.experiment import prepare
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.batch import TokenPair, collate
from fedamole.model.forward_context import ForwardContext
from fedamole.model.params import OWN, Adapter, expert_ids, expert_keys, mixer_key, router_key, shared_keys
from fedamole.personal.routing import (
    client_rows,
    expert_holders,
    experts_of,
    find_module,
    greedy_answer,
    most_informative_module,
    roles_of_run,
    routing_stats,
    token_texts,
    token_weights,
    top_tokens,
)
from fedamole.personal.saved_models import find_model, open_bank, saved_models
from fedamole.runs.run_folder import RunFolder
from tests.model import test_mixer
from tests.model.conftest import mixture

ROWS: list[TokenPair] = [((5, 9, 40, 33, 60, 12), (200, 31)), ((5, 11), ()), ((5, 66, 67, 68), (19, 20, 21))]
"""(prompt, answer), of 8, 2 and 7 tokens."""

KINDS: dict[str, Callable[[Base], Adapter]] = {
    "amole": lambda base: mixture(base, 3),
    "amole, best one": lambda base: mixture(base, 3, top_k=1),
    "softmax of two": lambda base: test_mixer.mixture(base, 1, "mixer"),
    "own expert again": lambda base: test_mixer.mixture(base, 2, "mixer", own=2),
    "by instance": lambda base: test_mixer.mixture(base, 1, "instance"),
}


def loaded(base: Base, kind: str) -> tuple[Bank, Adapter]:
    bank, adapter = Bank(base), KINDS[kind](base)
    bank.load([adapter])
    return bank, adapter


def watched(bank: Bank, row: TokenPair) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What goes into every adapted linear for one row, what the frozen linear makes of it, and what comes out."""
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            x = inputs[0].flatten(0, -2)
            seen[name] = x.double(), layer.base_layer(x).double(), out.flatten(0, -2).double()

        return hook

    hooks = [layer.register_forward_hook(look(name)) for name, layer in bank.layers.items()]
    with torch.no_grad(), bank.forward(collate([[row]], bank.base.pad_id, bank.packs)):
        pass
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [True, False])
def test_the_weights_are_those_that_the_layers_used(kind: str, packed: bool, base: Callable[..., Base]) -> None:
    """The experts, weighted so and added to the frozen linear, are what every layer put out."""
    bank, adapter = loaded(base(), kind)
    bank.packs = packed
    result = dict(token_weights(bank, ROWS))
    assert sorted(result) == [0, 1, 2]
    for index, weights in result.items():
        seen = watched(bank, ROWS[index])
        assert set(weights) == set(seen) == set(adapter.modules())
        for module, (x, frozen, out) in seen.items():
            ids, t = expert_ids(adapter.tensors)[module], adapter.tensors
            assert weights[module].shape == (len(x), len(ids))
            assert torch.allclose(weights[module].sum(1), torch.ones(len(x)), atol=1e-5)
            parts = [(weights[module][:, i].double(), expert_keys(module, expert)) for i, expert in enumerate(ids)]
            if shared_keys(module)[0] in t:
                parts.append((torch.ones(len(x), dtype=torch.double), shared_keys(module)))
            assert isinstance(adapter.spec, AdapterSpec)
            for weight, (a, b) in parts:
                frozen = frozen + adapter.spec.scaling * weight[:, None] * (x @ t[a].double().T @ t[b].double().T)
            torch.testing.assert_close(frozen, out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_amole_by_hand(top_k: int, base: Callable[..., Base]) -> None:
    """p = softmax of <W_t x, A_i x> / sqrt(r); the top_k largest, divided by their sum; 0 for all others."""
    bank, adapter = Bank(base()), mixture(base(), 5, top_k=top_k)
    bank.load([adapter])
    ((_, weights),) = token_weights(bank, ROWS[:1])
    for module, (x, _, _) in watched(bank, ROWS[0]).items():
        t, ids = adapter.tensors, expert_ids(adapter.tensors)[module]
        for token, expert_weights in zip(x, weights[module], strict=True):
            want = t[router_key(module)].double() @ token
            scores = [float(want @ (t[expert_keys(module, i)[0]].double() @ token)) / math.sqrt(len(want)) for i in ids]
            chosen = sorted(range(len(ids)), key=lambda i: -scores[i])[:top_k]
            total = sum(math.exp(scores[i]) for i in chosen)
            by_hand = [math.exp(scores[i]) / total if i in chosen else 0.0 for i in range(len(ids))]
            assert expert_weights.tolist() == pytest.approx(by_hand, abs=1e-4)
            assert int((expert_weights > 0).sum()) == top_k


def test_a_mixer_with_an_expert_of_its_own_by_hand(base: Callable[..., Base]) -> None:
    """Of 2n - 1 logits the n largest probabilities, scaled to 1; those beyond the n-th count for the own expert."""
    bank, adapter = loaded(base(), "own expert again")
    ((_, weights),) = token_weights(bank, ROWS[:1])
    own = int(adapter.fixed[OWN].argmax())
    for module, (x, _, _) in watched(bank, ROWS[0]).items():
        for token, expert_weights in zip(x, weights[module], strict=True):
            p = torch.softmax(adapter.tensors[mixer_key(module)].double() @ token, 0).tolist()
            chosen, by_hand = sorted(range(5), key=lambda i: -p[i])[:3], [0.0] * 3
            for i in chosen:
                by_hand[i if i < 3 else own] += p[i] / sum(p[i] for i in chosen)
            assert expert_weights.tolist() == pytest.approx(by_hand, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_watching_changes_nothing(kind: str, base: Callable[..., Base]) -> None:
    bank, _ = loaded(base(), kind)
    batch = collate([ROWS], bank.base.pad_id, bank.packs)
    with torch.no_grad():
        with bank.forward(batch) as logits:
            plain = logits.clone()
        results: dict[str, Tensor] = {}
        with bank.forward(batch, ForwardContext(routing_weights=results)) as logits:
            assert torch.equal(logits, plain)
    assert set(results) == set(bank.layers)
    assert bank.active.context.routing_weights is None


def test_sums_by_hand() -> None:
    """Four tokens in `a`: (1, 0), (1, 0), (0, 1), (.5, .5); in `b` all are alike. A tie belongs to the first.

    The mean of `a` is (5/8, 3/8), its entropy 0.6616; one token of four has ln 2, so a token tells 0.6616 - ln 2 / 4.
    """
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    b = torch.tensor([[0.25, 0.75]]).expand(4, 2)
    result = routing_stats([{"a": a[:3], "b": b[:3]}, {"a": a[3:], "b": b[3:]}])
    assert result["a"].tokens == 4
    assert result["a"].mean_weights == (0.625, 0.375)
    assert result["a"].top_fractions == (0.75, 0.25)
    assert result["a"].mutual_information == pytest.approx(0.66156 - math.log(2) / 4, abs=1e-4)
    assert result["b"].mutual_information == pytest.approx(0, abs=1e-9)
    assert most_informative_module(result) == "a"


def test_the_tokens_that_weigh_an_expert_most() -> None:
    """Token 7 stands twice and counts once, with its larger weight; a weight of 0 is none."""
    rows: list[TokenPair] = [((7, 8), ()), ((9,), (7,))]
    weights = {0: torch.tensor([[0.6, 0.4], [1.0, 0.0]]), 1: torch.tensor([[0.0, 1.0], [0.9, 0.1]])}
    first, second = top_tokens(weights, rows, 3)
    assert [(token.row, token.index) for token in first] == [(0, 1), (1, 1)]
    assert [(token.row, token.index) for token in second] == [(1, 0), (0, 0)]
    assert [token.weight for token in second] == pytest.approx([1.0, 0.4])
    assert [len(best) for best in top_tokens(weights, rows, 1)] == [1, 1]


def test_pieces_put_together_are_the_text(base: Callable[..., Base]) -> None:
    bank = Bank(base())
    text = "a cat, 猫 and é on a mat\n"
    ids = tuple(bank.base.tokenizer(text)["input_ids"])
    result = token_texts(bank, ids)
    assert len(result) == len(ids)
    assert "".join(result) == text
    assert "猫" in result  # whole, with the last of its bytes
    broken = token_texts(bank, ids[: result.index("猫")])
    assert len(broken) == result.index("猫")


def test_the_answer_is_the_models_own(base: Callable[..., Base]) -> None:
    for kind in KINDS:
        bank, _ = loaded(base(), kind)
        ids = greedy_answer(bank, (5, 9, 40), 6)
        assert 0 < len(ids) <= 6
        text = bank.base.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert text == generate_answers(bank, [[(5, 9, 40)]], 6, 1000)[0][0]
    with pytest.raises(ConfigError, match="128"):
        greedy_answer(bank, tuple(range(128)), 6)


def test_modules_by_their_endings() -> None:
    known = ["layers.0.q_proj", "layers.0.v_proj", "layers.10.v_proj"]
    assert find_module("0.q_proj", known) == "layers.0.q_proj"
    assert find_module("layers.0.v_proj", known) == "layers.0.v_proj"
    assert find_module("0.v_proj", known) == "layers.0.v_proj"
    for layer, output in (("v_proj", "2 modules"), ("k_proj", "no such module"), ("_proj", "no such module")):
        with pytest.raises(ConfigError, match=output):
            find_module(layer, known)


def test_holders_are_those_of_the_best_rounds_assignment(runs: Any) -> None:
    folder = RunFolder.open(runs("fedamole"))
    best = folder.read_json("summary.json")["rows"]["fedamole"]["best_round"]
    assigned: dict[str, dict[int, list[str]]] = {}
    for line in folder.lines("assignment.jsonl"):
        for expert in line["experts"] if line["round"] == best else ():
            assigned.setdefault(line["module"], {}).setdefault(expert, []).append(line["client"])
    assert assigned
    for model in saved_models(folder.path):
        assert expert_holders(model, roles_of_run(model)) == assigned
    without_run = find_model(folder.path / "clients" / "mood" / "adapter", None)
    assert expert_holders(without_run, roles_of_run(without_run)) == {}


def test_only_the_clients_own_rows_are_read(runs: Any, tmp_path: Path) -> None:
    run = runs("fedamole")
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    config = (copied / "config.toml").read_text()
    assert "entail.jsonl" in config
    (copied / "config.toml").write_text(config.replace("entail.jsonl", "nowhere.jsonl"))
    model = find_model(copied, "mood")
    bank, _ = open_bank([model], "cpu")
    splits = prepare(load_config(run / "config.toml"), read_manifest(run / "manifest.json")).clients["mood"]
    for split in ("validation", "train"):
        rows = client_rows(model, bank, split)
        assert [(tuple(p), (*a, bank.base.tokenizer.eos_token_id)) for p, a in rows] == [
            (row.prompt, row.answer) for row in getattr(splits, split).rows
        ]
    with pytest.raises(DataError, match="nowhere"):
        client_rows(find_model(copied, "entail"), bank, "validation")


def test_a_plain_lora_has_nothing_to_route(runs: Any) -> None:
    _, (adapter,) = open_bank([find_model(runs("fedit"), "mood")], "cpu")
    with pytest.raises(ConfigError, match="nothing to route"):
        experts_of(adapter, "mood")
