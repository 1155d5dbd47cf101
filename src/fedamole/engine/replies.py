"""Reads the replies of clients on other machines; a reply that cannot be used becomes a failure."""

import logging
from collections.abc import Mapping

from fedamole.engine.messages import EVALUATE, JOIN, TEST, Reply, Request, failure, read_reply
from fedamole.federation.method import Evaluates
from fedamole.federation.record import PayloadError
from fedamole.runs.run_files import BASE, MAJORITY

log = logging.getLogger(__name__)


class ReplyReader:
    """Checks replies against the variants of a run and the scores that it needs."""

    def __init__(self, variants: Mapping[str, Evaluates], select: str) -> None:
        """Read the replies of a run; `select` is what chooses its best round: loss or score."""
        self.variants, self.select = variants, select

    def read(self, request: Request, client: str | None, content: bytes | str, limit: int) -> Reply:
        """Return the reply in an answer of at most `limit` bytes, or a failure.

        `content` is the answer, or a key of FAILURES. Without a `client`, the reply may come from any.
        """
        if isinstance(content, str):
            return failure(request, client or "", content)
        where = f"client {client or '(no registered name)'}, round {request.round}, {request.operation}"
        if len(content) > limit:
            log.warning("%s: %d bytes where at most %d may come", where, len(content), limit)
            return failure(request, client or "", "too_large")
        try:
            return read_reply(content, request, client, self._required_scores(request), optional=(MAJORITY,))
        except PayloadError as error:
            log.warning("%s: refused: %s", where, error)
            return failure(request, client or "", "bad_reply")

    def _required_scores(self, request: Request) -> dict[str, tuple[str, ...]]:
        """Return the models that a reply must have scores of, with the names of these scores."""
        if request.operation == TEST:
            models = [f"{variant}/{which}" for variant in self.variants for which in ("best", "last")]
            return {**dict.fromkeys([*models, BASE], ("loss", "score")), MAJORITY: ("score",)}
        if request.operation == JOIN:
            models = [BASE]
        elif request.operation == EVALUATE:
            models = [request.variant or ""]
        else:
            models = [variant for variant, moment in self.variants.items() if moment == "pre_aggregation"]
        return dict.fromkeys(models, ("loss",) if self.select == "loss" else ("loss", "score"))
