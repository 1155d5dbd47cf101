"""Scores of answers against references: pure functions, each in 0 .. 100."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from fedamole.evaluation.words import RougeTokenizer, squad_words

GenerationScore = Literal["rouge_l", "exact_match", "token_f1"]


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=RougeTokenizer())


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F1 x 100 by Google's rouge-score, without stemming, on the words of any script."""
    return 100.0 * float(_rouge().score(reference, answer)["rougeL"].fmeasure)


def exact_match(answer: str, reference: str) -> float:
    """100 when both are the same words, else 0."""
    return 100.0 * (squad_words(answer) == squad_words(reference))


def token_f1(answer: str, reference: str) -> float:
    """F1 x 100 of the words that answer and reference share (as in SQuAD)."""
    given, reference_words = squad_words(answer), squad_words(reference)
    if not given or not reference_words:
        return 100.0 * (given == reference_words)
    shared = sum((Counter(given) & Counter(reference_words)).values())
    return 200.0 * shared / (len(given) + len(reference_words))


def generation_scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Means of ROUGE-L, exact match and token F1 over pairs of answer and reference."""
    scorers = {"rouge_l": rouge_l, "exact_match": exact_match, "token_f1": token_f1}
    pairs = list(zip(answers, references, strict=True))
    return {name: sum(score(a, b) for a, b in pairs) / len(pairs) for name, score in scorers.items()}


def accuracy(chosen: Sequence[str], references: Sequence[str]) -> float:
    """Share of right choices x 100."""
    return 100.0 * sum(a == b for a, b in zip(chosen, references, strict=True)) / len(references)
