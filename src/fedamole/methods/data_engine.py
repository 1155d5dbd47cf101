"""MLLM-DataEngine: Zhao, Wang, Ouyang, Dong, Wang, He, "MLLM-DataEngine: An Iterative Refinement Approach for MLLM",
2023, https://arxiv.org/abs/2308.13566.

One round:
    1. The server sends the global LoRA to the selected clients.
    2. Every `generate_every` rounds a client reads examples that it sets aside with the LoRA that it was sent, and
       computes the error of each category: the text of the template's `category`, without it the answer option.
       Examples with free text and without `category` are one category.
    3. Of `new_rows` rows each category gets a share in proportion to its error. For each row, a model gets two bad
       cases of the category as examples and writes a new one: the LoRA that the client was sent, or the untuned base.
       A new row is kept if it fits the template, has an answer that is an option (the category, where that is the
       answer), and has no prompt that the client has already.
    4. The client trains the LoRA on its own rows and on all rows that it has kept, in one random order, and sends it.
    5. The server averages the LoRAs (FedAvg) into the next global LoRA.
The model of every client is the global LoRA, scored after the aggregation; `data_engine_ft` scores the client's own
LoRA of step 4. Generated rows stay in the client's private state; neither they nor the errors are sent.
Deviations: text alone. The paper evaluates a multi-modal model on a benchmark and lets GPT-4 write questions about
images, with prompts that people improve in the loop; here a client's own model, or its base, writes prompt and answer,
and the request has a fixed form. The answers of new rows are not verified by anyone. One request gives one row. A row
that cannot be used is not asked for again, so a category may get fewer rows than its share. The errors are those on the
client's embedding split.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.federation.data_engine import WriteRequest
from fedamole.federation.method import Client, Request, TrainingRequest, TrainingResult
from fedamole.federation.randomness import torch_generator
from fedamole.methods.shared.averaging import AveragedLora, SharedTensors
from fedamole.methods.shared.checks import check_at_least, check_not_negative, check_positive
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter
from fedamole.synthesis.rows import ExtraRows
from fedamole.synthesis.written import shares_of_errors


@dataclass(frozen=True)
class GeneratedRows:
    """The rows that a client has had written, as token ids: its private state."""

    tokens: Mapping[str, Tensor]
    """`ids` (T): prompts and answers, one row after the other. `lengths` (N, 2): of each row's prompt and answer."""

    @staticmethod
    def of(rows: Sequence[TokenPair]) -> "GeneratedRows":
        """Return the record of some rows."""
        ids = [token for prompt, answer in rows for token in (*prompt, *answer)]
        lengths = [[len(prompt), len(answer)] for prompt, answer in rows]
        return GeneratedRows(
            {
                "ids": torch.tensor(ids, dtype=torch.long),
                "lengths": torch.tensor(lengths, dtype=torch.long).reshape(-1, 2),
            }
        )

    def rows(self) -> tuple[TokenPair, ...]:
        """Return the (prompt, answer) of each row, the oldest first."""
        ids, rows, start = self.tokens["ids"].tolist(), list[TokenPair](), 0
        for prompt, answer in self.tokens["lengths"].tolist():
            middle, end = start + prompt, start + prompt + answer
            rows.append((tuple(ids[start:middle]), tuple(ids[middle:end])))
            start = end
        return tuple(rows)


@dataclass(frozen=True)
class DataEngineMethod(AveragedLora[GeneratedRows]):
    """FedIT whose clients' training data grow where their model makes mistakes."""

    generate_every: int = 2
    """Rounds from one generation of rows to the next; the first is in round `generate_every` - 1, counted from 0."""
    new_rows: int = 30
    """Rows that a client asks for in a generation."""
    allotment: Literal["error", "loss", "even"] = "error"
    """Share of a category in the new rows: by its share of wrong answers (by its loss for free text), by its loss, or
    the same for each, for comparison."""
    writer: Literal["own", "base"] = "own"
    """Who writes the new rows: the LoRA that the client was sent, or the untuned base."""
    probe_examples: int = 64
    """Examples of the embedding split that a client reads at most, to compute the errors."""
    temperature: float = 0.7
    """Temperature at which new rows are sampled; 0: greedy generation, which writes one row for the same request."""
    max_row_tokens: int = 128
    """Tokens of a new row at most."""
    max_ratio: float = 1.0
    """Generated rows at most, as a multiple of the client's training rows; the newest are kept."""

    paper = "Zhao et al., MLLM-DataEngine: An Iterative Refinement Approach for MLLM, 2023, arXiv 2308.13566"
    communicates = "one LoRA down, one LoRA up"
    stays_local = "the data, the generated rows and the errors by category"
    evaluates = "post_aggregation"
    probes = True
    accepts_newcomers = True
    only_answers = "a written row has one answer to a prompt"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, generate_every=1, new_rows=1, probe_examples=1, max_row_tokens=1)
        check_not_negative(self, "temperature")
        check_positive(self, "max_ratio")

    @override
    def own_row_share(self) -> float:
        return 1 / (1 + self.max_ratio)

    # client
    @override
    def init_client_state(self, client: Client) -> GeneratedRows:
        return GeneratedRows.of(())

    @override
    def adapter(self, client: Client, client_state: GeneratedRows, message: SharedTensors) -> Adapter:
        return Adapter(self.spec(), message.tensors)

    @override
    def update(
        self, client: Client, client_state: GeneratedRows, message: SharedTensors
    ) -> Generator[Request, Any, tuple[GeneratedRows, SharedTensors, TrainingResult]]:
        request = TrainingRequest(self.adapter(client, client_state, message))
        if (client.round + 1) % self.generate_every == 0:
            client_state = self.grown(client, client_state.rows(), request.adapter)
        if rows := client_state.rows():
            request = replace(request, extra=ExtraRows(rows))
        trained: TrainingResult = yield request
        return (*self.reply(client, client_state, message, trained), trained)

    def grown(self, client: Client, rows: Sequence[TokenPair], adapter: Adapter) -> GeneratedRows:
        """Return the client's generated rows with new ones for the categories in which a model is weak."""
        engine = client.data_engine()
        review = engine.review(adapter, "loss" if self.allotment == "loss" else "error", self.probe_examples)
        errors = dict.fromkeys(review.errors, 1.0) if self.allotment == "even" else review.errors
        shares = shares_of_errors(errors, self.new_rows)
        generator = torch_generator(client.seed, "written rows", client.name, client.round)
        by = adapter if self.writer == "own" else None
        new = engine.write(WriteRequest(by, review, shares, rows, self.max_row_tokens, self.temperature, generator))
        limit = int(self.max_ratio * client.info.examples)
        return GeneratedRows.of([*rows, *new][-limit:] if limit else [])

    @override
    def reply(
        self, client: Client, client_state: GeneratedRows, message: SharedTensors, trained: TrainingResult
    ) -> tuple[GeneratedRows, SharedTensors]:
        return client_state, SharedTensors(trained.adapter.tensors)
