"""Inference engine: one thread decodes the requests of all clients in one batch, one token per step.

Between two steps, finished and cancelled requests leave the batch and waiting ones join it (see scheduling.py). An
error in one request fails this request only; the engine continues.
"""

import contextlib
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fedamole.data.chat import stop_ids
from fedamole.errors import ConfigError, FedamoleError
from fedamole.model.bank import Bank
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter
from fedamole.serving.decode_batch import DecodeBatch, check_batching
from fedamole.serving.requests import Chunk, GenerationRequest, RequestState
from fedamole.serving.scheduling import FairQueue, Limits
from fedamole.serving.streaming_text import StreamingText
from fedamole.serving.token_logprobs import TokenLogprob
from fedamole.terminal import printable

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""A request fails after this many failed steps that it took part in."""


class StoppedError(FedamoleError):
    """The engine is stopped and accepts no requests."""


class InferenceEngine:
    """Answers requests for the models of C clients.

    `batch_clients` counts the decoding steps by the number of different clients in the batch.
    """

    def __init__(self, bank: Bank, adapters: Sequence[Adapter], limits: Limits | None = None) -> None:
        """Load the adapters into the bank. Call `start` to begin answering.

        Raises BaseModelError if requests cannot be batched on this base, ConfigError if it was loaded for images.
        """
        if bank.base.images is not None:
            raise ConfigError(
                "base.images = true: `fedamole serve` answers text requests alone, and these models were trained on "
                "images; use `fedamole generate --file` with rows that name images"
            )
        self.bank, self.limits = bank, limits or Limits()
        bank.load(adapters)
        check_batching(bank)
        self.batch_clients: Counter[int] = Counter()
        self._batch = DecodeBatch[RequestState](bank)
        self._queue = FairQueue[RequestState](self.limits)
        self._changed = threading.Condition()
        self.stopped = False
        """Whether the engine's thread ends after the current step."""
        self.draining = False
        """Whether the engine accepts no requests any more, but finishes the open ones."""
        self._idle = True
        """Whether the engine's thread waits for requests."""
        self._stops = stop_ids(bank.base.tokenizer)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Accept no more requests, and wait at most `seconds` for the open ones; return whether they are finished.

        `stop` may be called meanwhile.
        """
        with self._changed:
            self.draining = True
            if not self._thread.is_alive():
                return not self._queue.waiting
            return self._changed.wait_for(lambda: self.stopped or (self._idle and not self._queue.waiting), seconds)

    def stop(self) -> None:
        """Stop after the current step and fail all open requests. Returns when the thread has ended."""
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._close_failed([*self._batch.rows, *self._queue.waiting])
        self._queue.waiting.clear()

    def requests_by_client(self) -> tuple[Counter[int], Counter[int]]:
        """Return the number of running and of waiting requests of each client."""
        with self._changed:
            running, waiting = list(self._batch.rows), list(self._queue.waiting)
        counts = (Counter(state.client for state in states if not state.closed) for states in (running, waiting))
        first, second = counts
        return first, second

    @property
    def running(self) -> int:
        """Number of requests in the batch."""
        return len(self._batch.rows)

    @property
    def waiting(self) -> int:
        """Number of waiting requests."""
        return len(self._queue.waiting)

    def max_new_tokens(self, prompt: Ids, requested: int) -> int:
        """Return `requested` tokens, reduced to the engine's limit and the positions after a prompt.

        0 if the prompt is too long. A prompt that takes all positions leaves room for one token, because the last token
        needs no position.
        """
        left = self.bank.base.max_positions - len(self.bank.prefix(prompt))
        return min(requested, self.limits.max_answer_tokens, max(1, left)) if left >= 0 else 0

    def submit(self, request: GenerationRequest, on_chunk: Callable[[Chunk], object]) -> RequestState:
        """Queue a request. Raises BusyError if the model's queue is full and StoppedError after `stop` or `drain`."""
        (state,) = self.submit_all([(request, on_chunk)])
        return state

    def submit_all(self, requests: Sequence[tuple[GenerationRequest, Callable[[Chunk], object]]]) -> list[RequestState]:
        """Queue several requests for one model, or none of them: see `submit`."""
        states = [self._state_of(request, on_chunk) for request, on_chunk in requests]
        with self._changed:
            if self.stopped or self.draining:
                raise StoppedError("the server is stopping; try again later")
            self._queue.add_all(states)
            self._changed.notify_all()
        return states

    def _state_of(self, request: GenerationRequest, on_chunk: Callable[[Chunk], object]) -> RequestState:
        tokenizer = self.bank.base.tokenizer
        generator = None
        if request.temperature > 0:
            generator = torch.Generator()
            generator.seed() if request.seed is None else generator.manual_seed(request.seed)
        return RequestState(
            request,
            on_chunk,
            self.bank.prefix(request.prompt),
            self.max_new_tokens(request.prompt, request.max_new_tokens),
            StreamingText(
                lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), request.stop, not request.echo
            ),
            generator,
        )

    def step(self) -> bool:
        """Let waiting requests join and generate one token for each request; return whether any request is left.

        The engine's thread calls it.
        """
        with self._changed:
            joining, preempted = self._queue.schedule(self._batch.rows)
        self._batch.keep([not (state.closed or state in preempted) for state in self._batch.rows])
        if joining:
            self._join(joining)
        if self._batch.rows:
            self._decode()
        return bool(self._batch.rows or self._queue.waiting)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._idle = not (self._queue.waiting or self._batch.rows)
                if self._idle:
                    self._changed.notify_all()
                self._changed.wait_for(lambda: self.stopped or self._queue.waiting or self._batch.rows)
                if self.stopped:
                    return
                self._idle = False
            try:
                self.step()
            except Exception as error:  # not caused by a single request: fail all of them
                with self._changed:
                    states = [*self._batch.rows, *self._queue.waiting]
                    self._batch, self._queue = DecodeBatch(self.bank), FairQueue(self.limits)
                self._fail(states, error)

    def _join(self, states: Sequence[RequestState]) -> None:
        """Read the prompts of several requests in one pass. If that fails, read each alone to find the cause."""
        for state in states:
            state.generated_at_join = len(state.generated)
        scored = [(index, state) for index, state in enumerate(states) if state.scores_prompt]
        for _, state in scored:
            state.logprobs = [TokenLogprob(state.request.prompt[0], None)]

        def score(first: int, logits: Tensor) -> None:
            for index, state in scored:
                state.score_prompt(first, logits[index])

        try:
            logits = self._batch.join(states, score if scored else None)
        except Exception as error:
            if len(states) == 1:
                self._fail(states, error)
                return
            for state in states:
                self._join([state])
            return
        self._sample(states, logits)

    def _decode(self) -> None:
        """Generate one token for each row. If that fails, read each row again, alone."""
        states = self._batch.rows
        self.batch_clients[len({state.client for state in states})] += 1
        try:
            logits = self._batch.step([state.generated[-1] for state in states])
        except Exception as error:
            self._batch = DecodeBatch(self.bank)  # an aborted step leaves caches of different lengths
            for state in states:
                state.failed_steps += 1
            self._fail([state for state in states if state.failed_steps >= MAX_FAILED_STEPS], error)
            for state in states:
                if not state.closed:
                    self._join([state])
            return
        self._sample(states, logits)

    def _fail(self, states: Sequence[RequestState], error: Exception) -> None:
        """Log an error without its message, which may quote a prompt, and fail the requests."""
        for state in states:
            if not state.closed:
                log.error("a request failed: %s", printable(error_location(error)))
        self._close_failed(states)

    def _close_failed(self, states: Sequence[RequestState]) -> None:
        for state in states:
            if not state.closed:
                state.closed = True
                with contextlib.suppress(Exception):  # the receiver of the chunk may be gone
                    state.on_chunk(Chunk("", "error"))

    def _sample(self, states: Sequence[RequestState], logits: Tensor) -> None:
        """Give each request its next token, from logits (n, V). Finished requests leave the batch.

        Each row is sampled separately, so that an error fails its own request only.
        """
        max_logits, best_tokens = logits.float().max(1)
        for index, (max_logit, token) in enumerate(zip(max_logits.tolist(), best_tokens.tolist(), strict=True)):
            state = states[index]
            try:
                if not math.isfinite(max_logit):
                    raise FloatingPointError("the logits are not finite")
                if state.generator is not None or state.request.changes_logits:
                    token = state.next_token(logits[index])
                state.record(token, logits[index])
                self._append(state, token)
            except Exception as error:
                self._fail([state], error)
        self._batch.keep([not state.closed for state in self._batch.rows])

    def _append(self, state: RequestState, token: int) -> None:
        """Add a token to an answer and pass on the text that is new."""
        finish: Literal["stop", "length"] | None = None
        if token in self._stops:
            finish = "stop"
        else:
            if state.request.grammar is not None:
                state.request.grammar.accept(token)
            state.generated.append(token)
            finish = "length" if len(state.generated) >= state.max_new_tokens else None
        stream, new_text = state.request.stream, ""
        if stream or state.request.stop or finish:
            new_text, stopped = state.text.update(state.generated, finish is not None)
            finish = "stop" if stopped else finish
        if finish is not None:
            text = new_text if stream else state.text.emitted
            state.on_chunk(Chunk(text, finish, len(state.generated), state.take_logprobs()))
            state.closed = True
        elif new_text and stream:
            state.on_chunk(Chunk(new_text, logprobs=state.take_logprobs()))


def error_location(error: Exception) -> str:
    """Return the type of an error and the line that raised it, without its message, which may quote a request."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" in {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return f"{type(error).__name__}{where}"
