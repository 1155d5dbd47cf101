"""Each client chooses the best of the trained models of several runs by its own validation, training alone included.

The value compared is the one that chooses the best round of a run (`evaluation.select`): the validation loss, or the
score. It is that of the saved model, at the best round. The test split is not read for a choice.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedamole.errors import ConfigError, RunError
from fedamole.reporting.results import validation_at_best
from fedamole.reporting.runs import Run, read_runs, refuse_untrained, untrained_warning
from fedamole.runs.run_files import BASE, MAJORITY
from fedamole.runs.run_folder import METRICS, RunFolder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """One trained variant (scored model) of a finished run: a model for each client."""

    run: Run
    variant: str
    label: str
    """Its name in tables."""
    alone: bool
    """Whether it stands for training alone."""
    validation: Mapping[str, float]
    """By client, the validation value of its saved model; lower is better (a score has its sign changed)."""
    untuned: frozenset[str]
    """Clients that did not train up to the best round, so that their model is the untuned base."""
    bytes: float
    """Bytes that a client received and sent for training in the whole run, a mean over the clients."""
    tokens: float
    """Tokens that a client read in forward and backward passes in the whole run, a mean over the clients."""

    def test(self, client: str) -> Mapping[str, float]:
        """Return the test score and loss of a client's model; empty if the client was not tested."""
        scores: Mapping[str, float] = self.run.summary["rows"][self.variant]["clients"].get(client, {})
        return scores

    def rank(self, client: str) -> tuple[Any, ...]:
        """Return a key whose minimum is the best model of a client: of equal ones training alone, then the cheapest."""
        return self.validation[client], not self.alone, self.bytes, self.tokens, self.label


@dataclass(frozen=True)
class Choice:
    """What one client chose."""

    client: str
    chosen: Candidate
    alone: Candidate | None
    """Its best model of training alone; None if that is not among the candidates."""


StandardError = Callable[[str, Candidate, Candidate], float]
"""Returns, for a client and two candidates, the standard error of the difference of their validation losses."""


def candidate_of(run: Run, variant: str, label: str, alone: bool) -> Candidate:
    """Read a candidate from its run's metrics."""
    lines, row = list(RunFolder(run.path).lines(METRICS)), run.summary["rows"][variant]
    by_score = run.config["evaluation"]["select"] == "score"
    at_best = validation_at_best(lines, row, variant)
    values = {name: -line.get("score", math.nan) if by_score else line["loss"] for name, line in at_best.items()}
    train = [line for line in lines if line["split"] == "train"]
    clients = max(1, len(row["clients"]))
    return Candidate(
        run,
        variant,
        label,
        alone,
        {name: math.inf if math.isnan(value) else value for name, value in values.items()},
        frozenset(name for name, line in at_best.items() if line["method"] == BASE),
        sum(line["bytes_down"] + line.get("bytes_up", 0) for line in train) / clients,
        sum(line.get("backward_tokens", 0) for line in train) / clients,
    )


def read_candidates(paths: Sequence[Path], alone: str) -> list[Candidate]:
    """Read the trained variants of finished runs.

    Args:
        paths: Run folders, or folders with run folders in them. Runs in the latter that are unfinished or trained
            nothing are left out with a warning.
        alone: Label or method that stands for training alone.

    Raises:
        RunError: A named run is not finished, trained nothing, or the runs had different data, splits or bases, or
            chose their best rounds by different values.
    """
    runs = _trained({run.path.resolve(): run for run in read_runs(paths)}.values(), paths)
    for run in runs:
        if run.partition != runs[0].partition:
            raise RunError(
                f"{run.path} and {runs[0].path} had different data, splits or base, so no client can choose between "
                "them: name runs of one federation"
            )
    check_measure(runs)
    named = [(run, variant) for run in runs for variant in run.summary["rows"] if variant not in (BASE, MAJORITY)]
    counts = Counter(run.label(variant) for run, variant in named)
    candidates = []
    for run, variant in named:
        label = run.label(variant)
        shown = label if counts[label] == 1 else f"{label} in {run.path}"
        candidates.append(candidate_of(run, variant, shown, alone in (label, variant)))
    if not any(candidate.alone for candidate in candidates):
        log.warning(
            "%s is not among the runs, so nothing shows that a chosen model is better than training alone", alone
        )
    return candidates


def _trained(runs: Iterable[Run], named: Sequence[Path]) -> list[Run]:
    """Return the runs without those that trained nothing; RunError if one of those is named itself, or none is left."""
    trained = []
    for run in runs:
        if run.path in named:
            refuse_untrained(run.path)
        if run.untrained:
            log.warning("%s; it is left out", untrained_warning(run.path, run.summary))
        else:
            trained.append(run)
    if not trained:
        raise RunError(f"no run in {', '.join(map(str, named))} has trained anything")
    return trained


def check_measure(runs: Sequence[Run]) -> str:
    """Return what chose the best rounds of all runs, loss or score; RunError if they differ."""
    measures = {run.config["evaluation"]["select"]: run for run in runs}
    if len(measures) > 1:
        loss, score = measures["loss"].path, measures["score"].path
        raise RunError(
            f"the best rounds of {loss} were chosen by loss, those of {score} by score (evaluation.select), so their "
            "validation cannot be compared"
        )
    return str(next(iter(measures)))


def choose(candidates: Sequence[Candidate], margin: float, standard_error: StandardError) -> list[Choice]:
    """Return the choice of every client that a candidate has scored on validation, sorted by client.

    A client takes another model than that of training alone only if its validation is better by more than `margin`
    standard errors of the paired difference. Ties go to training alone, then to the cheaper candidate.

    Args:
        candidates: Trained models on one partition; see `read_candidates`.
        margin: In standard errors; 0: any improvement counts.
        standard_error: Called if the margin is above 0, for candidates that are better than training alone.

    Raises:
        ConfigError: The margin cannot be applied: training alone is missing, or the measure is the score.
    """
    if margin > 0 and not any(candidate.alone for candidate in candidates):
        raise ConfigError(f"--margin {margin:g} is a lead over training alone, which is missing: add its run")
    if margin > 0 and check_measure([candidate.run for candidate in candidates]) == "score":
        raise ConfigError(
            f"--margin {margin:g} is in standard errors of the validation loss, but these runs chose their best rounds "
            'by score (evaluation.select = "score"): leave it out'
        )
    return [_choice(client, candidates, margin, standard_error) for client in _clients(candidates)]


def _clients(candidates: Sequence[Candidate]) -> list[str]:
    return sorted({client for candidate in candidates for client in candidate.validation})


def _choice(client: str, candidates: Sequence[Candidate], margin: float, standard_error: StandardError) -> Choice:
    ranked = sorted(
        (candidate for candidate in candidates if client in candidate.validation), key=lambda one: one.rank(client)
    )
    alone = next((candidate for candidate in ranked if candidate.alone), None)
    if alone is None or margin == 0:
        return Choice(client, ranked[0], alone)
    for candidate in ranked:
        if candidate is alone:
            break
        lead = alone.validation[client] - candidate.validation[client]
        # A diverged model of training alone has no standard error, and any finite model is better.
        if lead == math.inf or lead > margin * standard_error(client, candidate, alone):
            return Choice(client, candidate, alone)
    return Choice(client, alone, alone)


def cost_of(candidates: Sequence[Candidate]) -> dict[str, float]:
    """Return what all candidates cost together: `runs`, and `tokens` and `bytes` per client in all of their runs."""
    runs = {candidate.run.path: candidate for candidate in candidates}.values()
    return {
        "runs": len(runs),
        "tokens": sum(candidate.tokens for candidate in runs),
        "bytes": sum(candidate.bytes for candidate in runs),
    }
