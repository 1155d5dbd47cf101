"""Counts of requests and tokens for Prometheus, and one log line for each request, without its texts.

The text format of Prometheus is a few lines for counters and gauges, so that no client library is needed.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fedamole.serving.served_models import ServedModel

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of the text format of Prometheus."""
DURATIONS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Upper bounds, in seconds, of the histogram of durations."""
DISCONNECTED = 499
"""Status of a request whose caller has disconnected, as nginx has it; no response is sent with it."""


@dataclass
class CallRecord:
    """What is counted and logged of one request."""

    route: str
    model: str = ""
    """Name of the model; empty until it is known that the caller may use it."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    finished_answers: int = 0
    started: float = field(default_factory=time.monotonic)
    finished: bool = False


class Metrics:
    """Counts since the start of the server. Used in the thread of the event loop alone."""

    def __init__(self, log_requests: bool) -> None:
        """Start at 0; `log_requests`: whether each finished request is logged."""
        self._log_requests = log_requests
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._durations: Counter[float] = Counter()
        self._seconds = 0.0

    def finish(self, record: CallRecord, status: int) -> None:
        """Count a request with the status of its response. A second call for the same request has no effect."""
        if record.finished:
            return
        record.finished = True
        seconds = time.monotonic() - record.started
        self._requests[record.route, record.model, status] += 1
        self._tokens[record.model, "prompt"] += record.prompt_tokens
        self._tokens[record.model, "answer"] += record.answer_tokens
        self._durations[next((bound for bound in DURATIONS if seconds <= bound), float("inf"))] += 1
        self._seconds += seconds
        if self._log_requests:
            log.info(
                "%s POST %s model=%s status=%d prompt_tokens=%d answer_tokens=%d seconds=%.3f",
                time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                record.route,
                record.model or "-",
                status,
                record.prompt_tokens,
                record.answer_tokens,
                seconds,
            )

    def text(self, models: Sequence[ServedModel]) -> str:
        """Return all counts in the text format of Prometheus."""
        return "".join(f"{line}\n" for line in self._lines(models))

    def _lines(self, models: Sequence[ServedModel]) -> Iterator[str]:
        yield from _head("fedamole_requests_total", "counter", "Finished requests.")
        for (route, model, status), count in sorted(self._requests.items()):
            yield f'fedamole_requests_total{{route="{route}",model="{_escaped(model)}",status="{status}"}} {count}'
        yield from _head("fedamole_tokens_total", "counter", "Tokens of prompts and answers of finished requests.")
        for (model, kind), count in sorted(self._tokens.items()):
            yield f'fedamole_tokens_total{{model="{_escaped(model)}",kind="{kind}"}} {count}'
        yield from _head("fedamole_request_seconds", "histogram", "Duration of finished requests.")
        total = 0
        for bound in (*DURATIONS, float("inf")):
            total += self._durations[bound]
            label = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f'fedamole_request_seconds_bucket{{le="{label}"}} {total}'
        yield f"fedamole_request_seconds_sum {self._seconds:.6f}"
        yield f"fedamole_request_seconds_count {total}"
        loads = {engine: engine.requests_by_client() for engine in dict.fromkeys(served.engine for served in models)}
        for index, state in enumerate(("running", "waiting")):
            yield from _head(f"fedamole_answers_{state}", "gauge", f"Answers that are {state} at the moment.")
            for served in models:
                count = loads[served.engine][index][served.index]
                yield f'fedamole_answers_{state}{{model="{_escaped(served.name)}"}} {count}'


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP {name} {text}", f"# TYPE {name} {kind}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
