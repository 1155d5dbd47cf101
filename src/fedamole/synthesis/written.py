"""New examples that a language model writes: how many of each category, what it is asked, what is kept of its text."""

from collections.abc import Mapping, Sequence

from fedamole.data.examples import Example, Literals, Span
from fedamole.synthesis.outline import literal_pieces

EXAMPLE, ANSWER = "Example:\n", "\nAnswer: "
"""What precedes an example and its answer in a request and in what is written."""


def shares_of_errors(errors: Mapping[str, float], rows: int) -> dict[str, int]:
    """Divide `rows` rows among categories in proportion to their errors, which are at least 0.

    The largest remainders get the rows that are left, the first names among equal ones. Without any error no category
    gets a row.
    """
    total = sum(errors.values())
    if total <= 0:
        return dict.fromkeys(errors, 0)
    exact = {name: rows * error / total for name, error in errors.items()}
    shares = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(errors, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: rows - sum(shares.values())]:
        shares[name] += 1
    return shares


def request_text(category: str, shown: Sequence[Example]) -> str:
    """Return the text after which a model writes a new example of a category, with some examples that it is shown."""
    of_category = f" of the category {category}" if category else ""
    examples = "".join(f"{EXAMPLE}{example.prompt.strip()}{ANSWER}{example.answer.strip()}\n\n" for example in shown)
    return f"Write a new example{of_category}.\n\n{examples}{EXAMPLE}"


def written_example(text: str, category: str, shown: Sequence[Example]) -> Example | None:
    """Return the example in a model's text, in the form of the first of the examples shown that it fits.

    None for a text without an answer, a prompt that does not fit the template, an empty value of a column, an answer
    that is not an option, or an example of another category.
    """
    prompt, marker, rest = text.partition("\n" + EXAMPLE.strip())[0].partition(ANSWER)
    if not marker:
        return None
    for like in shown:
        answer = _answer(rest.strip(), like)
        values = column_values(prompt.strip(), literal_pieces(like))
        if answer and values:
            example = _filled(literal_pieces(like), values, answer, like)
            return example if example.group == category else None
    return None


def column_values(prompt: str, pieces: Sequence[str]) -> list[str]:
    """Return the values between a template's literal pieces in a prompt; empty if it does not fit the template.

    White space at both ends of the prompt does not count. Every value must contain more than white space.
    """
    if len(pieces) < 2:
        return []
    first, inner, last = pieces[0].lstrip(), pieces[1:-1], pieces[-1].rstrip()
    end = len(prompt) - len(last)
    if not prompt.startswith(first) or not prompt.endswith(last):
        return []
    position, values = len(first), list[str]()
    for piece in inner:
        start = prompt.find(piece, position, end)
        if start < 0:
            return []
        values.append(prompt[position:start])
        position = start + len(piece)
    values.append(prompt[position : max(end, position)])
    return values if all(value.strip() for value in values) else []


def normalised(prompt: str) -> str:
    """Return a prompt in which white space does not distinguish it from another."""
    return " ".join(prompt.split())


def _answer(text: str, like: Example) -> str:
    """Return the answer in the text after the marker; empty if it is not an option."""
    if not like.options:
        return text
    by_text = {option.strip(): option for option in like.options}
    return by_text.get(text.partition("\n")[0].strip(), "")


def _filled(pieces: Sequence[str], values: Sequence[str], answer: str, like: Example) -> Example:
    """Return the template of `like` with new values of its columns; of a conversation the system message is kept."""
    text, spans = pieces[0], list[Span]()
    if text:
        spans.append((0, len(text)))
    for value, piece in zip(values, pieces[1:], strict=True):
        text += value
        if piece:
            spans.append((len(text), len(text) + len(piece)))
        text += piece
    own = like.literals.options
    literals = Literals(tuple(spans), answer=((0, len(answer)),) if own else (), options=own)
    turns = None if like.turns is None else tuple(turn for turn in like.turns if turn[0] == "system")
    return Example(text, "", "", answer, like.options, literals, turns, like.category)
