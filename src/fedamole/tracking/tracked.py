"""Follows a run and passes its series to the trackers, round by round."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from typing_extensions import override

from fedamole.config import Config
from fedamole.federation.progress import Listeners, ProgressListener
from fedamole.files import write_atomic
from fedamole.reporting.page.content import content
from fedamole.reporting.page.document import write_page
from fedamole.reporting.page.reading import read_folder
from fedamole.runs.run_files import TRACKERS
from fedamole.runs.run_folder import METRICS, SUMMARY, RunFolder
from fedamole.tracking.series import hyper_parameters, round_series, score_series
from fedamole.tracking.trackers import Tracker, TrackerError

log = logging.getLogger(__name__)


@contextmanager
def tracked(config: Config, folder: RunFolder, listener: ProgressListener) -> Iterator[ProgressListener]:
    """Open the trackers of `run.trackers`; yield a listener that passes the events to `listener` and to them.

    The test scores and the report page follow when the block ends without an error. Without trackers, `listener` itself
    is yielded.

    Raises:
        TrackerError: A tracker does not start.
    """
    if not config.run.trackers:
        yield listener
        return
    session = Session(config, folder)
    try:
        yield Listeners([listener, session])
        session.finish()
    finally:
        session.close()


@contextmanager
def emptied_without_trackers(folder: RunFolder) -> Iterator[None]:
    """Empty the folder of a new run, which this process has created, if a tracker does not start in the block.

    Trackers start before the first round, so there are no results, and the run's name is free again.
    """
    try:
        yield
    except TrackerError:
        folder.empty_new("tensorboard", TRACKERS)
        raise


class Session(ProgressListener):
    """The trackers of one process that runs a run; a resumed run has another session.

    Values are logged after their round is committed, so a round that is repeated after an interruption is logged once.
    `trackers.json` in the run folder stores for each tracker the last step that it has. Rounds that a tracker has
    missed are logged with the next one.
    """

    def __init__(self, config: Config, folder: RunFolder) -> None:
        """Open the trackers; a new run sends its hyper-parameters first."""
        self.folder, self._offset = folder, 0
        self._steps: dict[int, dict[str, float]] = {}
        stored = folder.read_json(TRACKERS) if (folder.path / TRACKERS).exists() else {}
        self._stored: dict[str, Any] = dict(stored)
        self.trackers: list[Tracker] = []
        try:
            for name in config.run.trackers:
                self.trackers.append(Tracker(name, folder, config, stored.get(name, {})))
                if name not in stored:
                    self.trackers[-1].set_parameters(hyper_parameters(config))
                    self._store()
        except BaseException:
            self.close()
            raise

    @override
    def round_done(self, round_: int, validation: Mapping[str, float]) -> None:
        self._log_rounds()

    def finish(self) -> None:
        """Log the rounds that a tracker has missed, the test scores and the report page of the finished run."""
        self._log_rounds()
        summary = self.folder.read_json(SUMMARY)
        with tempfile.TemporaryDirectory() as temporary:
            page = Path(temporary) / "report.html"
            write_page(page, content([read_folder(self.folder.path)]))
            for tracker in [tracker for tracker in self.trackers if not tracker.finished]:
                with self._dropped_if_it_fails(tracker):
                    tracker.log(score_series(summary), summary["rounds"] + 1)
                    tracker.attach(page)
                    tracker.finished = True
        self._store()

    def close(self) -> None:
        """End the session of every tracker that is still open."""
        for tracker in list(self.trackers):
            with self._dropped_if_it_fails(tracker):
                tracker.close()

    def _log_rounds(self) -> None:
        """Log the committed rounds that a tracker does not have yet.

        metrics.jsonl has the lines of committed rounds only, here: the loop has removed others before the first round,
        and commits a round before it reports it.
        """
        self._steps |= round_series(self._new_lines())
        for tracker in list(self.trackers):
            with self._dropped_if_it_fails(tracker):
                for step in sorted(step for step in self._steps if step > tracker.step):
                    tracker.log(self._steps[step], step)
        self._steps.clear()
        self._store()

    def _new_lines(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl that were added since the last call; at first, all of them."""
        with self.folder.place(METRICS).open("rb") as file:
            file.seek(self._offset)
            lines = file.read().splitlines()
            self._offset = file.tell()
        return [json.loads(line) for line in lines]

    def _store(self) -> None:
        self._stored |= {tracker.name: tracker.stored() for tracker in self.trackers}
        write_atomic(self.folder.path / TRACKERS, json.dumps(self._stored, indent=2) + "\n")

    @contextmanager
    def _dropped_if_it_fails(self, tracker: Tracker) -> Iterator[None]:
        """Continue the run without a tracker that fails; training does not depend on it."""
        try:
            yield
        except Exception as error:  # each package has errors of its own
            log.warning(
                "tracker %s: %s; the run continues without it, and what it lacks is logged if the run is resumed",
                tracker.name,
                error,
            )
            self.trackers.remove(tracker)
            with suppress(Exception):
                tracker.close()
