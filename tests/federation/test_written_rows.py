"""The data engine of a client: errors and bad cases by category, and which written rows become rows of the client."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.made_texts import NumberedTexts
from typing_extensions import override

from fedamole.evaluation.generation import Sampler, generate_answers
from fedamole.evaluation.likelihood import option_losses
from fedamole.experiment import Prepared, prepare
from fedamole.federation.client_data import ClientData
from fedamole.federation.data_engine import WriteRequest
from fedamole.federation.probe import ProbeCounts
from fedamole.federation.written_rows import ClientDataEngine, ModelWriter, TextWriter
from fedamole.methods.fedit import FedIT
from fedamole.model.bank import Bank
from fedamole.model.batch import TokenPair
from fedamole.model.params import Adapter, new_shared
from fedamole.synthesis.written import ANSWER, request_text


class Texts(TextWriter):
    """Writes given texts in turn and keeps what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked = texts, list[str]()

    @override
    def write(
        self, adapter: Adapter | None, texts: Sequence[str], max_new_tokens: int, sampler: Sampler | None
    ) -> tuple[list[str], int]:
        self.asked += texts
        return [self.texts[i % len(self.texts)] for i in range(len(texts))], 7


@pytest.fixture(scope="module")
def prepared(runs: object) -> Prepared:
    return prepare(runs.load("fedit", "data.embedding_share=0.3"))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def bank(prepared: Prepared) -> Bank:
    return Bank(prepared.base)


@pytest.fixture(scope="module")
def adapter(bank: Bank) -> Adapter:
    return Adapter(FedIT(rank=2).spec(), new_shared(bank.base.shapes, 2, torch.Generator().manual_seed(0)))


def engine(bank: Bank, data: ClientData, writer: TextWriter | None = None) -> ClientDataEngine:
    return ClientDataEngine(bank, data, 0, writer or Texts(""), ProbeCounts())


def shown_text(data: ClientData, i: int) -> str:
    example = data.train.examples[i]
    return f"{example.prompt.strip()}{ANSWER}{example.answer}"


def test_errors_and_cases_are_those_of_the_options_losses(prepared: Prepared, bank: Bank, adapter: Adapter) -> None:
    data = prepared.clients["entail"]
    split = data.embedding
    bank.load([adapter])
    (losses,) = option_losses(bank, [[(row.prompt, row.options) for row in split.rows]], 4096)
    answers = [row.options.index(row.answer) for row in split.rows]
    made = engine(bank, data)
    review, by_loss = (made.review(adapter, measure, 99) for measure in ("error", "loss"))
    assert len({example.answer for example in split.examples}) == len(review.errors) == 3
    for label in review.errors:
        indices = [i for i, example in enumerate(split.examples) if example.answer == label]
        wrong = [i for i in indices if losses[i].index(min(losses[i])) != answers[i]]
        own = {i: losses[i][answers[i]] for i in indices}
        assert review.errors[label] == pytest.approx(len(wrong) / len(indices))
        assert by_loss.errors[label] == pytest.approx(sum(own.values()) / len(own), rel=1e-4)
        expected = sorted(indices, key=lambda i: (i not in wrong, -own[i]))
        assert review.cases[label] == by_loss.cases[label] == tuple(expected[: max(len(wrong), 2)])
    assert any(0 < error < 1 for error in review.errors.values()), "otherwise this shows little"
    assert made.counts.examples == 2 * len(split.rows)


def test_free_text_has_a_loss_and_its_worse_half_is_bad(prepared: Prepared, bank: Bank, adapter: Adapter) -> None:
    data = prepared.clients["plain"]
    review = engine(bank, data).review(adapter, "error", 5)
    ((name, loss),) = review.errors.items()
    assert name == ""
    assert loss > 1
    assert len(review.cases[""]) == 3, "of five"
    bank.load([adapter])
    (losses,) = option_losses(bank, [[(row.prompt, (row.answer,)) for row in data.embedding.rows]], 4096)
    worst = [losses[i][0] for i in review.cases[""]]
    assert worst == sorted(worst, reverse=True)


def test_categories_of_the_template_are_compared(prepared: Prepared, bank: Bank, adapter: Adapter) -> None:
    data = prepared.clients["plain"]
    examples = tuple(replace(example, category="ab"[i % 2]) for i, example in enumerate(data.embedding.examples))
    review = engine(bank, replace(data, embedding=replace(data.embedding, examples=examples))).review(
        adapter, "error", 99
    )
    assert set(review.errors) == {"a", "b"}
    assert all(i % 2 == "ab".index(name) for name, cases in review.cases.items() for i in cases)


def write(
    made: ClientDataEngine, adapter: Adapter, shares: dict[str, int], known: Sequence[TokenPair] = ()
) -> list[TokenPair]:
    review = made.review(adapter, "error", 99)
    made.counts.tokens = 0
    request = WriteRequest(adapter, review, shares, known, 64, 0.5, torch.Generator().manual_seed(3))
    return [*made.write(request)]


def test_each_category_gets_its_share_of_requests_with_two_bad_cases(
    prepared: Prepared, bank: Bank, adapter: Adapter
) -> None:
    data, writer = prepared.clients["entail"], Texts("")
    made = engine(bank, data, writer)
    assert write(made, adapter, {"Yes": 4, "Maybe": 0, "No": 1}) == []
    assert made.counts.tokens == 7, "what the writer has read"
    assert [text.count("of the category Yes.") for text in writer.asked].count(1) == 4
    assert [text.count("of the category No.") for text in writer.asked].count(1) == 1
    assert len(writer.asked) == 5
    cases = made.review(adapter, "error", 99).cases["Yes"]
    prompts = [data.embedding.examples[i].prompt.strip() for i in cases]
    for text in writer.asked:
        assert text.count(ANSWER) == 2
    assert all(sum(prompt in text for prompt in prompts) == 2 for text in writer.asked if "category Yes" in text)
    assert len({*writer.asked}) == 5, "other cases, or another order"
    writer.asked.clear()
    assert write(made, adapter, {"Yes": 0}) == []
    assert not writer.asked


def test_copies_are_left_out(prepared: Prepared, bank: Bank, adapter: Adapter) -> None:
    """A training row, an embedding row, a known row, the same row twice; white space does not make a new row."""
    data = prepared.clients["entail"]
    label = data.train.examples[0].answer
    held = next(example for example in data.embedding.examples if example.answer == label)
    new = "On day 99 Ann buys a hat. Then Ann has a hat."
    texts = [
        shown_text(data, 0),
        shown_text(data, 0).replace(" buys", "  buys"),
        f"{held.prompt.strip()}{ANSWER}{label}",
        f"{new}{ANSWER}{label}",
        f"{new}{ANSWER}{label}",
    ]
    rows = write(engine(bank, data, Texts(*texts)), adapter, {label: 5})
    assert len(rows) == 1
    ((prompt, answer),) = rows
    decode = bank.base.tokenizer.decode
    assert decode(prompt) == f"{new}\n"
    assert answer == next(row.answer for row in data.train.rows if row.options and decode(row.answer[:-1]) == label)
    assert write(engine(bank, data, Texts(*texts)), adapter, {label: 5}, known=rows) == []


def test_a_row_longer_than_any_training_row_is_left_out(prepared: Prepared, bank: Bank, adapter: Adapter) -> None:
    data = prepared.clients["entail"]
    label = data.train.examples[0].answer
    text = f"{'On day 99 Ann buys a hat. ' * 20} Then Ann has a hat.{ANSWER}{label}"
    assert write(engine(bank, data, Texts(text)), adapter, {label: 1}) == []


def test_the_draw_depends_on_the_generator_alone(prepared: Prepared, bank: Bank, adapter: Adapter) -> None:
    data = prepared.clients["entail"]
    first, again = (write(engine(bank, data, NumberedTexts()), adapter, {"Yes": 3, "No": 2}) for _ in range(2))
    assert first == again
    assert first


# --- the real writer ------------------------------------------------------------------------------------------


def test_a_model_continues_texts_as_it_answers_prompts(prepared: Prepared, bank: Bank, adapter: Adapter) -> None:
    data = prepared.clients["entail"]
    writer = ModelWriter(bank, 4096)
    texts = ["On day 3 Ann", request_text("Yes", data.train.examples[:40]), "Bob has"]  # the second is too long
    continued, read = writer.write(adapter, texts, 5, None)
    assert continued[1] == ""
    encode = bank.base.tokenizer
    prompts = [tuple(encode(text)["input_ids"]) for text in (texts[0], texts[2])]
    bank.load([adapter])
    assert [continued[0].strip(), continued[2].strip()] == generate_answers(bank, [prompts], 5, 4096)[0]
    assert read <= sum(map(len, prompts)) + 2 * 4
    assert writer.write(None, [texts[1]], 5, None) == ([""], 0)
    first, again, other = (
        writer.write(None, texts, 5, Sampler(1.5, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_noise_draws_from_the_softmax() -> None:
    """Logits 0, 1 at temperature 0.5: probabilities 1 / (1 + e^2) = 0.119 and 0.881."""
    sampler = Sampler(0.5, torch.Generator().manual_seed(0))
    scores = torch.tensor([[0.0, 1.0]]).repeat(20_000, 1)
    assert sampler(torch.zeros(20_000, 1), scores).argmax(1).double().mean() == pytest.approx(0.881, abs=0.01)
