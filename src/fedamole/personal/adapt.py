"""Lets a new client join a finished federation: it gets a model of its own, and the run does not change.

With FedAMoLE, in the order of a round (algorithm: arXiv 2411.19128):
    1. The client computes its mean token embeddings over its embedding split with all experts of the pool, because it
       has no architecture yet.
    2. The experts choose among all clients, of which the others keep their last embeddings. Only the new client's
       column of the result is used. If fewer experts chose it than a client must hold, the most relevant are added.
    3. The client trains its experts for one round and keeps the better model on its validation split: as sent, or
       trained.

With a method that sends the same adapter to all clients (FedIT, prompts), the new client starts from that adapter.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
import torch

from fedamole.config import Config, load_run_config
from fedamole.data.manifest import load_federation
from fedamole.data.settings import SourceSettings
from fedamole.errors import ConfigError, RunError
from fedamole.evaluation.personal import majority_scores
from fedamole.experiment import reads_outside, resolved, server_of
from fedamole.federation.client_data import ClientData, client_data
from fedamole.federation.client_factory import ClientFactory
from fedamole.federation.local import DivergedError, LocalTask, embed
from fedamole.federation.method import ClientInfo, Newcomer, TrainingRequest
from fedamole.federation.objective import check_objective, objective_of
from fedamole.federation.probe import ProbeCounts
from fedamole.federation.record import PayloadError, unpack
from fedamole.federation.summary import summarise
from fedamole.files import new_folder, write_atomic
from fedamole.methods import METHODS
from fedamole.model.bank import Bank
from fedamole.model.base import BUNDLED, is_elsewhere, named_base
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter
from fedamole.model.pretrained import save_adapter
from fedamole.personal.saved_models import load_named
from fedamole.received.names import as_name
from fedamole.reporting.card import write_cards
from fedamole.runs.checkpoint import newest as newest_of
from fedamole.runs.checkpoint import read, rounds_done
from fedamole.runs.identity import Identity
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import ASSIGNMENT, METRICS, SUMMARY, RunFolder

ORIGIN = "adapted.json"
"""File in the new client's folder that names the run it joined."""
SENT, TRAINED = "as sent", "trained"

Say = Callable[[str], None]


def adapt(
    path: Path,
    source: SourceSettings,
    folder: Path,
    *,
    steps: int | None = None,
    device: str = "auto",
    base: str | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Let a new client join the finished run in `path`; return the report.

    `source` is the client's data and name, `steps` the number of training steps (unset: those of a round). The client
    gets a run folder `folder`/<run>-<name> with adapter, scores and a manifest. The report has its path, losses in nats
    per answer token and scores 0 .. 100. Raises RunError if the run is not finished or has no server state, ConfigError
    for a name that is taken and for methods whose runs a new client cannot join, and the errors of data and base.
    """
    name = as_name(load_run_config(RunFolder.open(path)).run.name)
    with new_folder(folder / f"{name}-{source.name}", numbered=True) as target:
        return _adapt(path, source, target, steps, device, base, say)


def _adapt(
    path: Path, source: SourceSettings, target: Path, steps: int | None, device: str, base: str | None, say: Say
) -> dict[str, Any]:
    """Let the client join; `target` is its new, empty folder."""
    run = RunFolder.open(path)
    state, clients = final_state(run)
    config = load_run_config(run)
    if reads := reads_outside(config, path, sources=(), base=base is None):
        say(f"reads files outside {path}: {', '.join(reads)}")
    if source.name in {client.name for client in clients}:
        raise ConfigError(f"{source.name} is a client of {path} already: give the new one another --name")
    if steps is not None and steps < 0:
        raise ConfigError(f"--steps {steps}: must not be negative")
    check_method(config)
    config = _own_config(config, source, target, device, base)
    say("loading data and base")
    torch.set_num_threads(config.run.threads)
    federation = load_federation(config.data, Path.cwd())
    check_objective(config.training, federation.shards)
    resident = load_named(config.base, config.run.device, named_by_user=base is not None)
    identity = Identity(**run.about["base"])
    resident.identity.check(identity, f"the run in {path}")
    data = client_data(federation.shards[0], resident.tokenizer, config.training.max_length)
    bank = Bank(resident)

    done = run.read_json(SUMMARY)["rounds"]
    adapter, newcomer = begin(config, bank, state, done, clients, data, say)
    candidates = {SENT: adapter}
    if steps != 0:
        say("training")
        candidates[TRAINED] = _trained(config, bank, adapter, data, done, steps)
    say("scoring on validation")

    def score(model: Adapter | None, split: str) -> dict[str, float]:
        scores = objective_of(config.training).score_models
        return scores(bank, config.evaluation, [data], [model], split, split == "test")[data.info.name]

    validation = {name: score(model, "validation")["loss"] for name, model in {BASE: None, **candidates}.items()}
    best = min(candidates, key=lambda name: validation[name])
    say("scoring on test")
    test = {
        BASE: score(None, "test"),
        MAJORITY: majority_scores(data.train.examples, data.test.examples, config.evaluation),
        best: score(candidates[best], "test"),
    }

    own = RunFolder.create(
        target, tomli_w.dumps(config.tables()), federation.manifest.to_json(), config.method_name, identity, "client"
    )
    report = {
        "client": source.name,
        "folder": str(target),
        "from": run.about["id"],
        "kept": best,
        "chosen_by": newcomer.report.get("chosen_by", 0),
        "added": newcomer.report.get("added", 0),
        "validation": validation,
        "test": test,
    }
    save_adapter(candidates[best], own.adapter(source.name, config.method_name), resident.name, identity)
    _log(own, source.name, config, done, newcomer, report)
    return report


def final_state(run: RunFolder) -> tuple[bytes, tuple[ClientInfo, ...]]:
    """Return the server's packed state after the last round and its clients; nothing is changed.

    Raises RunError for a run that is not finished, has no such state (a client's folder), or whose state is damaged.
    """
    if run.kind == "client":
        raise RunError(f"{run.path} is one client's part of a deployment; the coordinator's folder is needed")
    if not run.finished:
        rounds = run.tables()["federation"]["rounds"]
        raise RunError(
            f"{run.path} is not finished (round {rounds_done(run)} of {rounds}): `fedamole resume {run.path}`"
        )
    newest = newest_of(run)
    if newest is None:
        raise RunError(f"{run.path} has no checkpoints/ any more, and with them the server's state is gone")
    try:
        checkpoint = read(newest)
        state = newest.with_suffix(".safetensors").read_bytes()
    except OSError as error:
        raise RunError(f"{newest} cannot be read ({error}): put it back from a copy") from error
    if hashlib.sha256(state).hexdigest() != checkpoint.server_sha256:
        raise RunError(f"{newest.with_suffix('.safetensors')} is damaged: put it back from a copy")
    examples = checkpoint.progress.get("examples") or {}
    return state, tuple(ClientInfo(name, examples[name]) for name in sorted(examples))


def check_method(config: Config) -> None:
    """Raise ConfigError for a method whose finished runs a new client cannot join."""
    if not config.method.accepts_newcomers:
        fitting = ", ".join(name for name, method in METHODS.items() if method.accepts_newcomers)
        raise ConfigError(
            f"a new client cannot join a run of {config.method_name}, because this method has no model for a client "
            "that took part in no round. Merge the models of the run instead (fedamole merge RUN --out FOLDER), or use "
            f"runs of {fitting}"
        )


def _own_config(config: Config, source: SourceSettings, target: Path, device: str, base: str | None) -> Config:
    """Return the run's config with the new client's data, device and copy of the base."""
    model = config.base.model if base is None else named_base(base)
    if base is None and is_elsewhere(model):
        model = BUNDLED  # its path differs between machines; the identity is checked later
    config = replace(
        config,
        base=replace(config.base, model=model),
        data=replace(config.data, source=(source,), manifest=None),
        run=replace(config.run, device=device, group=1),
    )
    return resolved(config, target.resolve())


def begin(
    config: Config,
    bank: Bank,
    packed: bytes,
    done: int,
    clients: tuple[ClientInfo, ...],
    data: ClientData,
    say: Say,
) -> tuple[Adapter, Newcomer[Any]]:
    """Return the adapter that a new client starts from, and what the method sent it.

    `packed` is the server's state after all `done` rounds of the run.
    """
    method = config.method
    try:
        state = unpack(method.records.state, packed)
    except PayloadError as error:
        raise RunError(f"the server's state does not fit the run's method ({error})") from error

    def embeddings(adapter: Adapter) -> Mapping[str, MeanEmbeddings]:
        say("reading the embedding split")
        bank.load([adapter])
        return embed(bank, [data.embedding.pairs()], config.evaluation.batch_tokens)[0]

    everybody = tuple(sorted((*clients, data.info), key=lambda client: client.name))
    server = replace(server_of(config, bank.base, everybody), round=done - 1)
    newcomer = method.newcomer(server, state, data.info, embeddings)
    factory = ClientFactory(bank, config.evaluation.batch_tokens, config.run.seed)
    client = factory.client(data, done, ProbeCounts())
    kept = method.init_client_state(client)
    # The model that a client of the run would have; before the first training of its own there may be none.
    model = method.personal(client, kept, newcomer.message, None)
    return method.adapter(client, kept, newcomer.message) if model is None else model, newcomer


def _trained(config: Config, bank: Bank, adapter: Adapter, data: ClientData, round_: int, steps: int | None) -> Adapter:
    """Return the adapter after local training as in round `round_`, which would be the next one of the run."""
    training, objective = config.training, objective_of(config.training)
    if steps is not None:
        training = replace(training, local_steps=steps, local_epochs=0)
    task = LocalTask(data.info.name, TrainingRequest(adapter), objective.rows(data.train), training.rate(round_))
    (outcome,) = objective.fit(bank, [task], training, seed=config.run.seed, round_=round_)
    if isinstance(outcome, DivergedError):
        raise outcome
    return outcome.adapter


def _log(
    own: RunFolder, name: str, config: Config, round_: int, newcomer: Newcomer[Any], report: Mapping[str, Any]
) -> None:
    """Write the files of a client's run folder (docs/run-folder.md), the summary last."""
    row, client_state = config.method_name, report["kept"]
    validation = report["validation"]
    test = {row if one == client_state else one: scores for one, scores in report["test"].items()}
    rounds = {one: round_ if one == row else -1 for one in test}
    own.append(ASSIGNMENT, ({"round": round_, **line} for line in newcomer.assignment_log))
    own.append(
        METRICS,
        [
            {"round": -1, "client": name, "split": "validation", "method": BASE, "loss": validation[BASE]},
            {"round": round_, "client": name, "split": "validation", "method": row, "loss": validation[client_state]},
            *(
                {"round": rounds[one], "client": name, "split": "test", "method": one, "which": "best", **scores}
                for one, scores in test.items()
            ),
        ],
    )
    write_atomic(own.path / ORIGIN, json.dumps(report, indent=1) + "\n")
    results = {}
    for one, scores in test.items():
        found = {name: scores}
        results[one] = {"best_round": round_ if one == row else None, "best": found, "last": found}
    summarise(own, results, round_ + 1)
    write_cards(own)
