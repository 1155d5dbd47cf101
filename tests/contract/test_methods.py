"""Every contract over every method of the registry: a new method is held to all of them by its registry line."""

import dataclasses
import inspect
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from tests.made_texts import NumberedTexts
from tests.training import lora_spec

from fedamole.config import load_config
from fedamole.engine.in_process import InProcess
from fedamole.errors import ConfigError
from fedamole.experiment import Prepared, loop_of, prepare, resume, server_of, worker_of
from fedamole.federation.local import LocalTask, embed, fit
from fedamole.federation.method import BaseInfo, Client, Method, Request, Server, TrainingRequest, TrainingResult
from fedamole.federation.probe import ClientProbe, ProbeCounts
from fedamole.federation.progress import ProgressListener
from fedamole.federation.randomness import seeded_key
from fedamole.federation.record import pack, unpack
from fedamole.federation.server_work import ServerWork
from fedamole.federation.worker import RUN, UpdateResult
from fedamole.federation.written_rows import ClientDataEngine
from fedamole.methods import METHODS
from fedamole.model.bank import Bank
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter, expert_ids
from fedamole.runs.run_folder import RunFolder
from fedamole.synthesis.outline import ClientOutline

VARIANTS = sorted(name for name in METHODS if name.endswith("_ft"))
"""The training of another method, scored before the aggregation."""
Some = Method[Any, Any, Any, Any]
every_method = pytest.mark.parametrize("name", sorted(METHODS))
every_training = pytest.mark.parametrize("name", sorted({*METHODS} - {*VARIANTS} | {"fedit_ft"}))
"""For tests that take longer: methods that differ in more than the moment of scoring, and one that does not."""
CHOICES: dict[str, tuple[str, dict[str, str]]] = {"fedmap-icnn": ("fedmap", {"prior": "icnn"})}
"""Settings that give a method other records or another training: the method and its settings, by a name for tests."""
every_choice = pytest.mark.parametrize("name", sorted({*METHODS} - {*VARIANTS} | {"fedit_ft", *CHOICES}))
"""`every_training`, and the methods of CHOICES with their settings."""


def settings_of(name: str) -> list[str]:
    """The arguments of `runs` for a method or one of CHOICES."""
    method, chosen = CHOICES.get(name, (name, {}))
    return [method, *(f"method.{key}={value}" for key, value in chosen.items())]


probed: list[int] = []
"""Largest number of examples of each call of `Probe.losses`."""


class RecordedProbe(ClientProbe):
    """The real probe, which adds to `probed`."""

    def losses(self, adapters: Sequence[Adapter], max_examples: int) -> list[float]:
        probed.append(max_examples)
        return super().losses(adapters, max_examples)


@dataclass(frozen=True)
class Shop:
    """The tiny federation on one resident base, to call a method's two halves by hand with the real training."""

    prepared: Prepared
    bank: Bank
    seed: int = 0

    def server(self, round_: int = 0) -> Server:
        infos = tuple(self.prepared.clients[name].info for name in sorted(self.prepared.clients))
        base = self.prepared.base
        work = ServerWork(self.bank, self.prepared.config.training, 4096, self.seed)
        return Server(BaseInfo.of(base), infos, self.seed, round_, rounds=2, work=work, public=self.prepared.public)

    def client(self, name: str, round_: int = 0) -> Client:
        data, base = self.prepared.clients[name], self.prepared.base
        probe = RecordedProbe(self.bank, data.embedding.rows, name, self.seed, 4096, ProbeCounts())
        rows, examples = data.train.rows, data.train.examples
        outline = ClientOutline(rows, examples, base.tokenizer, base.width, base.embedding_std)
        engine = ClientDataEngine(self.bank, data, self.seed, NumberedTexts(), probe.counts)
        key = seeded_key(self.seed, name)
        return Client(
            data.info, BaseInfo.of(base), self.seed, round_, probe, lambda: outline, lambda: engine, lambda: key
        )

    def fit(self, method: Some, request: Request, name: str, round_: int, turn: int) -> Any:
        """The real training of one client, and its embeddings where the method wants them."""
        data, training = self.prepared.clients[name], self.prepared.config.training
        if not isinstance(request, TrainingRequest):
            other = LocalTask(name, request, data.train.pairs(), training.learning_rate)
            (made,) = RUN[type(request)](self.bank, [other], training, seed=self.seed, round_=round_, fit_index=turn)
            return made
        task = LocalTask(name, request, data.train.pairs(), training.learning_rate)
        (done,) = fit(self.bank, [task], training, seed=self.seed, round_=round_, fit_index=turn)
        assert isinstance(done, TrainingResult)
        means = embed(self.bank, [data.embedding.pairs()], 4096)[0] if method.needs_embeddings else {}
        return replace(done, embeddings=means)

    def update(
        self, method: Some, client_state: Any, message: Any, name: str, round_: int
    ) -> tuple[Any, Any, TrainingResult]:
        """A client's work of a round, from its first request for training to its last."""
        work, turn = method.update(self.client(name, round_), client_state, message), 0
        try:
            request = next(work)
            while True:
                request = work.send(self.fit(method, request, name, round_, turn))
                turn += 1
        except StopIteration as end:
            done: tuple[Any, Any, TrainingResult] = end.value
            return done

    def round(self, method: Some, state: Any, client_state: dict[str, Any], round_: int) -> tuple[Any, dict[str, Any]]:
        """A round in memory: the next state, and the replies of its first exchange; `client_state` is updated."""
        server, replies = self.server(round_), dict[str, Any]()

        def exchange(messages: Mapping[str, Any]) -> Mapping[str, Any]:
            answers = {}
            for name, message in messages.items():
                before = client_state.get(name) or method.init_client_state(self.client(name, round_))
                client_state[name], answers[name], _ = self.update(method, before, message, name, round_)
            replies.update({name: answer for name, answer in answers.items() if name not in replies})
            return answers

        return method.round(server, state, server.clients, exchange), replies


@pytest.fixture(scope="module")
def shop(runs: Any) -> Shop:
    prepared = prepare(runs.load("pfedhr", "training.local_steps=2"))  # reads the public prompts too
    return Shop(prepared, Bank(prepared.base))


def made(name: str, **parameters: Any) -> Some:
    """A small one."""
    name, chosen = CHOICES.get(name, (name, {}))
    parameters = chosen | parameters
    fields = {field.name for field in dataclasses.fields(METHODS[name])}
    small = {"rank": 2, "alpha": 4.0, "virtual_tokens": 4, "encoder_hidden_size": 32, "fusion_trials": 10}
    small |= {"review_every": 1, "coverage": 0.7, "condition_size": 16}
    small |= {"synthetic_rows": 4, "outer_steps": 2, "dreams": 2, "dream_exchanges": 2}
    small |= {"server_steps": 2, "examples_per_class": 2, "real_examples": 4, "new_rows": 4}
    small["warmup_rounds"] = 1
    small["min_similarity"] = -1.0  # every client is similar to every other
    lists = {key: tuple(value) if isinstance(value, list) else value for key, value in parameters.items()}
    return METHODS[name](**{**{key: value for key, value in small.items() if key in fields}, **lists})


@pytest.fixture(scope="module")
def replied(shop: Shop) -> Callable[[str], tuple[Some, Any, dict[str, Any], dict[str, Any]]]:
    """Method, its state after one round, what clients keep and the replies that led there; made once per method."""
    known: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in known:
            method, client_state = made(name), dict[str, Any]()
            state, replies = shop.round(method, method.init(shop.server()), client_state, 0)
            known[name] = method, state, client_state, replies
        return known[name]

    return get


def test_the_registry_is_found_and_names_each_class_once() -> None:
    assert len(METHODS) >= 4
    assert len(set(METHODS.values())) == len(METHODS)
    for name, method in METHODS.items():
        assert issubclass(method, Method), name
        assert dataclasses.is_dataclass(method), name
        assert vars(method)["__dataclass_params__"].frozen, name


@every_method
def test_says_what_it_is(name: str) -> None:
    method = METHODS[name]
    source = _file_of(method)
    text = source.__doc__ or ""
    assert method.communicates
    assert method.stays_local
    assert "round" in text.lower(), "the docstring of a method's file tells its round"
    baseline = method.paper.startswith("baseline")
    assert baseline or ("http" in text and re.search(r"http|arXiv|\d{4}\.\d{5}", method.paper)), name
    assert method.evaluates in ("pre_aggregation", "post_aggregation")
    assert len(method.records) == 4


def _file_of(method: type) -> Any:
    """The module of methods/ in which a class, or for a variant its parent, is written down."""
    for parent in method.__mro__:
        module = sys.modules[parent.__module__]
        if module.__name__.startswith("fedamole.methods.") and hasattr(module, parent.__name__):
            return module
    raise AssertionError(f"{method} is in no file of methods/")


def test_method_files_are_short() -> None:
    files = sorted(Path(inspect.getfile(sys.modules["fedamole.methods"])).parent.glob("*.py"))
    assert len(files) >= 4
    for file in files:
        assert len(file.read_text().splitlines()) <= 250, file


# --- runs -----------------------------------------------------------------------------------------------------


@every_choice
def test_same_seed_same_run(name: str, runs: Any, remains: Callable[[Path], Any]) -> None:
    first, second = remains(runs(*settings_of(name))), remains(runs.fresh(*settings_of(name)))
    assert len(first) > 6  # metrics, assignment, server states, private states, adapters
    assert first == second


@every_training
def test_another_seed_another_run(name: str, runs: Any, facts: Callable[[Path], Any]) -> None:
    first, other = runs(name), runs(name, "run.seed=1")
    assert facts(first) != facts(other)
    for adapter in sorted(first.glob("clients/*/adapter/adapter_model.safetensors")):
        assert adapter.read_bytes() != (other / adapter.relative_to(first)).read_bytes()
    # The partition has a seed of its own.
    assert (first / "manifest.json").read_bytes() == (other / "manifest.json").read_bytes()


@every_choice
def test_resume_equals_no_interruption(name: str, runs: Any, crash: Any, remains: Callable[[Path], Any]) -> None:
    folder = crash("client_done", 6, *settings_of(name))  # round 1, after the second client's private state was written
    resume(folder, ProgressListener())
    assert remains(folder) == remains(runs(*settings_of(name)))


@every_training
def test_bytes_in_the_metrics_are_the_bytes_packed(name: str, runs: Any, tmp_path: Path, facts: Any) -> None:
    """The engine sees exactly the payloads; the same run is repeated with an engine that weighs them."""
    weighed: dict[tuple[int, int, str], tuple[int, int]] = {}

    class Scales(InProcess):
        def update(self, round_: int, messages: Mapping[str, bytes], exchange: int = 0) -> dict[str, UpdateResult]:
            answers = super().update(round_, messages, exchange)
            for client, message in messages.items():
                weighed[round_, exchange, client] = len(message), len(answers[client].payload or b"")
            return answers

    config = runs.load(name)
    prepared = prepare(config)
    folder = RunFolder.create(tmp_path / "run", "", "", name, prepared.base.identity)
    worker = worker_of(config, Bank(prepared.base), folder)
    engine, base = Scales(worker, prepared.clients, ProgressListener(), 2), prepared.base
    server = server_of(config, base, engine.clients, worker.bank, prepared.public)
    loop_of(config, engine, server, folder, ProgressListener()).run()
    logged = facts(tmp_path / "run")
    assert logged == facts(runs(name))
    trained = [line for line in logged if line["split"] == "train"]
    assert len([line for line in trained if "exchange" not in line]) == 12
    sizes = {(t["round"], t.get("exchange", 0), t["client"]): (t["bytes_down"], t["bytes_up"]) for t in trained}
    assert sizes == weighed


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_the_same_run_scored_before_the_aggregation(name: str, runs: Any, facts: Any) -> None:
    """The same training, traffic, scores and saved models as the row `_ft` that the method's own run can have."""
    method = name.removesuffix("_ft")
    assert (METHODS[method].evaluates, METHODS[name].evaluates) == ("post_aggregation", "pre_aggregation")
    alone = runs(name, "federation.rounds=2")
    beside = runs(method, "federation.rounds=2", "evaluation.pre_aggregation=true")
    for split, count in (("train", 8), ("validation", 8), ("test", 4)):
        result, expected = (
            [line for line in facts(folder) if line["split"] == split and line.get("method", name) == name]
            for folder in (alone, beside)
        )
        assert result == expected
        assert len(result) >= count
    saved = sorted((alone / "clients").glob("*/adapter/adapter_*"))
    assert len(saved) == 8
    for file in saved:
        client = file.parent.parent.name
        assert file.read_bytes() == (beside / "clients" / client / f"adapter-{name}" / file.name).read_bytes()


@every_training
def test_tokens_are_those_that_go_through_the_base(name: str, runs: Any, tmp_path: Path, facts: Any) -> None:
    """Counted at the base, which is sent no padding, client by client; the other run trains two clients at once.

    Scoring, which is the same for all methods, does not count.
    """
    config = runs.load(name)
    prepared = prepare(config)
    folder, base = RunFolder.create(tmp_path / "run", "", "", name, prepared.base.identity), prepared.base
    worker, passed = worker_of(config, Bank(base), folder), {"forward_tokens": 0, "backward_tokens": 0}
    engine = InProcess(worker, prepared.clients, ProgressListener(), 1)
    assert worker.bank.packs
    assert worker.bank.continuation.caches  # how the base generates is tried out once, which is no work of a client
    seen: dict[tuple[str, int, int, str], dict[str, int]] = {}
    update, present = worker.update, worker.evaluator._current_model

    def count(_: Any, __: Any, options: Any) -> None:
        passed["backward_tokens" if torch.is_grad_enabled() else "forward_tokens"] += options["input_ids"].numel()

    def counted_update(group: Any, round_: int, messages: Any, exchange: int, *others: Any) -> Any:
        passed.update(dict.fromkeys(passed, 0))
        answers = update(group, round_, messages, exchange, *others)
        seen["train", round_, exchange, group[0].info.name] = dict(passed)
        return answers

    def counted_present(data: Any, round_: int, *others: Any) -> Any:
        passed.update(dict.fromkeys(passed, 0))
        model = present(data, round_, *others)
        seen["validation", round_, 0, data.info.name] = dict(passed)
        return model

    base.model.register_forward_pre_hook(count, with_kwargs=True)
    vars(worker).update(update=counted_update)
    vars(worker.evaluator).update(_current_model=counted_present)
    server = server_of(config, base, engine.clients, worker.bank, prepared.public)
    loop_of(config, engine, server, folder, ProgressListener()).run()
    lines = {
        (line["split"], line["round"], line.get("exchange", 0), line["client"]): line
        for line in facts(runs(name))
        if line["split"] in ("train", "validation") and line["round"] >= 0
    }
    assert len([key for key in lines if key[2] == 0]) == 24
    trained: Counter[tuple[int, str]] = Counter()
    for key, line in lines.items():
        assert line.get("forward_tokens", 0) == seen[key]["forward_tokens"], key
        assert line.get("backward_tokens", 0) == seen[key]["backward_tokens"], key
        assert ("probed" in line) == (seen[key]["forward_tokens"] > 0)
        if key[0] == "train":
            assert {"forward_tokens", "backward_tokens"} <= set(line)
            trained[key[1], key[3]] += line["backward_tokens"] > 0
    trains = 2 if name == "codream" else 1  # its dreams are optimised in each of `dream_exchanges`
    assert [*trained.values()] == [trains] * 12, "so many exchanges of a round train"


# --- budgets --------------------------------------------------------------------------------------------------


@every_method
def test_shares_of_a_round_are_those_that_the_method_says(name: str, shop: Shop) -> None:
    """All trainings of a round, over its exchanges, make up 1 under "steps" and `paper_steps` under "paper"."""
    method, requests, server = made(name), list[Request](), shop.server()
    info = server.clients[0]
    client = shop.client(info.name)
    kept = [method.init_client_state(client)]

    def exchange(messages: Mapping[str, Any]) -> Mapping[str, Any]:
        work = method.update(client, kept[-1], messages[info.name])
        try:
            request = next(work)
            while True:
                requests.append(request)
                request = work.send(request.unchanged(_no_embeddings(method, request.adapter)))
        except StopIteration as end:
            kept.append(end.value[0])
            return {info.name: end.value[1]}

    method.round(server, method.init(server), [info], exchange)
    assert {len(request.trainings) for request in requests} == {method.trains_together}
    trainings = [training for request in requests for training in request.trainings]
    assert sum(training.fraction_for("steps") for training in trainings) == pytest.approx(1.0)
    assert sum(training.fraction_for("paper") for training in trainings) == pytest.approx(method.paper_steps)
    differ = [training.fraction_for("steps") for training in trainings] != [
        training.fraction_for("paper") for training in trainings
    ]
    assert method.budgets_differ == differ


def _no_embeddings(method: Some, adapter: Adapter) -> Mapping[str, MeanEmbeddings]:
    if not method.needs_embeddings:
        return {}
    rank = lora_spec(method.spec()).rank
    return {
        module: MeanEmbeddings(torch.zeros(rank), {expert: torch.zeros(rank) for expert in held})
        for module, held in expert_ids(adapter.tensors).items()
    }


def test_those_that_train_twice_are_known() -> None:
    names = {name.removesuffix("_ft") for name, method in METHODS.items() if method.budgets_differ}
    assert names == {"adaptive_experts", "ditto", "feddat", "feddpa", "fedrep"}


@pytest.mark.parametrize(
    "name",
    ["adaptive_experts", "ditto", "feddpa", "feddat", "fedrep", "fedrep_ft", "fedit", "fdlora", "fedamole"],
)
def test_the_steps_that_a_run_reports_differ_where_the_method_says_so(name: str, runs: Any, facts: Any) -> None:
    """3 steps a round, or 3 for each of two trainings; tokens in proportion, as batches are of two rows each.

    Of 3 steps, partners take one each.
    """
    small = runs(name, "federation.rounds=1")
    large = runs(name, "federation.rounds=1", "training.budget=paper")
    trained_lines = [[line for line in facts(folder) if line["split"] == "train"] for folder in (small, large)]
    assert {line["steps"] for line in trained_lines[0]} == {2 if METHODS[name].trains_together == 2 else 3}
    assert {line["steps"] for line in trained_lines[1]} == {6 if METHODS[name].budgets_differ else 3}
    for less, more in zip(*trained_lines, strict=True):
        assert (more["backward_tokens"] > 1.5 * less["backward_tokens"]) == METHODS[name].budgets_differ
    if not METHODS[name].budgets_differ:
        assert trained_lines[0] == trained_lines[1], "nothing else changes"


# --- the interface --------------------------------------------------------------------------------------------


@every_choice
def test_a_round_changes_none_of_its_inputs(name: str, shop: Shop, replied: Any) -> None:
    method, state, client_state, replies = replied(name)
    inputs = [state, *client_state.values(), *replies.values()]
    before = [pack(record) for record in inputs]
    for info in shop.server().clients:
        client = shop.client(info.name, 1)
        message = method.message(state, info)
        sent = pack(message)
        method.adapter(client, client_state[info.name], message)
        assert pack(message) == sent
        _, _, trained = shop.update(method, client_state[info.name], message, info.name, 1)
        assert pack(message) == sent, "local training wrote into the message"
        adapter = pack(trained.adapter)
        method.personal(client, client_state[info.name], message, trained.adapter)
        method.reply(client, client_state[info.name], message, trained)
        assert pack(trained.adapter) == adapter
        assert pack(message) == sent
    method.aggregate(shop.server(1), state, replies)
    list(method.assignment_log(state))
    assert [pack(record) for record in inputs] == before


@every_training
def test_scoring_leaves_private_state_alone(name: str, runs: Any, tmp_path: Path) -> None:
    config = runs.load(name)
    prepared = prepare(config)
    folder = RunFolder.create(tmp_path / "run", "", "", name, prepared.base.identity)
    worker = worker_of(config, Bank(prepared.base), folder)
    engine = InProcess(worker, prepared.clients, ProgressListener(), 3)
    base = prepared.base
    state = config.method.init(server_of(config, base, engine.clients, worker.bank, prepared.public))
    messages = {info.name: pack(config.method.message(state, info)) for info in engine.clients}
    engine.update(0, messages)
    states = {path: path.read_bytes() for path in (tmp_path / "run").glob("clients/*/state/*")}
    assert len(states) == 4
    engine.evaluate(0, name, messages if config.method.evaluates == "post_aggregation" else dict.fromkeys(messages))
    engine.save_best(name, 0, engine.wait_for_clients())
    engine.test(name, best=True)
    engine.test(name, best=False)
    engine.score_base("test", engine.wait_for_clients())
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("clients/*/state/*")} == states


@every_choice
def test_replies_in_any_order_give_the_same_state(name: str, shop: Shop, replied: Any) -> None:
    method, state, _, replies = replied(name)
    expected = pack(method.aggregate(shop.server(1), state, replies))
    for order in itertools.permutations(replies):
        assert pack(method.aggregate(shop.server(1), state, {client: replies[client] for client in order})) == expected


@every_training
def test_clients_are_selected_among_those_available_and_repeatably(name: str, shop: Shop, replied: Any) -> None:
    method, state, _, _ = replied(name)
    restored = unpack(method.records.state, pack(state))
    for round_, count in itertools.product((0, 1, 5), (1, 2, 3)):
        available = shop.server().clients[1:]
        names = list(method.select(shop.server(round_), state, available, count))
        assert 1 <= len(names) <= count
        assert len(set(names)) == len(names)
        assert set(names) <= {client.name for client in available}
        assert names == list(method.select(shop.server(round_), restored, available, count))


@every_choice
def test_any_replies_may_be_missing(name: str, shop: Shop, replied: Any) -> None:
    method, state, client_state, replies = replied(name)
    for count in range(1, len(replies)):
        for present in itertools.combinations(sorted(replies), count):
            after = method.aggregate(shop.server(1), state, {client: replies[client] for client in present})
            for info in shop.server().clients:  # everybody can be served from it, who answered or not
                message = method.message(after, info)
                assert method.adapter(shop.client(info.name, 2), client_state[info.name], message).parameters() > 0


@every_choice
def test_a_round_without_any_reply_changes_nothing(name: str, shop: Shop, replied: Any) -> None:
    method, state, _, _ = replied(name)
    requests: list[set[str]] = []

    def nobody(messages: Mapping[str, Any]) -> Mapping[str, Any]:
        requests.append(set(messages))
        return {}

    server = shop.server(1)
    after = method.round(server, state, server.clients[:3], nobody)
    assert pack(after) == pack(state)
    assert requests[0] == {client.name for client in server.clients[:3]}


@every_choice
def test_every_record_survives_the_wire(name: str, shop: Shop, replied: Any) -> None:
    method, state, client_state, replies = replied(name)
    kinds = method.records
    records = [(kinds.state, state), (kinds.state, method.init(shop.server()))]
    for info in shop.server().clients:
        first = method.init_client_state(shop.client(info.name))
        records += [
            (kinds.message, method.message(state, info)),
            (kinds.client_state, client_state[info.name]),
            (kinds.client_state, first),
        ]
        records += [(kinds.reply, replies[info.name])]
    for kind, record in records:
        assert type(record) is kind
        again = unpack(kind, pack(record))
        assert pack(again) == pack(record)
        for field in dataclasses.fields(kind):
            value = getattr(record, field.name)
            if get_origin(get_type_hints(kind)[field.name]) is not Mapping and not dataclasses.is_dataclass(value):
                assert getattr(again, field.name) == getattr(record, field.name)


# --- hyper-parameters -----------------------------------------------------------------------------------------

CHANGED: dict[str, Any] = {
    "rank": 3,
    "alpha": 7.0,
    "dropout": 0.5,
    "dropout_kind": "rank",
    "experts": 10,
    "expert_choices": 1,
    "min_experts": 6,
    "max_experts": 6,
    "top_k": 1,
    "balance_weight": 5.0,
    "weighting": "examples",
    "assignment": ("random", "static", "homogeneous"),
    "proximal": 5.0,
    "private_share": 0.6,
    "virtual_tokens": 3,
    "ranks": ([1, 3],),
    "tail_weight": 5.0,
    "pruned_to": 0.2,
    "clusters": 4,
    "probe_examples": 1,
    "local_weight": 0.9,
    "instances": 1,
    "outer_learning_rate": 0.5,
    "outer_momentum": 0.9,
    "sync_every": 1,
    "fusion_examples": 1,
    "fusion_trials": 5,
    "min_holders": 3,
    "warmup_share": 1.0,
    "most_clusters": 1,
    "weight_decay": 1.0,
    "encoder_hidden_size": 16,
    "min_similarity": 1.0,
    "max_excess": 1000.0,
    "min_group": 9,
    "temperature": 0.5,
    "weight_learning_rate": 0.1,
    "weight_steps": 3,
    "update_weight": 0.0,
    "space": "change",
    "per_module": True,
    "variance": 1.0,
    "variance_estimate": "fitted",
    "prior": "icnn",
    "net_weight": 5.0,
    "norm_weight": 1.0,
    "net_learning_rate": 0.1,
    "net_steps": 9,
    "epsilon_schedule": ("inverse", "inverse_clusters"),
    "epsilon": 1.0,
    "search_rounds": 2,
    "search_experts": 6,
    "coverage": 0.5,
    "review_every": 9,
    "drop_below": 1.0,
    "off_diagonal": 0.1,
    "moments_every": 1,
    "moments_examples": 1,
    "moments_rank": 1,
    "exploration": 5.0,
    "token_weight": 3.0,
    "train_share": 1.0,
    "merge_steps": 0,
    "train_experts": True,
    "kl_weight": 0.9,
    "perturbation": "ball",
    "radius": 0.01,
    "noise": 2.0,
    "own_share": 0.8,
    "examples_per_class": 3,
    "max_classes": 1,
    "max_prompt_tokens": 2,
    "max_answer_tokens": 1,
    "min_class_examples": 30,
    "real_examples": 2,
    "synthesis_rate": 0.5,
    "server_steps": 3,
    "agreement_weight": 9.0,
    "label_weight": 5.0,
    "global_share": 0.5,
    "label_examples": 3,
    "max_options": 1,
    "generate_every": 1,
    "new_rows": 5,
    "allotment": "even",
    "writer": "base",
    "max_row_tokens": 1,
    "max_ratio": 0.01,
    "projection": "momentum",
    "momentum": 0.9,
    "synthetic_rows": 3,
    "inner_steps": 1,
    "outer_steps": 3,
    "step_rate": 0.5,
    "context_pairs": 1,
    "condition_size": 8,
    "heads": 2,
    "dreams": 3,
    "dream_exchanges": 3,
    "statistics_weight": 50.0,
    "disagreement_weight": 50.0,
    "min_examples": 1000,
    "layer_groups": 3,
    "candidates": 1,
    "public_prompts": 3,
    "diversity_weight": 5.0,
    "transfer_steps": 3,
    "free_text_tokens": 2,
    "server_base": "bundled",
    "delta": 1e-9,
    "warmup_rounds": 2,
    "latent_size": 3,
    "latent_norm": 0.5,
    "hidden_size": 5,
    "autoencoder_rate": 0.1,
    "class_weight": 9.0,
    "rare_below": 100,
    "latent_noise": 2.0,
    "refactor_every": 2,
    "assign_every": 2,
}
"""Another value for each hyper-parameter of any method; a new one needs an entry here."""

NEEDED: dict[tuple[str, str], dict[str, Any]] = {
    ("fedmap", key): {"prior": "icnn"} for key in ("net_weight", "norm_weight", "net_learning_rate", "net_steps")
}
NEEDED["fedptr", "momentum"] = {"projection": "momentum"}
NEEDED["feddpms", "examples_per_class"] = {"rare_below": 100}
NEEDED["feddpms", "latent_noise"] = {"rare_below": 100, "examples_per_class": 30}  # so that a batch has one of them
"""Other settings that a hyper-parameter belongs to, without which it has no effect."""
LONGER = {"fdlora": 3, "feddpms": 3}
"""Rounds that show every hyper-parameter, where two do not: `sync_every`, and synthetic examples of `feddpms`, can be
seen in round 2 first."""


def _is_choice(method: type[Some], field: str, value: Any) -> bool:
    """Whether a field can have this value; two methods may have a field of one name with different choices."""
    hint = get_type_hints(method)[field]
    return get_origin(hint) is not Literal or value in get_args(hint)


FIELDS = [
    (name, field.name, value)
    for name, method in sorted(METHODS.items())
    if name not in VARIANTS
    for field in dataclasses.fields(method)
    if (name, field.name) != ("fedrep", "private_share")  # of two layers one is private whatever the share
    if field.name != "server_base"  # tests/methods/test_fed_et.py: the tiny base has no larger one with its tokenizer
    for value in (CHANGED[field.name] if isinstance(CHANGED[field.name], tuple) else (CHANGED[field.name],))
    if _is_choice(method, field.name, value)
]


@every_method
def test_hyper_parameters_come_from_the_method_table(name: str, tiny: Path) -> None:
    for field in dataclasses.fields(METHODS[name]):
        value = CHANGED[field.name][0] if isinstance(CHANGED[field.name], tuple) else CHANGED[field.name]
        assert value != field.default
        text = str(value).lower() if isinstance(value, bool) else value
        config = load_config(tiny / "config.toml", [f"method.name={name}", f"method.{field.name}={text}"])
        expected = tuple(value) if isinstance(value, list) else value
        assert config.method == replace(METHODS[name](), **{field.name: expected})
        assert config.tables()["method"][field.name] == value
    with pytest.raises(ConfigError, match=r"unknown key method\.nonsense"):
        load_config(tiny / "config.toml", [f"method.name={name}", "method.nonsense=3"])


@every_method
def test_choices_are_checked(name: str, tiny: Path) -> None:
    hints = get_type_hints(METHODS[name])
    choices = [field.name for field in dataclasses.fields(METHODS[name]) if get_origin(hints[field.name]) is Literal]
    assert choices
    for field in choices:
        assert len(get_args(hints[field])) > 1
        with pytest.raises(ConfigError, match=f"method.{field} = 'nonsense': must be one of"):
            load_config(tiny / "config.toml", [f"method.name={name}", f"method.{field}=nonsense"])


@pytest.fixture(scope="module")
def outcome(shop: Shop) -> Callable[..., list[bytes]]:
    """Everything that the first rounds of a method produce, packed, and whom it selects next; made once per setting."""
    known: dict[str, list[bytes]] = {}

    def run(name: str, **parameters: Any) -> list[bytes]:
        method = made(name, **parameters)
        if repr((name, method)) not in known:
            probed.clear()
            state, client_state = method.init(shop.server()), dict[str, Any]()
            for round_ in range(LONGER.get(name, 2)):
                state, replies = shop.round(method, state, client_state, round_)
            records = [state, *client_state.values(), *replies.values()]
            for info in shop.server().clients:
                message = method.message(state, info)
                model = method.personal(shop.client(info.name, 1), client_state[info.name], message, None)
                records += [] if model is None else [model]
            clients = shop.server().clients
            selected = [
                selected_name.encode()
                for round_ in range(2, 22)
                for selected_name in method.select(shop.server(round_), state, clients, len(clients) // 2)
            ]
            counts = [b"%d" % count for count in probed]
            known[repr((name, method))] = [*(pack(record) for record in records), *selected, *counts]
        return known[repr((name, method))]

    return run


@pytest.mark.parametrize(("name", "field", "value"), FIELDS)
def test_every_hyper_parameter_has_an_effect(name: str, field: str, value: Any, outcome: Any) -> None:
    needed = NEEDED.get((name, field), {})
    assert outcome(name, **needed, **{field: value}) != outcome(name, **needed)
