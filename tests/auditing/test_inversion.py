"""Gradient inversion: tokens are found in changes of the first layer's A, and not in noise."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedamole.auditing.inversion import Recorded, TokenAttack, invert_update, recall
from fedamole.auditing.release import NotApplicableError, Release, first_release, sent_tensors
from fedamole.data.manifest import Manifest
from fedamole.experiment import prepare
from fedamole.federation.local import LocalTask
from fedamole.federation.privacy.mechanism import Mechanism
from fedamole.federation.privacy.secret import SecretRandom
from fedamole.model.bank import Bank

FIRST = "model.layers.0.self_attn."


@pytest.fixture(scope="module")
def prepared(runs: Any) -> Any:
    return prepare(runs.load("fedit"))


@pytest.fixture(scope="module")
def bank(prepared: Any) -> Bank:
    return Bank(prepared.base)


def release(runs: Any, bank: Bank, method: str, name: str = "mood") -> Release:
    prepared = prepare(runs.load(method))
    return first_release(prepared.config, bank, prepared.clients[name], prepared.federation.manifest, "simulation")


def task(prepared: Any, bank: Bank, release_: Release, mechanism: Mechanism | None = None) -> LocalTask:
    return LocalTask("mood", release_.request, prepared.clients["mood"].train.pairs(), 0.03, mechanism=mechanism)


def test_recall_by_hand() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert recall(scores, {0, 2}) == 1
    assert recall(scores, {0, 1}) == 0.5
    assert recall(scores, {1, 3}) == 0


def test_the_inputs_of_tokens_are_found_in_a_change_that_consists_of_them(bank: Bank) -> None:
    names = [name for name in bank.layers if name.startswith(FIRST)]
    attack = TokenAttack(bank, names)
    assert attack.modules == names
    assert attack.tokens.shape[0] == bank.base.vocabulary
    embeddings = bank.base.model.get_input_embeddings().weight.detach()
    inputs = bank.base.model.model.layers[0].input_layernorm(embeddings).detach()
    tokens = {5, 40, 77}
    change = torch.stack([inputs[5] - inputs[40], inputs[77] + inputs[40]])
    assert recall(attack.scores({f"{names[0]}/shared/A": change}), tokens) == 1
    assert not attack.scores({f"{names[0]}/shared/B": change, "model.layers.1.x/shared/A": change}).any()


def test_a_round_reveals_its_tokens_unless_it_is_noised(runs: Any, prepared: Any, bank: Bank) -> None:
    training = replace(prepared.config.training, local_steps=8, batch_size=1)
    first = release(runs, bank, "fedit")
    plain = invert_update(bank, first, task(prepared, bank, first), training, 0)
    assert plain.recall > plain.highest
    assert plain.vocabulary == bank.base.vocabulary
    first = release(runs, bank, "fedit")
    rows = len(prepared.clients["mood"].train.rows)
    mechanism = Mechanism(0.1, 5.0, 4, rows, SecretRandom(b"a key for tests of 32 bytes long"))
    noised = invert_update(bank, first, task(prepared, bank, first, mechanism), training, 0)
    assert noised.recall <= noised.highest


def test_the_tokens_are_those_of_the_rows_that_were_read(prepared: Any, bank: Bank, runs: Any) -> None:
    training = replace(prepared.config.training, local_steps=1, batch_size=2)
    own = task(prepared, bank, release(runs, bank, "fedit"))
    group = Recorded(bank, own, training, 0)
    group.step(0)
    tokens = [{*prompt, *answer} for prompt, answer in own.rows]
    assert any(group.tokens_read == first | other for first in tokens for other in tokens)


@pytest.mark.parametrize(("method", "steps"), [("ffa_lora", 3), ("fedit", 1)])
def test_nothing_to_read_if_a_is_not_sent_or_has_not_moved(
    method: str, steps: int, runs: Any, prepared: Any, bank: Bank
) -> None:
    first = release(runs, bank, method)
    training = replace(prepared.config.training, local_steps=steps)
    with pytest.raises(NotApplicableError, match="not sent or have not moved"):
        invert_update(bank, first, task(prepared, bank, first), training, 0)


def test_what_is_sent(runs: Any, prepared: Any, bank: Bank) -> None:
    """FedSA-LoRA sends A and keeps B; FFA-LoRA sends B, and A is frozen."""
    for method, kept in (("fedit", ""), ("fedsa_lora", "/B"), ("ffa_lora", "/A")):
        first = release(runs, bank, method)
        adapter = first.request.adapter
        changed = {
            name: t if name in adapter.frozen else t + i for i, (name, t) in enumerate(adapter.tensors.items(), 1)
        }
        result = replace(first.request.unchanged(), adapter=replace(adapter, tensors=changed))
        sent = sent_tensors(first.reply(result), changed)
        assert {*sent} == {name for name in changed if not (kept and name.endswith(kept))}, method


@pytest.mark.parametrize(
    ("method", "kind", "reason"),
    [
        ("local_only", "simulation", "nothing leaves"),
        ("fedit", "client", "deployment"),
        ("fed_et", "simulation", "its server"),
    ],
)
def test_methods_and_folders_without_a_first_update(
    method: str, kind: Any, reason: str, runs: Any, prepared: Any, bank: Bank
) -> None:
    config = runs.load(method)
    with pytest.raises(NotApplicableError, match=reason):
        first_release(config, bank, prepared.clients["mood"], Manifest(0, {}, (), ()), kind)
