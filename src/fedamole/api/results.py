"""Runs and comparisons as objects with pandas frames, models and reports."""

import html
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas

from fedamole.comparison.file import Comparison
from fedamole.comparison.records import as_records
from fedamole.comparison.tables import Table, build_tables
from fedamole.errors import RunError
from fedamole.personal.saved_models import load_personal_model
from fedamole.reporting.page.content import content
from fedamole.reporting.page.document import page, write_page
from fedamole.reporting.page.reading import read_folder, read_folders
from fedamole.reporting.results import Scenario, read_scenarios
from fedamole.reporting.runs import finished_run
from fedamole.runs.run_folder import METRICS, RunFolder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

FRAME_HEIGHT = 720
"""Height of a report in a notebook, in CSS pixels."""


class Report:
    """An HTML report on runs. A notebook shows it in place; `save` writes it to a file."""

    def __init__(self, paths: tuple[Path, ...]) -> None:
        """Read the folders of runs of one federation; RunError if they do not belong together."""
        self._content = content(read_folders(paths))

    def save(self, path: str | Path = "report.html") -> Path:
        """Write the report and return its path. Replaces an older report, but no other file (RunError)."""
        write_page(Path(path), self._content)
        return Path(path)

    def _repr_html_(self) -> str:
        document = html.escape(page(self._content), quote=True)
        return f'<iframe srcdoc="{document}" width="100%" height="{FRAME_HEIGHT}" style="border: 0"></iframe>'


class Run:
    """One run of a method on a federation, read from its folder."""

    def __init__(self, folder: str | Path) -> None:
        """Open a run's folder; RunError if it is none."""
        self._folder = RunFolder.open(Path(folder))
        self._tokenizer: Any = None

    def __repr__(self) -> str:
        """Name method and folder."""
        return f"Run({str(self.path)!r}, method={self.method!r}, finished={self.finished})"

    def _repr_html_(self) -> str:
        about = f"<p>{html.escape(repr(self))}</p>"
        if not self.finished:
            return about
        table: str = self.scores.pivot(index="client", columns="model", values="score").round(1).to_html()
        return about + table

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self._folder.about["method"])

    @property
    def finished(self) -> bool:
        """Whether the run has its test scores. `fedamole.resume` continues one that has not."""
        return self._folder.finished

    @property
    def config(self) -> dict[str, Any]:
        """All settings of the run, as tables of TOML."""
        return self._folder.tables()

    @property
    def clients(self) -> list[str]:
        """Names of the clients, sorted."""
        return sorted(read_folder(self.path).clients)

    @cached_property
    def scores(self) -> pandas.DataFrame:
        """Test scores at the best round: one row per model and client, in long format.

        The columns are `model` (a variant of the method, `base` for the untuned model, `majority` for a constant
        answer), `client`, `best_round`, and the measures, such as `score` (0 to 100) and `loss` (nats per answer
        token). Raises RunError for an unfinished run.
        """
        rows = finished_run(self._folder).summary["rows"]
        records = []
        for model, row in rows.items():
            for client, measures in row["clients"].items():
                best = row["best_round"]
                round_ = best.get(client) if isinstance(best, dict) else best
                records.append({"model": model, "client": client, "best_round": round_, **measures})
        return pandas.DataFrame(records).astype({"best_round": "Int64"})

    @property
    def metrics(self) -> pandas.DataFrame:
        """All lines of metrics.jsonl up to now: one row per round, client and split; round -1 is before training."""
        return pandas.DataFrame(list(self._folder.lines(METRICS)))

    def model(
        self, client: str, variant: str | None = None, base: str | None = None, device: str = "auto"
    ) -> "PeftModel":
        """Return a client's personal model in eval mode; see `fedamole.load_personal_model`."""
        model, self._tokenizer = load_personal_model(self.path, client, variant=variant, base=base, device=device)
        return model

    def tokenizer(self, client: str) -> "PreTrainedTokenizerBase":
        """Return the tokenizer of the run's base. Loads the client's model, unless one was loaded before."""
        if self._tokenizer is None:
            self.model(client, device="cpu")
        return self._tokenizer

    def report(self) -> Report:
        """Return the HTML report on this run, which a notebook shows."""
        return Report((self.path,))


class ComparisonResult:
    """The finished trials of a comparison."""

    def __init__(self, comparison: Comparison, failed: Mapping[str, str] | None = None) -> None:
        """Read the results of a loaded comparison; `failed` has the errors of trials by name."""
        self.comparison, self.failed = comparison, dict(failed or {})

    def __repr__(self) -> str:
        """Name the methods and the failed trials."""
        failed = f", failed={sorted(self.failed)}" if self.failed else ""
        return f"ComparisonResult(methods={list(self.comparison.methods)}{failed})"

    def _repr_html_(self) -> str:
        tables = []
        for table in self.tables:
            frame = pandas.DataFrame([list(line) for line in table.body], columns=list(table.head))
            tables.append(f"<h4>{html.escape(table.title)}</h4>{frame.to_html(index=False)}<p>")
            tables.append(f"{html.escape(table.caption)}</p>")
        return "".join(tables)

    @cached_property
    def tables(self) -> list[Table]:
        """The tables of `fedamole compare`, as text: methods, clients, gains with intervals and p-values."""
        settings = self.comparison.settings
        return build_tables(
            self._scenarios, self.comparison.reference, settings.match == "parameters", target=settings.target
        )

    @cached_property
    def records(self) -> pandas.DataFrame:
        """Every number of the tables, unrounded, in long format; the columns are those of `fedamole compare --csv`."""
        return pandas.DataFrame(as_records(self._scenarios, self.comparison.reference))

    @property
    def runs(self) -> dict[str, Run]:
        """The finished trials as runs, by the trial's name."""
        return {trial.name: Run(trial.path) for trial in self.comparison.all_trials() if trial.state == "finished"}

    @cached_property
    def _scenarios(self) -> list[Scenario]:
        scenarios = read_scenarios(self.comparison.results(), self.comparison.settings.target)
        if not scenarios:
            raise RunError(f"{self.comparison.folder}: no trial is finished, so there are no results yet")
        return scenarios
