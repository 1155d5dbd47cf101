"""Records survive the wire; anything that is not the record is refused with a PayloadError."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from fedamole.federation.client_state import PrivateState
from fedamole.federation.record import Nothing, PayloadError, non_finite, pack, unpack
from fedamole.model.amole import AdapterSpec, EmbeddingRouter
from fedamole.model.mixer import InstanceWeights, LearnedRouter
from fedamole.model.params import Adapter
from fedamole.model.prompt import PromptSpec


@dataclass(frozen=True)
class Inner:
    tensors: Mapping[str, Tensor]
    scale: float


@dataclass(frozen=True)
class Sample:
    tensors: Mapping[str, Tensor]
    others: Mapping[str, Tensor]
    held: dict[str, dict[str, list[int]]]
    inner: Inner
    note: str
    maybe: int | None
    nested: Mapping[str, Mapping[str, Tensor]]
    deep: Mapping[str, Mapping[str, Mapping[str, Tensor]]]
    spare: Inner | None = None


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
KEYS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, Tensor]:
    table = {}
    for key in draw(st.lists(KEYS, max_size=4, unique=True)):
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        table[key] = (100 * torch.rand(shape, generator=generator)).to(draw(st.sampled_from(DTYPES)))
    return table


inners = st.builds(Inner, tables(), st.floats(allow_nan=False))
held = st.dictionaries(KEYS, st.dictionaries(KEYS, st.lists(st.integers(0, 99)), max_size=3), max_size=3)
nested = st.dictionaries(KEYS, tables(), max_size=3)
samples = st.builds(
    Sample,
    tables(),
    tables(),
    held,
    inners,
    st.text(st.characters(codec="utf-8")),
    st.none() | st.integers(),
    nested,
    st.dictionaries(KEYS, nested, max_size=2),
    st.none() | inners,
)


def same(first: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(first) == set(other) and all(
        first[key].dtype == other[key].dtype
        and first[key].shape == other[key].shape
        and torch.equal(first[key], other[key])
        for key in first
    )


def same_nested(first: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return first.keys() == other.keys() and all(same(first[key], other[key]) for key in first)


relaxed = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])


@relaxed
@given(samples)
def test_round_trip(record: Sample) -> None:
    again = unpack(Sample, pack(record))
    assert same(again.tensors, record.tensors)
    assert same(again.others, record.others)
    assert same(again.inner.tensors, record.inner.tensors)
    assert same_nested(again.nested, record.nested)
    assert again.deep.keys() == record.deep.keys()
    assert all(same_nested(again.deep[key], record.deep[key]) for key in again.deep)
    assert (again.held, again.note, again.maybe, again.inner.scale) == (
        record.held,
        record.note,
        record.maybe,
        record.inner.scale,
    )
    assert (again.spare is None) == (record.spare is None)
    if record.spare is not None and again.spare is not None:
        assert same(again.spare.tensors, record.spare.tensors)


def sample() -> Sample:
    tensors = {"m/x": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3, dtype=torch.bfloat16)}
    nested = {"b": {"x": torch.ones(2)}, "a:b/c": {"x": torch.zeros(1), "y:z": torch.ones(1)}, "empty": {}}
    return Sample(
        tensors, {}, {"m": {"a": [1, 2]}}, Inner({}, 2.0), "note", None, nested, {"k": {"n": {"x": torch.ones(1)}}}
    )


@relaxed
@given(st.integers(0, len(pack(sample())) - 1))
def test_truncated_bytes_are_refused(length: int) -> None:
    with pytest.raises(PayloadError, match="Sample"):
        unpack(Sample, pack(sample())[:length])


@relaxed
@given(st.integers(0, len(pack(sample())) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_only_changes_values(position: int, flip: int) -> None:
    """There is no checksum on the wire: a changed number goes through, but never another structure or error."""
    payload = bytearray(pack(sample()))
    payload[position] ^= flip
    try:
        again = unpack(Sample, bytes(payload))
    except PayloadError:
        return
    assert isinstance(again.tensors, dict)
    assert isinstance(again.inner, Inner)
    for inner in (*again.nested.values(), *(part for parts in again.deep.values() for part in parts.values())):
        assert isinstance(inner, dict)
        assert all(isinstance(tensor, Tensor) for tensor in inner.values())


@relaxed
@given(st.binary(max_size=200))
def test_any_other_bytes_are_refused(payload: bytes) -> None:
    with pytest.raises(PayloadError):
        unpack(Sample, payload)


def test_the_wrong_kind_is_named() -> None:
    with pytest.raises(PayloadError, match="expected a Nothing, got a Sample"):
        unpack(Nothing, pack(sample()))
    with pytest.raises(PayloadError, match="expected a Sample, got a Nothing"):
        unpack(Sample, pack(Nothing()))


def crafted(name: str, fields: object) -> bytes:
    return save({"x": torch.zeros(1)}, {"record": json.dumps([name, fields])})


GOOD: dict[str, object] = {
    "held": {},
    "inner": {"scale": 1.0},
    "note": "n",
    "maybe": 3,
    "spare": None,
    "nested": {"a": {}},
    "deep": {"a": {"b": {}}},
}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"note": 3}, "note: int where"),
        ({"held": [1]}, "held: list where"),
        ({"maybe": "three"}, "maybe: str where"),
        ({"maybe": True}, "maybe: bool where"),
        ({"inner": {"scale": False}}, "inner.scale: bool where"),
        ({"inner": None}, "inner: NoneType where"),
        ({"inner": {"scale": "x"}}, "inner.scale: str where"),
        ({"inner": {}}, "Inner: expected the fields"),
        ({"more": 1}, "Sample: expected the fields"),
        ({"tensors": {}}, "Sample: expected the fields"),
        ({"nested": None}, "nested: NoneType where a mapping"),
        ({"nested": ["a"]}, "nested: list where a mapping"),
        ({"nested": {"a": {"b": {}}}}, "nested: nested too deeply"),
        ({"nested": {"a": ["b"]}}, "nested: nested too deeply"),
        ({"deep": {"a": None}}, "deep: NoneType where a mapping"),
        ({"deep": {"a": {"b": {"c": {}}}}}, "deep: nested too deeply"),
        ({"spare": {"scale": 1.0, "more": 2}}, "Inner: expected the fields"),
    ],
)
def test_fields_of_the_wrong_type_are_named(change: dict[str, object], what: str) -> None:
    assert unpack(Sample, crafted("Sample", GOOD)).note == "n"
    with pytest.raises(PayloadError, match=what):
        unpack(Sample, crafted("Sample", {**GOOD, **change}))


@pytest.mark.parametrize("fields", [None, [], "text", 3, {}])
def test_fields_that_are_no_table_are_refused(fields: object) -> None:
    with pytest.raises(PayloadError):
        unpack(Sample, crafted("Sample", fields))


def test_safetensors_without_a_record_are_refused() -> None:
    with pytest.raises(PayloadError):
        unpack(Sample, save({"x": torch.zeros(1)}))


def test_views_are_packed_as_what_they_show() -> None:
    """Rows and transposes of one tensor share storage; the bytes hold each alone."""
    matrix = torch.arange(12.0).reshape(3, 4)
    record = Sample({"row": matrix[1], "turned": matrix[2:].T}, {}, {}, Inner({}, 1.0), "", 1, {}, {})
    again = unpack(Sample, pack(record))
    assert again.tensors["row"].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert again.tensors["turned"].tolist() == [[8.0], [9.0], [10.0], [11.0]]
    again.tensors["row"].zero_()
    assert matrix[1, 0] == 4.0


def test_the_first_tensor_that_is_not_finite_is_named() -> None:
    assert non_finite(sample()) is None
    bad = Inner({"good": torch.ones(2), "bad": torch.tensor([1.0, float("nan")])}, 1.0)
    assert non_finite(bad) == "tensors:bad"
    assert non_finite(Inner({"huge": torch.tensor([float("inf")])}, 1.0)) == "tensors:huge"
    assert non_finite(Sample({}, {}, {}, bad, "", None, {}, {})) == "inner.tensors:bad"
    good = Inner({}, 1.0)
    assert non_finite(Sample({}, {}, {}, good, "", None, {"north": bad.tensors}, {})) == "nested:north/bad"
    assert non_finite(Sample({}, {}, {}, good, "", None, {}, {"m": {"north": bad.tensors}})) == "deep:m/north/bad"


def test_a_private_state_with_and_without_an_adapter() -> None:
    spec = AdapterSpec(rank=3, dropout=0.25, dropout_kind="rank")
    kept = {"record": torch.frombuffer(bytearray(b"bytes"), dtype=torch.uint8)}
    again = unpack(PrivateState, pack(PrivateState(kept, Adapter(spec, {"m/shared/A": torch.ones(3, 2)}))))
    assert again.trained is not None
    assert again.trained.spec == spec
    assert again.client_state["record"].numpy().tobytes() == b"bytes"
    assert unpack(PrivateState, pack(PrivateState(kept, None))).trained is None


ROUTERS = (EmbeddingRouter(), LearnedRouter(extra_own_logits=True), InstanceWeights(0.25))


@pytest.mark.parametrize("spec", [*(AdapterSpec(rank=3, router=router) for router in ROUTERS), PromptSpec(5, mlp=True)])
def test_a_field_of_several_record_kinds_comes_back_as_its_own(spec: AdapterSpec | PromptSpec) -> None:
    adapter = Adapter(spec, {"m/shared/A": torch.ones(3, 2)}, {"m/delta": torch.zeros(2, 2)}, ("m/shared/A",))
    again = unpack(Adapter, pack(adapter))
    assert again.spec == spec
    assert type(again.spec) is type(spec)
    assert again.frozen == ("m/shared/A",)
    assert again.kind() == adapter.kind()
    assert same(again.tensors, adapter.tensors)
    assert same(again.fixed, adapter.fixed)


@dataclass(frozen=True)
class Flat:
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Nested:
    tensors: Mapping[str, Mapping[str, Tensor]]


def test_nesting_costs_no_more_bytes_than_names_with_a_prefix() -> None:
    clients = [f"client-number-{i:03d}" for i in range(20)]
    keys = [f"layers.{i}.q_proj/shared/A" for i in range(10)]
    flat = Flat({f"{client}/{key}": torch.zeros(8, 16) for client in clients for key in keys})
    nested = Nested({client: {key: torch.zeros(8, 16) for key in keys} for client in clients})
    numbers = 4 * 8 * 16 * len(clients) * len(keys)
    assert numbers < len(pack(nested)) < len(pack(flat))


def test_an_inner_mapping_without_tensors_survives() -> None:
    again = unpack(Nested, pack(Nested({"north": {}, "south": {"x": torch.ones(1)}})))
    assert again.tensors["north"] == {}
    assert set(again.tensors) == {"north", "south"}


def test_tensors_of_an_outer_key_that_is_not_listed_are_not_read() -> None:
    """The index 1 has no key; the tensor is in no field, so nothing of it reaches the receiver."""
    fields = json.dumps(["Nested", {"tensors": {"north": {}}}])
    payload = save({"tensors.0:x": torch.ones(1), "tensors.1:y": torch.ones(1)}, {"record": fields})
    again = unpack(Nested, payload)
    assert {key: set(inner) for key, inner in again.tensors.items()} == {"north": {"x"}}


def test_deep_json_is_refused() -> None:
    text = '["Nested", {"tensors": ' + '{"a": ' * 100_000 + "{}" + "}" * 100_002 + "]"
    with pytest.raises(PayloadError):
        unpack(Nested, save({"x": torch.zeros(1)}, {"record": text}))
