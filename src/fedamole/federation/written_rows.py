"""The data engine of a client whose data are in this process: errors of its categories, and rows that are written."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Protocol

import torch
from typing_extensions import override

from fedamole.data.examples import Example
from fedamole.data.tokens import prompt_ids, tokenise
from fedamole.evaluation.generation import Sampler, generate_ids
from fedamole.evaluation.likelihood import Tree, option_losses
from fedamole.federation.client_data import ClientData
from fedamole.federation.data_engine import DataEngine, Measure, Review, WriteRequest
from fedamole.federation.probe import ProbeCounts, draw_examples
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter
from fedamole.synthesis.written import normalised, request_text, written_example

SHOWN = 2
"""Examples that a request for a new row shows."""
MOST_CASES = 40
"""Bad cases of a category of which those that are shown are drawn."""


class TextWriter(Protocol):
    """Continues texts. A client's own model does it (`ModelWriter`); a test can use another one in its stead."""

    def write(
        self, adapter: Adapter | None, texts: Sequence[str], max_new_tokens: int, sampler: Sampler | None
    ) -> tuple[list[str], int]:
        """Return the continuation of each text, and the number of tokens that were read without training.

        Without a sampler the same text has the same continuation.
        """


@dataclass(frozen=True)
class ModelWriter(TextWriter):
    """Continues texts with the resident base under an adapter."""

    bank: Bank
    batch_tokens: int
    """Largest number of tokens that are read at once."""

    @override
    def write(
        self, adapter: Adapter | None, texts: Sequence[str], max_new_tokens: int, sampler: Sampler | None
    ) -> tuple[list[str], int]:
        """Continue each text that leaves room for `max_new_tokens` tokens; the others get an empty continuation."""
        base, continued = self.bank.base, [""] * len(texts)
        prompts = [prompt_ids(Example(text, "", "", ""), base.tokenizer) for text in texts]
        fitting = [i for i, prompt in enumerate(prompts) if len(prompt) + max_new_tokens <= base.max_positions]
        if not fitting:
            return continued, 0
        self.bank.load([] if adapter is None else [adapter])
        fitting_prompts = [[prompts[i] for i in fitting]]
        (ids,) = generate_ids(self.bank, fitting_prompts, max_new_tokens, self.batch_tokens, sampler)
        for i, text in zip(fitting, base.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            continued[i] = text
        # The last new token is not read.
        return continued, sum(len(prompts[i]) + len(new) - 1 for i, new in zip(fitting, ids, strict=True))


@dataclass(frozen=True)
class ClientDataEngine(DataEngine):
    """The data engine of a client whose data are in this process."""

    bank: Bank
    data: ClientData
    seed: int
    writer: TextWriter
    counts: ProbeCounts
    """Updated with all that is read."""

    @override
    def review(self, adapter: Adapter, measure: Measure, max_examples: int) -> Review:
        split, name = self.data.embedding, self.data.info.name
        drawn = draw_examples(range(len(split.rows)), max_examples, self.seed, "categories", name)
        self.bank.load([adapter])
        errors: dict[str, list[float]] = {}
        ranked: dict[str, list[tuple[float, float, int]]] = {}
        for i in drawn:
            row, group = split.rows[i], split.examples[i].group
            options = row.options or (row.answer,)
            # One example at a time: no padding, so that the tokens that are counted are those that are read.
            ((losses,),) = option_losses(self.bank, [[(row.prompt, options)]], 1)
            loss = losses[options.index(row.answer)]
            wrong = float(loss > min(losses))
            errors.setdefault(group, []).append(wrong if measure == "error" and row.options else loss)
            ranked.setdefault(group, []).append((-wrong, -loss, i))
            self.counts.examples += 1
            self.counts.tokens += len(row.prompt) + Tree(options).num_inner
        cases = {group: _worst(sorted(ranks), bool(split.rows[0].options)) for group, ranks in ranked.items()}
        return Review({group: sum(values) / len(values) for group, values in sorted(errors.items())}, cases)

    @override
    def write(self, request: WriteRequest) -> list[TokenPair]:
        asked = [
            (category, shown)
            for category, rows in sorted(request.shares.items())
            for shown in self._shown(request.review.cases[category], rows, request.generator)
        ]
        if not asked:
            return []
        sampler = Sampler(request.temperature, request.generator) if request.temperature else None
        starts = [request_text(*each) for each in asked]
        texts, read = self.writer.write(request.adapter, starts, request.max_new_tokens, sampler)
        self.counts.tokens += read
        splits = (self.data.train, self.data.embedding)
        prompts = {normalised(example.prompt) for split in splits for example in split.examples}
        examples: list[Example] = []
        for text, each in zip(texts, asked, strict=True):
            example = written_example(text, *each)
            if example is not None and normalised(example.prompt) not in prompts:
                prompts.add(normalised(example.prompt))
                examples.append(example)
        return self._rows(examples, {tuple(prompt) for prompt, _ in request.known})

    def _shown(self, cases: Sequence[int], rows: int, generator: torch.Generator) -> list[list[Example]]:
        """Return the bad cases that each of the requests for `rows` rows shows; all pairs come equally often."""
        pairs = list(permutations(cases[:MOST_CASES], min(SHOWN, len(cases))))
        order: list[int] = []
        while len(order) < rows:
            order += torch.randperm(len(pairs), generator=generator).tolist()
        return [[self.data.embedding.examples[i] for i in pairs[index]] for index in order[:rows]]

    def _rows(self, examples: Sequence[Example], known: Collection[tuple[int, ...]]) -> list[TokenPair]:
        """Return the token ids of examples, without those that are too long or have a prompt of `known`."""
        train = self.data.train.rows
        longest = max(len(row.prompt) + max(map(len, (row.answer, *row.options))) for row in train)
        tokens = tokenise(examples, self.bank.base.tokenizer, 2**31)
        return [
            (row.prompt, row.answer)
            for row in tokens.rows
            if row.prompt not in known and len(row.prompt) + max(map(len, (row.answer, *row.options))) <= longest
        ]


def _worst(ranked: Sequence[tuple[float, float, int]], options: bool) -> tuple[int, ...]:
    """Return the indices of the bad cases among (minus 1 if wrong, minus loss, index) in ascending order."""
    bad = sum(wrong < 0 for wrong, _, _ in ranked) if options else (len(ranked) + 1) // 2
    return tuple(index for _, _, index in ranked[: max(bad, SHOWN)])
