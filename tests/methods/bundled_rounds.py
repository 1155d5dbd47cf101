"""Rounds of a method on clients of the bundled task, with its real base and text: for tests of behaviour."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fedamole.cli.options import bundled_config
from fedamole.config import Config, load_config
from fedamole.engine.in_process import InProcess
from fedamole.experiment import Prepared, prepare, public_rows, server_of, worker_of
from fedamole.federation.client_data import ClientData, Split
from fedamole.federation.progress import ProgressListener
from fedamole.federation.record import pack, unpack
from fedamole.federation.written_rows import TextWriter
from fedamole.model.bank import Bank
from fedamole.runs.run_folder import RunFolder

Replies = dict[str, Any]


@dataclass
class BundledRounds:
    """Runs rounds of methods on the bundled base, which is loaded once."""

    folder: Path
    clients: tuple[str, ...] = ()
    """Clients that take part; empty: all eight."""
    runs: list[Path] = field(default_factory=list)
    writer: TextWriter | None = None
    """Writes new rows in place of the clients' models."""
    data: dict[str, ClientData] = field(default_factory=dict)
    """Data of clients that are not those of the task."""

    def config(self, method: str, rounds: int, overrides: Sequence[str] = ()) -> Config:
        fixed = [
            f"method.name={method}",
            f"federation.rounds={rounds}",
            "run.device=cpu",
            "base.dtype=float32",
            "training.learning_rate=3e-3",
        ]
        scored_once = "evaluation.pre_aggregation=false"
        return load_config(bundled_config("fedit"), [*fixed, scored_once, *overrides])

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.config("fedit", 1))

    def remove_class(self, client: str, label: int) -> None:
        """Take the examples of one answer option from what a client trains on and probes."""
        data = self.prepared.clients[client]

        def without(split: Split) -> Split:
            kept = [i for i, row in enumerate(split.rows) if row.options.index(row.answer) != label]
            return Split(tuple(split.rows[i] for i in kept), tuple(split.examples[i] for i in kept))

        train = without(data.train)
        info = replace(data.info, examples=len(train.rows))
        self.data[client] = replace(data, info=info, train=train, embedding=without(data.embedding))

    @cached_property
    def bank(self) -> Bank:
        return Bank(self.prepared.base)

    def engine(self, config: Config) -> InProcess:
        """Return a new engine with the clients, which have trained nothing."""
        path = self.folder / f"run-{len(self.runs)}"
        self.runs.append(path)
        folder = RunFolder.create(path, "", "", config.run.name, self.prepared.base.identity)
        worker = worker_of(config, self.bank, folder)
        worker.factory.writer = self.writer or worker.factory.writer
        data = {name: self.prepared.clients[name] for name in self.clients or self.prepared.clients} | self.data
        return InProcess(worker, data, ProgressListener(), len(data))

    def train(
        self,
        method: str,
        *overrides: str,
        rounds: int,
        changed: Callable[[Replies], Replies] = lambda replies: replies,
        after_round: Callable[[Any], None] = lambda state: None,
    ) -> tuple[Any, InProcess]:
        """Return the server's state after some rounds, and the engine that ran them; nothing is scored.

        `changed` replaces the replies of each round before they are aggregated; `after_round` gets the server's state.
        """
        config = self.config(method, rounds, overrides)
        engine = self.engine(config)
        public = public_rows(config, self.prepared.base, None)
        rows = () if public is None else public.rows
        server = server_of(config, self.prepared.base, engine.clients, self.bank, rows)
        state = config.method.init(server)
        for round_ in range(rounds):

            def exchange(messages: Mapping[str, Any], round_: int = round_) -> Replies:
                results = engine.update(round_, {name: pack(message) for name, message in messages.items()})
                payloads = {name: result.payload for name, result in results.items() if result.payload is not None}
                return changed(
                    {name: unpack(config.method.records.reply, payload) for name, payload in payloads.items()}
                )

            state = config.method.round(replace(server, round=round_), state, engine.clients, exchange)
            after_round(state)
        return state, engine

    def __call__(self, method: str, *overrides: str, rounds: int, **watched: Any) -> dict[str, float]:
        """Return each client's validation loss after some rounds; `watched` are arguments of `train`."""
        state, engine = self.train(method, *overrides, rounds=rounds, **watched)
        scored = self.config(method, rounds, overrides).method
        sent = scored.evaluates == "post_aggregation"
        messages = {info.name: pack(scored.message(state, info)) if sent else None for info in engine.clients}
        return {name: scores["loss"] for name, scores in engine.evaluate(rounds - 1, method, messages).items()}
