"""The engine by itself: whoever joins or leaves while others are under way changes nobody's answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamole.errors import BaseModelError, ConfigError
from fedamole.evaluation.generation import generate_answers
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import REFERENCES, Adapter, new_shared
from fedamole.model.prompt import PromptSpec, new_prompt
from fedamole.serving.decode_batch import Running, check
from fedamole.serving.engine import Engine, Piece, StoppedError, Wanted, drawn
from fedamole.serving.models import alike
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
    made = []
    for seed in range(4):
        one = mixture(base, seed, top_k=1)
        ids = {name: (0, 1) for name in base.shapes}
        draw = torch.Generator().manual_seed(seed)
        tensors = {
            f"{module}/expert-{expert:02d}/{factor}": torch.randn(shape, generator=draw) * 0.2
            for module, experts in ids.items()
            for expert in experts
            for factor, shape in (("A", (4, base.shapes[module][0])), ("B", (base.shapes[module][1], 4)))
        }
        seen = torch.randn(5, base.width, generator=draw)
        made.append(Adapter(replace(lora_spec(one.spec), router=InstanceWeights()), tensors, {REFERENCES: seen}))
    return made


KINDS: dict[str, tuple[str, Callable[[Base], list[Adapter]]]] = {
    "llama": ("llama", lambda base: [mixture(base, seed) for seed in range(4)]),
    "gpt2": ("gpt2", lambda base: [mixture(base, seed) for seed in range(4)]),
    "sliding window": ("gemma3_text", lambda base: [mixture(base, seed) for seed in range(4)]),
    "prompts": ("llama", prompts_of),
    "by instance": ("llama", by_instance),
}


@dataclass
class Told:
    """What an answer was told to be."""

    text: str = ""
    finish: str | None = None
    tokens: int = 0

    def __call__(self, piece: Piece) -> None:
        self.text, self.finish, self.tokens = self.text + piece.text, piece.finish, piece.tokens


def work_off(engine: Engine, upto: int = 10_000) -> None:
    """The engine's own turns, in this thread."""
    for _ in range(upto):
        if not engine.turn():
            return


@pytest.fixture(params=KINDS)
def engine(base: Callable[..., Base], request: pytest.FixtureRequest) -> Engine:
    architecture, adapters = KINDS[request.param]
    bank = Bank(base(architecture))
    return Engine(bank, adapters(bank.base))


def test_joining_and_leaving_changes_nobodys_answer(engine: Engine) -> None:
    """Lengths, clients and limits differ; some come when others are half way, one goes away before its end."""
    prompts = [[(*prompt, place) for prompt in PROMPTS] for place in range(50, 54)]
    limits = {(client, turn): 3 + (5 * client + 7 * turn) % 12 for client in range(4) for turn in range(4)}
    told: dict[tuple[int, int], Told] = {}
    order = [(client, turn) for turn in (1, 0, 3, 2) for client in (2, 0, 3, 1)]
    for place, (client, turn) in enumerate(order):
        told[client, turn] = Told()
        wanted = Wanted(client, prompts[client][turn], limits[client, turn], pieces=bool(place % 2))
        engine.submit(wanted, told[client, turn])
        if place % 3 == 0:
            engine.submit(Wanted((client + 1) % 4, (60, 61), 40), Told()).leave()
        work_off(engine, place % 4)
    work_off(engine)
    for (client, turn), answer in told.items():
        alone = generate_answers(engine.bank, only(client, prompts[client][turn]), limits[client, turn], 10_000)
        assert answer.text == alone[client][0], (client, turn)
    assert max(engine.together) == 4
    assert engine.under_way == engine.waiting == 0


def only(client: int, prompt: Sequence[int]) -> list[list[tuple[int, ...]]]:
    return [[tuple(prompt)] if place == client else [] for place in range(4)]


@pytest.fixture
def small(base: Callable[..., Base]) -> Callable[..., Engine]:
    """An engine for two clients on a small Llama."""

    def make(**limits: int) -> Engine:
        bank = Bank(base("llama"))
        return Engine(bank, [mixture(bank.base, seed) for seed in range(2)], Limits(**limits))

    return make


def test_the_engine_answers_again_after_a_request_that_fails(small: Callable[..., Engine]) -> None:
    """An id that the base has no embedding for fails on the device, in the middle of reading."""
    engine, bad, good, other = small(), Told(), Told(), Told()
    engine.submit(Wanted(0, (5, 6), 6), good)
    engine.turn()
    engine.submit(Wanted(1, (10**6,), 6), bad)
    work_off(engine)
    engine.submit(Wanted(1, (5, 6), 6), other)
    work_off(engine)
    assert bad.finish == "error"
    assert (good.finish, other.finish) == ("length", "length")
    assert [good.text, other.text] == [
        generate_answers(engine.bank, rows, 6, 100)[place][0]
        for place, rows in (
            (0, [[(5, 6)], []]),
            (1, [[], [(5, 6)]]),
        )
    ]


def test_a_model_that_is_no_longer_finite_fails_alone(base: Callable[..., Base]) -> None:
    bank = Bank(base("llama"))
    broken = {name: tensor * float("nan") for name, tensor in mixture(bank.base, 1).tensors.items()}
    engine = Engine(bank, [mixture(bank.base), Adapter(mixture(bank.base, 1).spec, broken), mixture(bank.base)])
    told = [Told() for _ in range(3)]
    for client, answer in enumerate(told):
        engine.submit(Wanted(client, (5, 6), 5, temperature=0.5, seed=1), answer)
    work_off(engine)
    assert [answer.finish for answer in told] == ["length", "error", "length"]


def test_rows_and_tokens_at_once_are_limited_and_all_are_answered(small: Callable[..., Engine]) -> None:
    engine, told = small(rows=2, tokens=40), [Told() for _ in range(6)]
    for place, answer in enumerate(told):
        engine.submit(Wanted(place % 2, (5,) * (100 if place == 3 else 10), 8), answer)
    most = 0
    while engine.turn():
        most = max(most, engine.under_way)
    assert most == 2
    assert [answer.finish for answer in told] == ["length"] * 6


def test_nobody_waits_behind_all_requests_of_somebody_else(small: Callable[..., Engine]) -> None:
    engine, many, one = small(rows=2), [Told() for _ in range(8)], Told()
    for answer in many:
        engine.submit(Wanted(0, (5, 6), 6), answer)
    engine.submit(Wanted(1, (5, 6), 6), one)
    while one.finish is None:
        engine.turn()
    assert sum(answer.finish is not None for answer in many) <= 2


def test_who_finds_no_room_to_wait_is_told_and_others_still_do(small: Callable[..., Engine]) -> None:
    engine = small(waiting=2)
    for _ in range(2):
        engine.submit(Wanted(0, (5,), 2), Told())
    with pytest.raises(BusyError, match="2 requests"):
        engine.submit(Wanted(0, (5,), 2), Told())
    engine.submit(Wanted(1, (5,), 2), Told())


def test_stopping_tells_everybody(small: Callable[..., Engine]) -> None:
    engine, told = small(rows=1), [Told(), Told()]
    engine.start()
    for answer in told:
        engine.submit(Wanted(0, (5, 6), 10**6), answer)
    engine.stop()
    assert all(answer.finish in ("error", "length") for answer in told)
    with pytest.raises(StoppedError):
        engine.submit(Wanted(0, (5,), 2), Told())


def test_an_answer_that_ends_by_itself_says_so(small: Callable[..., Engine]) -> None:
    """The end-of-text token is made one that the model answers with later than at once."""
    engine, whole, ended = small(), Told(), Told()
    request = engine.submit(Wanted(0, (5, 6), 8), whole)
    work_off(engine)
    tokenizer = engine.bank.base.tokenizer
    end = next(token for token in request.made if request.made.index(token) > 1)
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(end)})
    engine.submit(Wanted(0, (5, 6), 8), ended)
    work_off(engine)
    before = request.made[: request.made.index(end)]
    assert (ended.finish, ended.tokens) == ("stop", len(before))
    assert ended.text == tokenizer.decode(before).strip() != whole.text


def test_an_answer_ends_where_the_positions_do(small: Callable[..., Engine]) -> None:
    """128 positions; a prompt that takes them all is still answered with one token, as in evaluation."""
    engine = small()
    for size, room in ((122, 6), (128, 1)):
        told = Told()
        engine.submit(Wanted(0, tuple(2 + (7 * i) % 300 for i in range(size)), 50), told)
        work_off(engine)
        assert (told.finish, told.tokens) == ("length", room)
    assert engine.room((1,) * 129) == 0
    short, told = small(answer=3), Told()
    short.submit(Wanted(0, (5, 6), 50), told)
    work_off(short)
    assert (told.finish, told.tokens) == ("length", 3)


def test_a_seed_draws_the_same_again_and_top_p_keeps_the_likeliest(small: Callable[..., Engine]) -> None:
    engine = small()

    def answer(**how: Any) -> str:
        told = Told()
        engine.submit(Wanted(0, (5, 6), 12, **how), told)
        work_off(engine)
        return told.text

    assert answer(temperature=1.0, seed=3) == answer(temperature=1.0, seed=3)
    assert answer(temperature=1.0, seed=3) != answer(temperature=1.0, seed=4)
    assert answer(temperature=1.0, top_p=1e-6) == answer()
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draw = torch.Generator().manual_seed(0)
    assert {drawn(logits, 1.0, 0.6, draw) for _ in range(200)} == {0, 1}
    assert {drawn(logits, 1.0, 1.0, draw) for _ in range(200)} == {0, 1, 2, 3}


def test_loras_of_several_ranks_are_served_together_and_other_kinds_refused(
    base: Callable[..., Base],
) -> None:
    bank, made = Bank(base("llama")), []
    for rank, alpha in ((2, 4.0), (4, 16.0)):
        draw = torch.Generator().manual_seed(rank)
        named = new_shared(bank.base.shapes, rank, draw)
        named = {name: torch.randn(one.shape, generator=draw) * 0.2 for name, one in named.items()}
        made.append(Adapter(replace(lora_spec(mixture(bank.base).spec), rank=rank, alpha=alpha), named))
    alone = []
    for adapter in made:
        bank.load([adapter])
        alone.append(generate_answers(bank, [PROMPTS], 8, 10_000)[0])
    bank.load(alike(made, "ab"))
    assert generate_answers(bank, [PROMPTS, PROMPTS], 8, 10_000) == alone
    assert alone[0] != alone[1]
    with pytest.raises(ConfigError, match="a and b are of different kinds"):
        alike([made[0], mixture(bank.base)], "ab")


@pytest.mark.parametrize("architecture", ["mamba", "rwkv", "recurrent_gemma", "qwen3_5_text"])
def test_recurrent_and_hybrid_bases_are_refused(architecture: str, tmp_path: Path) -> None:
    """Mamba takes no such cache and answers all prompts alike; others have no keys and values in every layer."""
    changes: dict[str, Any] = {"rescale_every": 0} if architecture == "rwkv" else {}
    write_tiny(tmp_path, architecture, **changes)
    settings = BaseSettings(str(tmp_path), targets=("in_proj",) if architecture == "mamba" else ())
    bank = Bank(load_base(settings, torch.device("cpu"), Path("/")))
    bank.load([lora(bank.base), lora(bank.base, 1)])
    with pytest.raises(BaseModelError, match="remembers more of a text than keys and values, so requests cannot be ba"):
        Engine(bank, [lora(bank.base), lora(bank.base, 1)])


def test_a_base_whose_rows_cannot_be_joined_is_refused(
    base: Callable[..., Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if it remembered its last rows in some other way: what is put beside them is lost."""
    bank = Bank(base("llama"))
    bank.load([mixture(bank.base)])
    check(bank)
    whole = Running._merge

    def lossy(self: Any, joining: Any, cache: Any, mask: Any, gates: Any) -> None:
        for layer in cache.layers:
            layer.values = layer.values * (0.5 if self.rows else 1.0)
        whole(self, joining, cache, mask, gates)

    monkeypatch.setattr(Running, "_merge", lossy)
    with pytest.raises(BaseModelError, match="cannot be batched"):
        check(bank)
