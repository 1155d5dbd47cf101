"""Adapters on one resident base, on every architecture."""

import pytest
import torch
from torch.nn import functional as F

from fedamole.errors import BaseModelError
from fedamole.federation.local import embed, fit
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.batch import answer_losses, collate
from fedamole.model.params import Adapter, expert_keys, new_shared, router_key

from .conftest import ARCHITECTURES, mixture

ROWS = [((5, 6, 7, 8), (9, 10, 0)), ((11, 12), (13, 0)), ((14, 15, 16, 17, 18, 19), (20, 0)), ((3,), (4, 0))]
USUAL = {"gpt2": {"c_attn"}}


def gradients(bank: Bank, rows=ROWS, dropout_seed: int | None = None) -> torch.Tensor:
    """Gradient of the answer loss plus the balance loss, flat."""
    bank.base.training(True)
    batch = collate(rows, bank.base.pad_id)
    with bank.recording(counted=batch.counted, balance=[], dropout_seed=dropout_seed) as tape:
        loss = answer_losses(bank.logits(batch.ids), batch).mean() + torch.stack(tape.balance).sum()
        loss.backward()
    bank.base.training(False)
    return torch.cat([parameter.grad.flatten() for parameter in bank.parameters()])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_usual_targets_are_adapted_and_an_empty_bank_is_the_bare_base(base, architecture):
    loaded = base(architecture)
    assert {name.rpartition(".")[2] for name in loaded.shapes} == USUAL.get(architecture, {"q_proj", "v_proj"})
    ids = torch.tensor([[3, 4, 5, 6]])
    before = loaded.model(input_ids=ids).logits
    bank = Bank(loaded)
    assert torch.equal(bank.logits(ids), before)
    bank.load(mixture(loaded))
    assert not torch.allclose(bank.logits(ids), before)
    bank.load(None)
    assert torch.equal(bank.logits(ids), before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_lowers_the_loss(base, architecture):
    bank = Bank(base(architecture))
    settings = TrainingSettings(local_steps=25, batch_size=4, learning_rate=1e-2)
    start = mixture(bank.base, dropout=0.05)
    weights = [weight.clone() for weight in bank.base.model.state_dict().values()]
    runs = [fit(bank, start, ROWS, settings, seed=0, client="a", round_=0) for _ in range(2)]
    batch = collate(ROWS, bank.base.pad_id)
    losses = []
    for adapter in (start, runs[0].adapter):
        bank.load(adapter)
        losses.append(answer_losses(bank.logits(batch.ids), batch).mean().item())
    assert losses[1] < 0.7 * losses[0]
    bank.load(None)
    after = bank.base.model.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    first, second = (run.adapter.tensors for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_load_and_read_back(base):
    bank = Bank(base())
    adapter = mixture(bank.base)
    bank.load(adapter)
    back = bank.adapter()
    assert set(back.tensors) == set(adapter.tensors)
    assert all(torch.equal(back.tensors[name], adapter.tensors[name]) for name in adapter.tensors)
    with torch.no_grad():
        bank.parameters()[0].zero_()
    assert adapter.tensors[router_key(sorted(bank.base.shapes)[0])].any(), "the bank holds copies"


def test_every_module_may_hold_other_experts(base):
    """The adapted linear of each module is the base's plus exactly its own experts, computed one by one."""
    bank = Bank(base())
    adapter = mixture(bank.base, top_k=2)
    bank.load(adapter)
    assert len({len(layer.experts) for layer in bank.layers.values()}) > 1
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    for name, layer in bank.layers.items():
        t = x @ adapter.tensors[router_key(name)].T
        p = torch.stack([((x @ adapter.tensors[expert_keys(name, i)[0]].T) * t).sum(1) / 2 for i in layer.experts], 1)
        p = F.softmax(p, 1)
        y = layer.base_layer(x)
        for token in range(5):
            top = p[token].topk(2).indices
            for place in top:
                a, b = expert_keys(name, layer.experts[place])
                weight = p[token, place] / p[token, top].sum()
                y[token] += 2 * weight * (adapter.tensors[b] @ (adapter.tensors[a] @ x[token]))
            shared_a, shared_b = adapter.tensors[f"{name}/shared/A"], adapter.tensors[f"{name}/shared/B"]
            y[token] += 2 * shared_b @ (shared_a @ x[token])
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_right_padding_changes_nothing(base, architecture):
    bank = Bank(base(architecture))
    bank.load(mixture(bank.base))
    batch = collate(ROWS, bank.base.pad_id)
    together = answer_losses(bank.logits(batch.ids), batch)
    alone = []
    for row in ROWS:
        single = collate([row], bank.base.pad_id)
        alone.append(answer_losses(bank.logits(single.ids), single))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout_seed", [None, 7])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(base, architecture, dropout_seed):
    found = []
    for checkpointing in (False, True):
        bank = Bank(base(architecture, gradient_checkpointing=checkpointing))
        bank.load(mixture(bank.base, dropout=0.3))
        found.append(gradients(bank, dropout_seed=dropout_seed))
    torch.testing.assert_close(found[0], found[1])


def test_the_balance_loss_has_a_gradient_under_checkpointing(base):
    bank = Bank(base(gradient_checkpointing=True))
    bank.load(mixture(bank.base))
    bank.base.training(True)
    batch = collate(ROWS, bank.base.pad_id)
    with bank.recording(counted=batch.counted, balance=[]) as tape:
        bank.logits(batch.ids)
        assert len(tape.balance) == len(bank.layers)
        torch.stack(tape.balance).sum().backward()
    assert all(layer.down.grad.any() for layer in bank.layers.values())


def test_dropout_masks_belong_to_step_and_module(base):
    bank = Bank(base())
    bank.load(mixture(bank.base, dropout=0.5))
    same, other = gradients(bank, dropout_seed=1), gradients(bank, dropout_seed=2)
    bank.load(mixture(bank.base, dropout=0.5))
    again = gradients(bank, dropout_seed=1)
    assert torch.equal(same, again)
    assert not torch.allclose(same, other)


def test_a_bf16_base_trains_float32_adapters(base):
    bank = Bank(base(dtype="bfloat16"))
    assert bank.base.model.dtype == torch.bfloat16
    settings = TrainingSettings(local_steps=20, batch_size=4, learning_rate=1e-2)
    trained = fit(bank, mixture(bank.base), ROWS, settings, seed=0, client="a", round_=0)
    assert all(tensor.dtype == torch.float32 for tensor in trained.adapter.tensors.values())
    batch = collate(ROWS, bank.base.pad_id)
    assert answer_losses(bank.logits(batch.ids), batch).mean() < 3


def test_mean_embeddings_are_means_over_all_real_tokens(base):
    """The input of the first layer's q is known: hook it and compute W x and A x without padding."""
    bank = Bank(base())
    adapter = mixture(bank.base)
    bank.load(adapter)
    name = next(name for name in sorted(bank.layers) if name.endswith("q_proj"))
    seen = []
    hook = bank.layers[name].base_layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for row in ROWS:
        bank.logits(collate([row], bank.base.pad_id).ids)
    hook.remove()
    x = torch.cat([inputs[0] for inputs in seen])
    assert len(x) == sum(len(prompt) + len(answer) for prompt, answer in ROWS)
    for batch_size in (1, 3):
        means = embed(bank, ROWS, batch_size)[name]
        torch.testing.assert_close(means.token, (x @ adapter.tensors[router_key(name)].T).mean(0))
        for expert in bank.layers[name].experts:
            expected = (x @ adapter.tensors[expert_keys(name, expert)[0]].T).mean(0)
            torch.testing.assert_close(means.experts[expert], expected)


def test_an_adapter_for_other_shapes_is_refused(base):
    bank = Bank(base())
    shapes = {name: (16, 16) for name in bank.base.shapes}
    wrong = Adapter(AdapterSpec(rank=2), new_shared(shapes, 2, torch.Generator()))
    with pytest.raises(BaseModelError, match="another base"):
        bank.load(wrong)
    stranger = Adapter(AdapterSpec(rank=2), new_shared({"nowhere.q": (32, 32)}, 2, torch.Generator()))
    with pytest.raises(BaseModelError, match="nowhere"):
        bank.load(stranger)


def test_collate_predicts_answers_only():
    """Row 0: prompt 5 6, answer 7 0. Row 1: prompt 8, answer 9. Padded to length 4 with 1.

    Logits at position 1 predict 7 and at 2 predict 0; in row 1 (flat offset 4) position 0 predicts 9.
    """
    batch = collate([((5, 6), (7, 0)), ((8,), (9,))], pad_id=1)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [8, 9, 1, 1]]
    assert batch.counted.tolist() == [True] * 4 + [True, True, False, False]
    assert batch.positions.tolist() == [1, 2, 4]
    assert batch.labels.tolist() == [7, 0, 9]
    assert batch.rows.tolist() == [0, 0, 1]
