"""pFedHR: what the server builds and sends, how a client follows its teacher, and whose layers a teacher has."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.methods.bundled_rounds import BundledRounds
from tests.methods.by_hand import client, driven, full
from torch import Tensor

from fedamole.data.tokens import TokenRow
from fedamole.errors import ConfigError
from fedamole.experiment import public_rows, server_of
from fedamole.federation.distillation import Distillation
from fedamole.federation.method import BaseInfo, ClientInfo, Server
from fedamole.federation.prompt_states import PromptStates
from fedamole.federation.server_work import ServerWork
from fedamole.methods.local_only import OwnLora
from fedamole.methods.pfedhr import PFedHr, ReassemblyState
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter, shared_keys

SHAPES = {"m.0.q": (2, 2), "m.1.q": (2, 2)}
KEYS = [key for module in SHAPES for key in shared_keys(module)]
PROMPTS = tuple(TokenRow((i,), (), ()) for i in range(4))


def lora(*layers: float) -> dict[str, Tensor]:
    """A LoRA of rank 1 with one value in each layer."""
    a, b = zip(*map(shared_keys, SHAPES), strict=True)
    return {
        **{name: full(value, 1, 2) for name, value in zip(a, layers, strict=True)},
        **{name: full(value, 2, 1) for name, value in zip(b, layers, strict=True)},
    }


def values(tensors: Any) -> list[float]:
    """The value of each layer."""
    return [float(tensors[shared_keys(module)[0]][0, 0]) for module in SHAPES]


class Signs(ServerWork):
    """Layers compute one of two things, by the sign of their value; logits are (1, sum of the values)."""

    def __init__(self) -> None:
        self.prompts: list[Sequence[Ids]] = []

    def read(self, adapter: Adapter | None, prompts: Sequence[Ids]) -> PromptStates:
        assert adapter is not None
        self.prompts.append(prompts)
        patterns = {True: [1.0, -1.0, 0.0, 0.0], False: [0.0, 0.0, 1.0, -1.0]}
        layers = values(adapter.tensors)
        states = torch.tensor([patterns[value > 0][: len(prompts)] for value in layers]).unsqueeze(2)
        return PromptStates(states, torch.tensor([[1.0, sum(layers)]]).repeat(len(prompts), 1))


def server(work: ServerWork, round_: int = 0) -> Server:
    clients = tuple(ClientInfo(name, 1) for name in "abcd")
    return Server(BaseInfo(SHAPES, 1), clients, 0, round_, work=work, public=PROMPTS)


def test_a_teacher_by_hand() -> None:
    """a has layers (1, 2), b (3, 4), c (-5, 6) and d (-7, -8).

    The group of a's layer 0 has b alone, that of its layer 1 b and c. Candidates of a are (3, 4) and (3, 6), whose sums
    are 7 and 9: nearer to 1 + 2 is 7. The group of c's layer 0 has d alone, that of its layer 1 a and b: -7 + 2 = -5 or
    -7 + 4 = -3, and c's own sum is 1. Of d's layer 1 there is no other, so that anybody may be the donor.
    """
    method, work = PFedHr(rank=1, candidates=20), Signs()
    replies = {"a": lora(1, 2), "b": lora(3, 4), "c": lora(-5, 6), "d": lora(-7, -8)}
    state = method.aggregate(
        server(work), method.init(server(work)), {name: SharedTensors(it) for name, it in replies.items()}
    )
    assert state.donors["a"] == ["b", "b"]
    assert state.donors["c"] == ["d", "b"]
    assert state.donors["d"] == ["c", "a"], "-5 + 2 is the lowest sum, and d's own is -15"
    assert values(method.message(state, ClientInfo("a", 1)).tensors) == [3, 4]
    assert values(method.message(state, ClientInfo("c", 1)).tensors) == [-7, 4]
    assert values(method.message(state, ClientInfo("d", 1)).tensors) == [-5, 2]
    assert method.message(state, ClientInfo("new", 1)).tensors == {}


def test_clients_that_do_not_answer_stay_in_the_state_and_one_alone_has_no_teacher() -> None:
    method, work = PFedHr(rank=1), Signs()
    alone = method.aggregate(server(work), method.init(server(work)), {"a": SharedTensors(lora(1, 2))})
    assert (alone.donors, set(alone.loras), work.prompts) == ({}, {"a"}, [])
    both = method.aggregate(server(work, 1), alone, {"b": SharedTensors(lora(3, 4))})
    assert both.donors == {"a": ["b", "b"], "b": ["a", "a"]}


def test_a_draw_of_the_prompts_is_read_in_every_round() -> None:
    method, work = PFedHr(rank=1, public_prompts=3), Signs()
    state = ReassemblyState({"a": lora(1, 2), "b": lora(3, 4)}, {})
    for round_ in (0, 1):
        method.aggregate(server(work, round_), state, {})
    assert {len(prompts) for prompts in work.prompts} == {3}
    assert all(prompts == work.prompts[0] for prompts in work.prompts)
    assert set(work.prompts[0]) < {row.prompt for row in PROMPTS}


def test_a_client_goes_on_from_its_own_lora_and_follows_the_teacher() -> None:
    method = PFedHr(rank=1, kl_weight=0.3)
    for teacher in ({}, lora(7, 8)):
        (asked,), (kept, reply, _) = driven(
            method.update(client(SHAPES), OwnLora(lora(1, 2)), SharedTensors(teacher)), lora(3, 4)
        )
        assert values(asked.adapter.tensors) == [1, 2]
        assert (values(kept.tensors), values(reply.tensors)) == ([3, 4], [3, 4])
        if teacher:
            assert values(asked.teacher.tensors) == [7, 8]  # type: ignore[union-attr]
            assert asked.distillation == Distillation(0.3)
        else:
            assert (asked.teacher, asked.distillation) == (None, None), "the first round is local training"


def test_others_are_told_whose_layers_are_sent() -> None:
    assert any("layers of single other clients' LoRAs" in sentence for sentence in PFedHr().exposes(4, None))


@pytest.mark.parametrize(
    ("key", "value"),
    [("kl_weight", -0.1), ("kl_weight", 1.1), ("layer_groups", 0), ("candidates", 0), ("public_prompts", 2)],
)
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key} = {value}: must be at least "):
        PFedHr(**{key: value})  # type: ignore[arg-type]


# --- on the bundled base --------------------------------------------------------------------------------------

PAIRS = ("hospital_north", "hospital_south", "weather_coast", "weather_hills")


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> BundledRounds:
    return BundledRounds(tmp_path_factory.mktemp("rounds"), PAIRS)


def related_share(bundled: BundledRounds, loras: Any, method: PFedHr) -> float:
    """The share of layers that come from the client of the same domain, over two draws of candidates."""
    config, base = bundled.config("pfedhr", 1), bundled.prepared.base
    public = public_rows(config, base, None)
    assert public is not None
    server = server_of(config, base, [ClientInfo(name, 1) for name in PAIRS], bundled.bank, public.rows)
    related = list[bool]()
    for round_ in range(2):
        state = method.aggregate(replace(server, round=round_), ReassemblyState(loras, {}), {})
        related += [donor.split("_")[0] == name.split("_")[0] for name, each in state.donors.items() for donor in each]
    return sum(related) / len(related)


def test_teachers_come_from_related_clients(bundled: BundledRounds) -> None:
    """What the mechanism is for. Two hospitals and two weather stations; of the other three clients one is related."""
    state, _ = bundled.train("pfedhr", "training.local_steps=40", rounds=1)
    method = PFedHr(public_prompts=24)
    chosen = related_share(bundled, state.loras, method)
    drawn = related_share(bundled, state.loras, replace(method, layer_groups=1, candidates=1))
    print(f"related layers: {chosen:.2f} of a teacher, {drawn:.2f} of a random candidate")
    assert chosen >= 0.6
    assert chosen > drawn + 0.15


def test_a_round_with_teachers_trains_with_them_and_the_servers_reading_is_counted(bundled: BundledRounds) -> None:
    overrides = ("training.local_steps=4", "method.public_prompts=4", "method.candidates=1")
    with_teacher, _ = bundled.train("pfedhr", *overrides, "method.kl_weight=0.9", rounds=2)
    without, _ = bundled.train("pfedhr", *overrides, "method.kl_weight=0.0", rounds=2)
    assert all(len(donors) == 4 for donors in with_teacher.donors.values())
    for name in PAIRS:
        assert name not in with_teacher.donors[name], "no client is its own donor"
        differ = [
            not torch.equal(with_teacher.loras[name][key], without.loras[name][key]) for key in without.loras[name]
        ]
        assert all(differ)
