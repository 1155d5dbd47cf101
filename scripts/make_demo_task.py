"""Write the federated task that ships with `fedamole`: eight clients of four domains, one JSON-lines file each.

    python scripts/make_demo_task.py                  # rewrites the bundled task; the same seed gives the same bytes
    python scripts/make_demo_task.py --out /tmp/task --seed 1

Each domain has two clients with few rows each, which do the same task by the same rule: they can gain from each other.
Between domains they conflict: hospital and bank ask the same question about letters that hold both a symptom and a
money matter, one labels by the symptom, the other by the money; shop and weather service ask for the same rewriting and
want different lines. One model for all has to serve both.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from demo_text import capital, person
from demo_words import (
    BANK_NOTES,
    COLOURS,
    DAYS,
    GOODS,
    HOSPITAL_NOTES,
    MONEY,
    NUMBERS,
    PAYMENT,
    PLACES,
    SKIES,
    STREETS,
    SYMPTOMS,
    TIERS,
    WIND_WARNING,
    WINDS,
)

TASK = Path(__file__).parents[1] / "src" / "fedamole" / "bundled" / "task"
URGENCY = dict(zip(TIERS, ("high", "medium", "low"), strict=True))
ASK_URGENCY = "How urgent is this letter?"
ASK_LINE = "Write the record as one line."

GREETINGS = ("Dear ward,", "To the clinic.", "Dear branch,", "To the counter.")  # every letter opens with one

Pair = tuple[str, str]  # a context and its answer


@dataclass(frozen=True)
class DemoClient:
    """One client: its data, its columns and what the README says of it."""

    name: str
    rows: int
    make: Callable[[random.Random], Pair]
    instruction: str
    columns: tuple[str, ...]
    options: tuple[str, ...]  # empty: the answer is free text
    about: str


def letter_in_sentences(rng: random.Random) -> tuple[str, str, str]:
    """A letter in three sentences in any order, with a greeting to be filled in; returns it with both tiers."""
    body, money = rng.choice(TIERS), rng.choice(TIERS)
    parts = [
        f"I have {rng.choice(SYMPTOMS[body])}.",
        f"{capital(rng.choice(MONEY[money]))}.",
        "{note}",
    ]
    rng.shuffle(parts)
    return f"{{greeting}} {' '.join(parts)} {person(rng)}", body, money


def letter_in_one_sentence(rng: random.Random) -> tuple[str, str, str]:
    """A letter in one sentence, with the place of the writer; returns it with both tiers."""
    body, money = rng.choice(TIERS), rng.choice(TIERS)
    symptom, matter = rng.choice(SYMPTOMS[body]), rng.choice(MONEY[money])
    first, second = f"it is about {symptom}", matter
    if rng.random() < 0.5:
        first, second = second, first
    return f"{{greeting}} {capital(first)}, and {second}. From {person(rng)} in {rng.choice(PLACES)}", body, money


def hospital(make: Callable[[random.Random], tuple[str, str, str]], greeting: str) -> Callable[[random.Random], Pair]:
    """Letters to a hospital: what counts is the symptom."""

    def row(rng: random.Random) -> Pair:
        letter, body, _ = make(rng)
        return letter.format(greeting=greeting, note=rng.choice(HOSPITAL_NOTES)), URGENCY[body]

    return row


def bank(make: Callable[[random.Random], tuple[str, str, str]], greeting: str) -> Callable[[random.Random], Pair]:
    """Letters to a bank: what counts is the money matter."""

    def row(rng: random.Random) -> Pair:
        letter, _, money = make(rng)
        return letter.format(greeting=greeting, note=rng.choice(BANK_NOTES)), URGENCY[money]

    return row


def shop(goods: list[str]) -> Callable[[random.Random], Pair]:
    """Orders of a shop, fields in any order; the line says how far the order is paid."""

    def row(rng: random.Random) -> Pair:
        thing, count, who = f"{rng.choice(COLOURS)} {rng.choice(goods)}", rng.choice(NUMBERS), person(rng)
        street, pay = rng.choice(STREETS), rng.choice(sorted(PAYMENT))
        fields = [f"goods: {thing}", f"count: {count}", f"customer: {who}", f"street: {street}", f"pay: {pay}"]
        rng.shuffle(fields)
        return "; ".join(fields), f"{count} x {thing} to {who}, {street} ({PAYMENT[pay]})"

    return row


def weather(places: list[str], gap: str) -> Callable[[random.Random], Pair]:
    """Measurements of a weather station, fields in any order; the line ends with a warning if the wind is strong."""

    def row(rng: random.Random) -> Pair:
        station, wind, source = rng.choice(places), rng.choice(NUMBERS), rng.choice(WINDS)
        sky, day = rng.choice(SKIES), rng.choice(DAYS)
        fields = [f"station: {station}", f"wind: {wind}", f"from: {source}", f"sky: {sky}", f"day: {day}"]
        rng.shuffle(fields)
        warning = " Stay at home!" if int(wind) >= WIND_WARNING else ""
        return gap.join(fields), f"{day} in {station}: {sky}, {source} wind {wind}.{warning}"

    return row


INSTRUCTED, LABELLED, COMPLETED = ("instruction", "context", "response"), ("text", "label"), ("prompt", "completion")
LEVELS = ("low", "medium", "high")
HOUSE_GOODS, GARDEN_GOODS = GOODS[:14], GOODS[12:]
BAYS, TOWNS = PLACES[0::2] + PLACES[1:4:2], PLACES[1::2]

ROWS = 80
"""Rows of every client: so few that a relative's are worth having."""

CLIENTS = (
    DemoClient(
        "hospital_north",
        ROWS,
        hospital(letter_in_sentences, GREETINGS[0]),
        ASK_URGENCY,
        INSTRUCTED,
        LEVELS,
        "letters to a hospital, urgent by the symptom",
    ),
    DemoClient(
        "hospital_south",
        ROWS,
        hospital(letter_in_sentences, GREETINGS[1]),
        ASK_URGENCY,
        INSTRUCTED,
        LEVELS,
        "letters to another hospital, urgent by the symptom",
    ),
    DemoClient(
        "bank_city",
        ROWS,
        bank(letter_in_one_sentence, GREETINGS[2]),
        ASK_URGENCY,
        LABELLED,
        LEVELS,
        "letters to a bank, urgent by the money matter",
    ),
    DemoClient(
        "bank_village",
        ROWS,
        bank(letter_in_one_sentence, GREETINGS[3]),
        ASK_URGENCY,
        INSTRUCTED,
        LEVELS,
        "letters to another bank, urgent by the money matter",
    ),
    DemoClient(
        "shop_house",
        ROWS,
        shop(HOUSE_GOODS),
        ASK_LINE,
        INSTRUCTED,
        (),
        "orders for the house rewritten as a line",
    ),
    DemoClient(
        "shop_garden",
        ROWS,
        shop(GARDEN_GOODS),
        ASK_LINE,
        COMPLETED,
        (),
        "orders for the garden rewritten as a line",
    ),
    DemoClient(
        "weather_coast",
        ROWS,
        weather(BAYS, "; "),
        ASK_LINE,
        INSTRUCTED,
        (),
        "measurements by the sea rewritten as a line, with a warning in strong wind",
    ),
    DemoClient(
        "weather_hills",
        ROWS,
        weather(TOWNS, ", "),
        ASK_LINE,
        INSTRUCTED,
        (),
        "measurements inland rewritten as a line, with a warning in strong wind",
    ),
)


TEST_ROWS = 40
"""Rows of every client's test file; a tenth of a small client's rows would be too few to tell methods apart."""


def client_rows(client: DemoClient, seed: int) -> list[dict[str, str]]:
    """The rows of one client as its columns want them, its test rows last; no context occurs twice."""
    rng = random.Random(f"fedamole demo task {seed} {client.name}")
    answers: dict[str, str] = {}
    while len(answers) < client.rows + TEST_ROWS:
        context, answer = client.make(rng)
        answers[context] = answer
    cells: Callable[[str, str], tuple[str, ...]] = {
        INSTRUCTED: lambda context, answer: (client.instruction, context, answer),
        LABELLED: lambda context, answer: (context, answer),
        COMPLETED: lambda context, answer: (f"{client.instruction}\n{context}\n", answer),
    }[client.columns]
    return [dict(zip(client.columns, cells(*pair), strict=True)) for pair in answers.items()]


PUBLIC, PUBLIC_ROWS = "public", 25
"""Name of the file of public prompts, and how many of them are like each client's."""


def public_prompts(seed: int) -> list[dict[str, str]]:
    """Prompts without answers of all domains in turn, from the same grammar; none is a client's."""
    kinds: list[list[str]] = []
    for client in CLIENTS:
        rng = random.Random(f"fedamole demo task {seed} public {client.name}")
        own = {row[client.columns[-2]].removeprefix(f"{ASK_LINE}\n").strip() for row in client_rows(client, seed)}
        contexts: dict[str, None] = {}
        while len(contexts) < PUBLIC_ROWS:
            context, _ = client.make(rng)
            if context not in own:
                contexts[context] = None
        kinds.append([PUBLIC_PROMPT.format(client.instruction, context) for context in contexts])
    return [{"prompt": prompt} for prompts in zip(*kinds, strict=True) for prompt in prompts]


PUBLIC_PROMPT = "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n"
"""As the templates of most clients write a prompt."""


def readme(seed: int) -> str:
    """The card of the task: a table of the clients."""
    lines = [
        "# The bundled federated task",
        "",
        "Eight clients of four domains, generated by `scripts/make_demo_task.py` from the project's own grammar"
        f" (seed {seed}).",
        "Licence: Apache-2.0, like the project. Persons, places and letters are invented.",
        "",
        "| client | rows | columns | task | options | what it is |",
        "|---|---|---|---|---|---|",
    ]
    for client in CLIENTS:
        kind = "classification" if client.options else "generation"
        columns, options = ", ".join(client.columns), ", ".join(client.options)
        lines.append(f"| {client.name} | {client.rows} | {columns} | {kind} | {options} | {client.about} |")
    lines += [
        "",
        f'`bank_city` has no instruction column; its question is the others\': "{ASK_URGENCY}"',
        f"`rows` are a client's own; its official test, `<client>.test.jsonl`, holds {TEST_ROWS} more of the kind.",
        "",
        "The two clients of a domain do the same task by the same rule and have few rows: they can learn from each "
        "other. Hospital and bank ask one question about letters that hold a symptom and a money matter, and label by "
        "different parts; shop and weather service ask for one rewriting and want different lines.",
        "",
        f"`{PUBLIC}.jsonl` holds {PUBLIC_ROWS * len(CLIENTS)} prompts without answers, {PUBLIC_ROWS} like those of each"
        " client and none of them a client's: public prompts of a server, for methods that need them.",
    ]
    return "\n".join(lines) + "\n"


def write_task(out: Path, seed: int) -> int:
    """Write every client's file and the README to `out`; returns the bytes written."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {"README.md": readme(seed)}
    for client in CLIENTS:
        rows = client_rows(client, seed)
        for name, part in ((client.name, rows[:-TEST_ROWS]), (f"{client.name}.test", rows[-TEST_ROWS:])):
            texts[f"{name}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        answers = Counter(row[client.columns[-1]] for row in rows)
        spread = dict(sorted(answers.items())) if client.options else f"{len(answers)} different answers"
        print(f"{client.name}: {len(rows)} rows, {spread}")
    texts[f"{PUBLIC}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in public_prompts(seed))
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
    return sum(len(text.encode()) for text in texts.values())


def main() -> None:
    """Parse the command line and write the task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TASK, help="folder to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="decides every row (%(default)s)")
    arguments = parser.parse_args()
    size = write_task(arguments.out, arguments.seed)
    print(f"{size:,} bytes written to {arguments.out}")


if __name__ == "__main__":
    main()
