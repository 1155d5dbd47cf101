"""The engine without HTTP: answers do not depend on the other requests in the batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.errors import BaseModelError
from fedamole.evaluation.generation import generate_answers
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import REFERENCES, Adapter, new_shared
from fedamole.model.prompt import PromptSpec, new_prompt
from fedamole.serving.decode_batch import DecodeBatch, check_batching
from fedamole.serving.engine import InferenceEngine, StoppedError
from fedamole.serving.models import groups_with_same_spec
from fedamole.serving.requests import Chunk, GenerationRequest
from fedamole.serving.sampling import sample_token
from fedamole.serving.scheduling import BusyError, Limits
from tests.training import lora_spec

from ..model.architectures import write_tiny
from ..model.conftest import mixture
from ..model.test_peft import lora

PROMPTS = [(5, 6, 7, 8), (9, 10), tuple(range(20, 35)), (40, 41, 42)]


def prompts_of(base: Base) -> list[Adapter]:
    draws = [torch.Generator().manual_seed(seed) for seed in range(4)]
    return [Adapter(PromptSpec(3), new_prompt(PromptSpec(3), base.width, 0.3, draw)) for draw in draws]


def by_instance(base: Base) -> list[Adapter]:
    """Two experts weighted by how near a prompt is to the client's own."""
    created = []
    for seed in range(4):
        adapter = mixture(base, seed, top_k=1)
        ids = {name: (0, 1) for name in base.shapes}
        draw = torch.Generator().manual_seed(seed)
        tensors = {
            f"{module}/expert-{expert:02d}/{factor}": torch.randn(shape, generator=draw) * 0.2
            for module, experts in ids.items()
            for expert in experts
            for factor, shape in (("A", (4, base.shapes[module][0])), ("B", (base.shapes[module][1], 4)))
        }
        seen = torch.randn(5, base.width, generator=draw)
        created.append(Adapter(replace(lora_spec(adapter.spec), router=InstanceWeights()), tensors, {REFERENCES: seen}))
    return created


KINDS: dict[str, tuple[str, Callable[[Base], list[Adapter]]]] = {
    "llama": ("llama", lambda base: [mixture(base, seed) for seed in range(4)]),
    "gpt2": ("gpt2", lambda base: [mixture(base, seed) for seed in range(4)]),
    "sliding window": ("gemma3_text", lambda base: [mixture(base, seed) for seed in range(4)]),
    "prompts": ("llama", prompts_of),
    "by instance": ("llama", by_instance),
}


@dataclass
class Received:
    """Collects the chunks of an answer; pass it as `on_chunk`."""

    text: str = ""
    finish: str | None = None
    tokens: int = 0

    def __call__(self, chunk: Chunk) -> None:
        self.text, self.finish, self.tokens = self.text + chunk.text, chunk.finish, chunk.tokens


def run_steps(engine: InferenceEngine, max_steps: int = 10_000) -> None:
    """Run the engine in this thread until no request is left."""
    for _ in range(max_steps):
        if not engine.step():
            return


@pytest.fixture(params=KINDS)
def engine(base: Callable[..., Base], request: pytest.FixtureRequest) -> InferenceEngine:
    architecture, adapters = KINDS[request.param]
    bank = Bank(base(architecture))
    return InferenceEngine(bank, adapters(bank.base))


def test_joining_and_leaving_does_not_change_other_answers(engine: InferenceEngine) -> None:
    """Lengths, clients and limits differ; some come when others are half way, one goes away before its end."""
    prompts = [[(*prompt, token) for prompt in PROMPTS] for token in range(50, 54)]
    limits = {(client, turn): 3 + (5 * client + 7 * turn) % 12 for client in range(4) for turn in range(4)}
    received: dict[tuple[int, int], Received] = {}
    order = [(client, turn) for turn in (1, 0, 3, 2) for client in (2, 0, 3, 1)]
    for index, (client, turn) in enumerate(order):
        received[client, turn] = Received()
        expected = GenerationRequest(client, prompts[client][turn], limits[client, turn], stream=bool(index % 2))
        engine.submit(expected, received[client, turn])
        if index % 3 == 0:
            engine.submit(GenerationRequest((client + 1) % 4, (60, 61), 40), Received()).cancel()
        run_steps(engine, index % 4)
    run_steps(engine)
    for (client, turn), answer in received.items():
        alone = generate_answers(engine.bank, only(client, prompts[client][turn]), limits[client, turn], 10_000)
        assert answer.text == alone[client][0], (client, turn)
    assert max(engine.batch_clients) == 4
    assert engine.running == engine.waiting == 0


def only(client: int, prompt: Sequence[int]) -> list[list[tuple[int, ...]]]:
    return [[tuple(prompt)] if index == client else [] for index in range(4)]


@pytest.fixture
def small(base: Callable[..., Base]) -> Callable[..., InferenceEngine]:
    """An engine for two clients on a small Llama."""

    def make(**limits: int) -> InferenceEngine:
        bank = Bank(base("llama"))
        return InferenceEngine(bank, [mixture(bank.base, seed) for seed in range(2)], Limits(**limits))

    return make


def test_the_engine_answers_again_after_a_request_that_fails(small: Callable[..., InferenceEngine]) -> None:
    """An id that the base has no embedding for fails on the device, in the middle of reading."""
    engine, bad, good, other = small(), Received(), Received(), Received()
    engine.submit(GenerationRequest(0, (5, 6), 6), good)
    engine.step()
    engine.submit(GenerationRequest(1, (10**6,), 6), bad)
    run_steps(engine)
    engine.submit(GenerationRequest(1, (5, 6), 6), other)
    run_steps(engine)
    assert bad.finish == "error"
    assert (good.finish, other.finish) == ("length", "length")
    assert [good.text, other.text] == [
        generate_answers(engine.bank, rows, 6, 100)[client][0]
        for client, rows in (
            (0, [[(5, 6)], []]),
            (1, [[], [(5, 6)]]),
        )
    ]


def test_a_model_that_is_no_longer_finite_fails_alone(base: Callable[..., Base]) -> None:
    bank = Bank(base("llama"))
    broken = {name: tensor * float("nan") for name, tensor in mixture(bank.base, 1).tensors.items()}
    engine = InferenceEngine(
        bank, [mixture(bank.base), Adapter(mixture(bank.base, 1).spec, broken), mixture(bank.base)]
    )
    received = [Received() for _ in range(3)]
    for client, answer in enumerate(received):
        engine.submit(GenerationRequest(client, (5, 6), 5, temperature=0.5, seed=1), answer)
    run_steps(engine)
    assert [answer.finish for answer in received] == ["length", "error", "length"]


def test_rows_and_tokens_at_once_are_limited_and_all_are_answered(small: Callable[..., InferenceEngine]) -> None:
    engine, received = small(max_rows=2, max_tokens=40), [Received() for _ in range(6)]
    for index, answer in enumerate(received):
        engine.submit(GenerationRequest(index % 2, (5,) * (100 if index == 3 else 10), 8), answer)
    max_running = 0
    while engine.step():
        max_running = max(max_running, engine.running)
    assert max_running == 2
    assert [answer.finish for answer in received] == ["length"] * 6


def test_a_client_does_not_wait_for_all_requests_of_another(small: Callable[..., InferenceEngine]) -> None:
    engine, many, single = small(max_rows=2), [Received() for _ in range(8)], Received()
    for answer in many:
        engine.submit(GenerationRequest(0, (5, 6), 6), answer)
    engine.submit(GenerationRequest(1, (5, 6), 6), single)
    while single.finish is None:
        engine.step()
    assert sum(answer.finish is not None for answer in many) <= 2


def test_a_full_queue_of_one_client_is_an_error_and_does_not_affect_others(
    small: Callable[..., InferenceEngine],
) -> None:
    engine = small(max_waiting=2)
    for _ in range(2):
        engine.submit(GenerationRequest(0, (5,), 2), Received())
    with pytest.raises(BusyError, match="2 requests"):
        engine.submit(GenerationRequest(0, (5,), 2), Received())
    engine.submit(GenerationRequest(1, (5,), 2), Received())


def test_stopping_ends_all_requests(small: Callable[..., InferenceEngine]) -> None:
    engine, received = small(max_rows=1), [Received(), Received()]
    engine.start()
    for answer in received:
        engine.submit(GenerationRequest(0, (5, 6), 10**6), answer)
    engine.stop()
    assert all(answer.finish in ("error", "length") for answer in received)
    with pytest.raises(StoppedError):
        engine.submit(GenerationRequest(0, (5,), 2), Received())


def test_an_answer_that_ends_by_itself_says_so(small: Callable[..., InferenceEngine]) -> None:
    """The end-of-text token is made one that the model answers with later than at once."""
    engine, received, read_to_end = small(), Received(), Received()
    request = engine.submit(GenerationRequest(0, (5, 6), 8), received)
    run_steps(engine)
    tokenizer = engine.bank.base.tokenizer
    end = next(token for token in request.generated if request.generated.index(token) > 1)
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(end)})
    engine = InferenceEngine(engine.bank, [mixture(engine.bank.base, seed) for seed in range(2)], Limits())
    engine.submit(GenerationRequest(0, (5, 6), 8), read_to_end)
    run_steps(engine)
    before = request.generated[: request.generated.index(end)]
    assert (read_to_end.finish, read_to_end.tokens) == ("stop", len(before))
    assert read_to_end.text == tokenizer.decode(before).strip() != received.text


def test_an_answer_ends_where_the_positions_do(small: Callable[..., InferenceEngine]) -> None:
    """128 positions; a prompt that takes them all is still answered with one token, as in evaluation."""
    engine = small()
    for size, room in ((122, 6), (128, 1)):
        received = Received()
        engine.submit(GenerationRequest(0, tuple(2 + (7 * i) % 300 for i in range(size)), 50), received)
        run_steps(engine)
        assert (received.finish, received.tokens) == ("length", room)
    assert engine.max_new_tokens((1,) * 129, 50) == 0
    short, received = small(max_answer_tokens=3), Received()
    short.submit(GenerationRequest(0, (5, 6), 50), received)
    run_steps(short)
    assert (received.finish, received.tokens) == ("length", 3)


def test_a_seed_draws_the_same_again_and_top_p_keeps_the_likeliest(small: Callable[..., InferenceEngine]) -> None:
    engine = small()

    def answer(**how: Any) -> str:
        received = Received()
        engine.submit(GenerationRequest(0, (5, 6), 12, **how), received)
        run_steps(engine)
        return received.text

    assert answer(temperature=1.0, seed=3) == answer(temperature=1.0, seed=3)
    assert answer(temperature=1.0, seed=3) != answer(temperature=1.0, seed=4)
    assert answer(temperature=1.0, top_p=1e-6) == answer()
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = torch.Generator().manual_seed(0)
    assert {sample_token(logits, 1.0, 0.6, draw) for _ in range(200)} == {0, 1}
    assert {sample_token(logits, 1.0, 1.0, draw) for _ in range(200)} == {0, 1, 2, 3}


def test_loras_of_several_ranks_are_served_together_and_other_kinds_refused(
    base: Callable[..., Base],
) -> None:
    bank, created = Bank(base("llama")), []
    for rank, alpha in ((2, 4.0), (4, 16.0)):
        draw = torch.Generator().manual_seed(rank)
        named = new_shared(bank.base.shapes, rank, draw)
        named = {name: torch.randn(other_adapter.shape, generator=draw) * 0.2 for name, other_adapter in named.items()}
        created.append(Adapter(replace(lora_spec(mixture(bank.base).spec), rank=rank, alpha=alpha), named))
    alone = []
    for adapter in created:
        bank.load([adapter])
        alone.append(generate_answers(bank, [PROMPTS], 8, 10_000)[0])
    ((_, padded),) = groups_with_same_spec(created)
    bank.load(padded)
    assert generate_answers(bank, [PROMPTS, PROMPTS], 8, 10_000) == alone
    assert alone[0] != alone[1]
    groups = groups_with_same_spec([created[0], mixture(bank.base), created[1]])
    assert [indices for indices, _ in groups] == [[0, 2], [1]]


@pytest.mark.parametrize("architecture", ["mamba", "rwkv", "recurrent_gemma", "qwen3_5_text"])
def test_recurrent_and_hybrid_bases_are_refused(architecture: str, tmp_path: Path) -> None:
    """Mamba takes no such cache and answers all prompts alike; others have no keys and values in every layer."""
    changes: dict[str, Any] = {"rescale_every": 0} if architecture == "rwkv" else {}
    write_tiny(tmp_path, architecture, **changes)
    settings = BaseSettings(str(tmp_path), targets=("in_proj",) if architecture == "mamba" else ())
    bank = Bank(load_base(settings, torch.device("cpu"), Path("/")))
    bank.load([lora(bank.base), lora(bank.base, 1)])
    with pytest.raises(BaseModelError, match="keeps state other than keys and values, so requests cannot be batched"):
        InferenceEngine(bank, [lora(bank.base), lora(bank.base, 1)])


def test_a_base_whose_rows_cannot_be_joined_is_refused(
    base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it remembered its last rows in some other way: what is put beside them is lost."""
    bank = Bank(base("llama"))
    bank.load([mixture(bank.base)])
    check_batching(bank)
    merge = DecodeBatch._merge

    def lossy(self: Any, joining: Any, cache: Any, mask: Any, gates: Any) -> None:
        for layer in cache.layers:
            layer.values = layer.values * (0.5 if self.rows else 1.0)
        merge(self, joining, cache, mask, gates)

    monkeypatch.setattr(DecodeBatch, "_merge", lossy)
    with pytest.raises(BaseModelError, match="cannot be batched"):
        check_batching(bank)
