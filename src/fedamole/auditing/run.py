"""Audits the clients of a finished run, and writes the results to its folder (`audit.json`)."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedamole import __version__
from fedamole.auditing.attribute import category_of, infer_attribute
from fedamole.auditing.canaries import CanaryResult, Claim, audit_plain, audit_private
from fedamole.auditing.inversion import invert_update
from fedamole.auditing.membership import Attack, attack, drawn, ratios, row_losses, summary
from fedamole.auditing.release import NotApplicableError, first_release, sent_tensors
from fedamole.config import Config
from fedamole.data.manifest import Manifest, read_manifest
from fedamole.errors import ConfigError, RunError
from fedamole.federation.client_data import ClientData, client_data
from fedamole.federation.local import DivergedError, LocalTask
from fedamole.federation.method import Method
from fedamole.federation.record import PayloadError, unpack
from fedamole.federation.request import TrainingRequest, TrainingResult
from fedamole.files import write_atomic
from fedamole.model.bank import Bank
from fedamole.model.params import Adapter
from fedamole.personal.adapt import final_state
from fedamole.personal.saved_models import SavedModel, check_finished, client_shard, find_model, open_bank, saved_models
from fedamole.runs.run_files import AUDIT
from fedamole.runs.run_folder import MANIFEST, METRICS, RUN, RunFolder

FORMAT = 1
CANARIES = 1000
"""Default number of canaries; fewer if the adapter has fewer values."""
DELTA = 1e-5
"""Delta at which the epsilon of runs without `[privacy]` is bounded."""
MOST_MODELS = 10
"""Most models of other clients that are attacked for a client."""

Json = dict[str, Any]
OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done, and the steps in all."""


@dataclass(frozen=True)
class Audited:
    """What the audits of all clients of a run need."""

    run: RunFolder
    manifest: Manifest
    bank: Bank
    models: Sequence[SavedModel]
    adapters: Sequence[Adapter]
    canaries: int | None
    on_progress: OnProgress


def audit_run(
    path: Path,
    client: str | None,
    canaries: int | None,
    device: str,
    base: str | None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> Json:
    """Audit one client or all clients of a run; write and return the content of audit.json.

    Args:
        path: The run's folder.
        client: The client; None: all clients that have a model.
        canaries: Number of canaries; None: `CANARIES`, or fewer if the adapter has fewer values.
        device: The device.
        base: A copy of the run's base; None: the one that the run names.
        on_progress: Called as the work goes on.

    Raises:
        RunError: The folder is not that of a finished run with saved models.
        ConfigError: There are too many canaries.
        DataError: The data are missing or changed.
        BaseModelError: The base is missing or another one.
    """
    if not (path / RUN).exists():
        raise RunError(f"{path} is not a run's folder (no {RUN}): an audit repeats the training of a run")
    models = saved_models(path)
    check_finished(models[0], finished=True)
    audited = models if client is None else (find_model(path, client),)
    run = RunFolder.open(path)
    results: Json = {"clients": {}, "attribute": {"not_applicable": "it compares clients, and one was audited"}}
    if client is not None and (path / AUDIT).exists():
        results = _audited_before(run)
    bank, adapters = open_bank(models, device, base)
    context = Audited(run, read_manifest(run.place(MANIFEST)), bank, models, adapters, canaries, on_progress)
    clients, attributes = results["clients"], dict[str, dict[str, str | None]]()
    for model in audited:
        config, shard = client_shard(model)
        templates = {source.name: source.template for source in config.data.source}
        source = next(record.source for record in context.manifest.clients if record.client == model.client)
        attributes[model.client] = {
            "category": category_of(shard.train),
            "source": source,
            "task": str(templates[source]),
        }
        data = client_data(shard, bank.base.tokenizer, config.training.max_length)
        clients[model.client] = {
            name: _or_reason(audit, context, config, data)
            for name, audit in (("canaries", _canaries), ("membership", _membership), ("inversion", _inversion))
        }
    if client is None:
        results["attribute"] = _or_reason(_attribute, run, config.method, attributes)
    results = {
        "format": FORMAT,
        "fedamole": __version__,
        "method": run.about["method"],
        "clients": dict(sorted(clients.items())),
        "attribute": results["attribute"],
    }
    write_atomic(run.place(AUDIT), json.dumps(results, indent=1) + "\n")
    return results


def _audited_before(run: RunFolder) -> Json:
    """Return the results of earlier audits."""
    try:
        results: Json = run.read_json(AUDIT)
    except RunError as error:
        raise RunError(f"{error}, or remove it: the audits write a new one") from error
    return results


def _or_reason(audit: Callable[..., Json], *arguments: Any) -> Json:
    """Return the results of an audit, or why it cannot be done."""
    try:
        return audit(*arguments)
    except NotApplicableError as reason:
        return {"not_applicable": str(reason)}
    except DivergedError as error:
        return {"not_applicable": f"the training diverged: {error}"}


def _canaries(context: Audited, config: Config, data: ClientData) -> Json:
    """Return the bound of epsilon beside the claim."""
    release = first_release(config, context.bank, data, context.manifest, context.run.kind)
    request, name, training = release.request, data.info.name, config.training
    budget, rows = config.budget(), data.train.pairs()

    def on_step(step: int) -> None:
        context.on_progress(f"{name}: canaries", step, 2 * steps)

    if budget is None:
        sent = sent_tensors(release.reply(_perturbed(request)), _perturbed(request).adapter.tensors)
        count = _count(context, request, sent)
        steps = max(1, round(training.steps(len(rows)) * request.fraction_for(training.budget)))
        seed = config.run.seed
        result = audit_plain(context.bank, request, rows, sent, training, seed, count, DELTA, on_step=on_step)
        return _canary_json(result, None)
    lines = [
        line
        for line in context.run.lines(METRICS)
        if line["split"] == "train" and line["client"] == name and "epsilon" in line
    ]
    steps = budget.steps(len(rows)) * sum(1 for line in lines if line.get("steps"))
    if steps == 0:
        raise NotApplicableError("the client took part in no round")
    mechanism = budget.mechanism(len(rows))
    spent = max(line["epsilon"] for line in lines)
    settings = config.privacy
    assert settings is not None
    claim = Claim(spent, settings.delta, settings.clip, mechanism.noise, mechanism.sampling, steps)
    count = _count(context, request, [*request.adapter.tensors])
    result = audit_private(
        context.bank, request, claim, lambda: budget.mechanism(len(rows)), training, count, on_step=on_step
    )
    return _canary_json(result, claim)


def _perturbed(request: TrainingRequest) -> TrainingResult:
    """Return the result of a training that has changed every value that it trains."""
    adapter = request.adapter
    tensors = {  # each by another value, so that equal tensors become different
        name: tensor if name in adapter.frozen else tensor + i
        for i, (name, tensor) in enumerate(adapter.tensors.items(), 1)
    }
    return TrainingResult(Adapter(adapter.spec, tensors, adapter.fixed), 1, 0.0)


def _count(context: Audited, request: TrainingRequest, names: Sequence[str]) -> int:
    """Return the number of canaries for the trained tensors with these names."""
    values = sum(size for name, size in request.adapter.trained_sizes().items() if name in names)
    if values == 0:
        raise NotApplicableError("its clients send nothing that they have trained as it is")
    if context.canaries is None:
        return min(CANARIES, values)
    if context.canaries > values:
        raise ConfigError(
            f"--canaries {context.canaries}: each needs a trained value of its own, and a client sends {values}; "
            "lower it"
        )
    return context.canaries


def _canary_json(result: CanaryResult, claim: Claim | None) -> Json:
    return {
        "claimed": None if claim is None else claim.epsilon,
        "bound": result.bound.epsilon,
        "delta": result.delta,
        "canaries": result.canaries,
        "guesses": result.bound.guesses,
        "correct": result.bound.correct,
        "steps": result.steps,
        "noise": result.measured_noise,
        "noise_repeats": result.noise_repeats,
    }


def _membership(context: Audited, config: Config, data: ClientData) -> Json:
    """Return how well the models of the run separate the client's training examples from its test examples."""
    bank, name, tokens = context.bank, data.info.name, config.evaluation.batch_tokens
    train, test = drawn(data.train.pairs(), name, "train"), drawn(data.test.pairs(), name, "test")
    own = [i for i, model in enumerate(context.models) if model.client == name]
    others = [i for i, model in enumerate(context.models) if model.client != name][:MOST_MODELS]
    bank.load([])
    untuned = [row_losses(bank, rows, tokens) for rows in (train, test)]

    def attacks(indices: Sequence[int], done: int) -> list[Attack]:
        results = []
        for count, i in enumerate(indices):
            bank.load([context.adapters[i]])
            losses = [row_losses(bank, rows, tokens) for rows in (train, test)]
            results.append(attack(*(ratios(a, b) for a, b in zip(losses, untuned, strict=True))))
            context.on_progress(f"{name}: membership", done + count + 1, len(own) + len(others))
        return results

    (of_own,) = attacks(own, 0)
    return summary(of_own, attacks(others, 1), len(train), len(test))


def _inversion(context: Audited, config: Config, data: ClientData) -> Json:
    """Return how many of the tokens that a client reads in round 0 can be read from its update."""
    release = first_release(config, context.bank, data, context.manifest, context.run.kind)
    rows, budget, training = data.train.pairs(), config.budget(), config.training
    context.on_progress(f"{data.info.name}: inversion", 0, 1)
    mechanism = None if budget is None or not budget.trains else budget.mechanism(len(rows))
    task = LocalTask(data.info.name, release.request, rows, training.rate(0), mechanism=mechanism)
    return asdict(invert_update(context.bank, release, task, training, config.run.seed))


def _attribute(run: RunFolder, method: Method[Any, Any, Any, Any], attributes: Mapping[str, Any]) -> Json:
    """Return how well the clients' attributes follow from the mean embeddings that the coordinator has of them."""
    if not method.needs_embeddings or not method.reads_embeddings():
        raise NotApplicableError("the clients send no mean embeddings that the coordinator reads")
    if run.kind != "simulation":
        raise NotApplicableError("the coordinator's state is needed, and a client's folder does not have it")
    packed, _ = final_state(run)
    try:
        state = unpack(method.records.state, packed)
    except PayloadError as error:
        raise RunError(f"the server's state in {run.path} does not fit the run's method ({error})") from error
    embeddings = getattr(state, "client_embeddings", None)
    if not embeddings:
        raise NotApplicableError("the coordinator keeps no mean embeddings of the clients")
    return infer_attribute(embeddings, attributes)
