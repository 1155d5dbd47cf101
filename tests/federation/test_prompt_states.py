"""What the server reads of public prompts: hidden states and logits as transformers computes them, and its counts."""

from collections.abc import Callable

import pytest
import torch
from tests.model.conftest import base, folder  # noqa: F401 - fixtures

from fedamole.federation.prompt_states import prompt_states
from fedamole.federation.server_work import ServerWork
from fedamole.federation.settings import TrainingSettings
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base
from fedamole.model.params import Adapter, layers_of, new_shared

PROMPTS = [(3, 4, 5), (6, 7), (8, 9, 10, 11)]


@pytest.fixture
def loaded(base: Callable[[], Base]) -> Base:  # noqa: F811
    return base()


def lora(loaded: Base) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    tensors = new_shared(loaded.shapes, 2, generator)
    return Adapter(
        AdapterSpec(2, 4.0), {name: torch.randn(it.shape, generator=generator) for name, it in tensors.items()}
    )


def test_states_are_those_of_transformers(loaded: Base) -> None:
    """Without an adapter, prompt by prompt, shortest first; the last layer's states come before the final norm."""
    result = prompt_states(Bank(loaded), None, PROMPTS, 4096)
    layers = len(layers_of(loaded.shapes))
    assert result.layers.shape == (layers, 3, loaded.width)
    for i, prompt in enumerate(sorted(PROMPTS, key=len)):
        with torch.no_grad():
            out = loaded.model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        assert torch.allclose(result.logits[i], out.logits[0, -1], atol=1e-4)
        for layer in range(layers - 1):
            assert torch.allclose(result.layers[layer, i], out.hidden_states[layer + 1][0, -1], atol=1e-4)
        norm = loaded.model.get_submodule("model.norm")
        assert torch.allclose(norm(result.layers[-1, i]), out.hidden_states[-1][0, -1], atol=1e-4)


def test_an_adapter_changes_them_and_small_batches_do_not(loaded: Base) -> None:
    bank = Bank(loaded)
    untuned, tuned = prompt_states(bank, None, PROMPTS, 4096), prompt_states(bank, lora(loaded), PROMPTS, 4096)
    assert not torch.allclose(untuned.layers[0], tuned.layers[0], atol=1e-3)
    one_by_one = prompt_states(bank, lora(loaded), PROMPTS, 1)
    assert torch.allclose(one_by_one.layers, tuned.layers, atol=1e-4)
    assert torch.allclose(one_by_one.logits, tuned.logits, atol=1e-4)


def test_the_server_counts_what_it_reads(loaded: Base) -> None:
    """3 + 2 + 4 tokens, and one more for each place of an answer; no hook stays behind."""
    work = ServerWork(Bank(loaded), TrainingSettings(), 4096, 0)
    work.read(None, PROMPTS)
    report = work.report()
    assert (report["probed"], report["forward_tokens"], report["steps"]) == (3, 12, 0)
    layer = loaded.model.get_submodule(layers_of(loaded.shapes)[0])
    assert not layer._forward_hooks
