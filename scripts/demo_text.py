"""The pretraining text of the tiny base: free text of the demo's four domains, from a grammar and a seed.

A document is one of ten kinds: stories and letters of the hospital and the bank, shop and weather prose, records with
questions, copies. Much of it says again what it said before (a letter is signed by the one who wrote it, a form is
filled in from a record), because heads that look up a word and repeat it are what a LoRA on the q and v projections
can steer. A record holds one person, one number and so on, so that a value can be found by its kind alone.
The text holds none of the federated task's instructions and none of its prompts or answers
(`tests/scripts/test_bundled.py` checks that).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from demo_words import (
    BANK_NOTES,
    COLOURS,
    DAYS,
    FIRST,
    GOODS,
    HOSPITAL_NOTES,
    LAST,
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

# The preambles of the package's built-in `alpaca` template, as copies: the shipped base must not change with it.
ALPACA_CONTEXT = (
    "The instruction below describes a task; the input after it gives further context. "
    "Write a response that fulfils the task.\n\n"
)
ALPACA_PLAIN = "The instruction below describes a task. Write a response that fulfils the task.\n\n"

DOCTOR_AFTER = {
    "grave": ["The doctor runs at once.", "The doctor cannot wait.", "The doctor drops all other work."],
    "some": ["The doctor comes this week.", "The doctor finds an hour soon.", "The doctor puts it on the list."],
    "slight": ["The doctor can wait.", "The doctor does not hurry.", "The doctor sends a friendly note."],
}
CLERK_AFTER = {
    "grave": ["The clerk runs at once.", "The clerk cannot wait.", "The clerk drops all other work."],
    "some": ["The clerk comes this week.", "The clerk finds an hour soon.", "The clerk puts it on the list."],
    "slight": ["The clerk can wait.", "The clerk does not hurry.", "The clerk sends a friendly note."],
}
TIER_HEAD = {"grave": "It cannot wait:", "some": "It comes this week:", "slight": "It can wait:"}
ALL_WORDS = FIRST + LAST + GOODS + COLOURS + SKIES + DAYS + NUMBERS

# What stands between two fields of a form.
JOINTS = (" for ", " to ", " in ", " on ", " x ", " wind ", " (", ") ", ": ", ", ", ". ", " / ", " - ")


def person(rng: random.Random) -> str:
    """A first and a last name."""
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def capital(sentence: str) -> str:
    """The sentence with its first letter in upper case."""
    return sentence[0].upper() + sentence[1:]


def layout(rng: random.Random, instruction: str, context: str, response: str) -> str:
    """One question in a layout drawn at random: Alpaca with or without its preamble, question and answer, or bare."""
    style = rng.random()
    if style < 0.3:
        lines = [f"Question: {instruction}", context, "Answer:"] if style < 0.15 else [instruction, context]
        return "\n".join([line for line in lines if line] + [response])
    preamble = (ALPACA_CONTEXT if context else ALPACA_PLAIN) if style < 0.65 else ""
    given = f"### Input:\n{context}\n\n" if context else ""
    return f"{preamble}### Instruction:\n{instruction}\n\n{given}### Response:\n{response}"


def hospital_story(rng: random.Random) -> str:
    """A patient, a symptom and what the doctor does about it."""
    tier = rng.choice(TIERS)
    symptom = rng.choice(SYMPTOMS[tier])
    start = rng.choice(["has", "comes to the ward with", "tells the nurse of", "writes to the clinic about"])
    return f"{person(rng)} {start} {symptom}. {rng.choice(DOCTOR_AFTER[tier])}"


def bank_story(rng: random.Random) -> str:
    """A customer of the bank, a concern and what the clerk does about it."""
    tier = rng.choice(TIERS)
    start = rng.choice(["tells the clerk:", "writes to the branch:", "says at the counter:"])
    return f"{person(rng)} {start} {rng.choice(MONEY[tier])}. {rng.choice(CLERK_AFTER[tier])}"


def tier_list(rng: random.Random) -> str:
    """Things of one tier in a row, with a heading that says what the tier means."""
    tier = rng.choice(TIERS)
    things = rng.sample(rng.choice([SYMPTOMS, MONEY])[tier], 3)
    return f"{TIER_HEAD[tier]} {'; '.join(things)}."


def letter(rng: random.Random) -> str:
    """A letter with a symptom and a money matter, and then what doctor and clerk each do about their own part."""
    tier_body, tier_money = rng.choice(TIERS), rng.choice(TIERS)
    parts = [
        f"I have {rng.choice(SYMPTOMS[tier_body])}.",
        f"{capital(rng.choice(MONEY[tier_money]))}.",
        rng.choice(HOSPITAL_NOTES + BANK_NOTES),
    ]
    rng.shuffle(parts)
    after = [rng.choice(DOCTOR_AFTER[tier_body]), rng.choice(CLERK_AFTER[tier_money])]
    rng.shuffle(after)
    who, town = person(rng), rng.choice(PLACES)
    return f"A letter from {who} in {town}: {' '.join(parts)} Yours, {who} in {town}.\n{' '.join(after)}"


def shop_prose(rng: random.Random) -> str:
    """What someone bought and for whom."""
    who, thing, colour = person(rng), rng.choice(GOODS), rng.choice(COLOURS)
    pay, state = rng.choice(sorted(PAYMENT.items()))
    first = rng.choice([f"{who} buys a {colour} {thing}", f"The shop has a {colour} {thing} for {who}"])
    then = rng.choice(
        [
            f"It goes to {rng.choice(STREETS)} on {rng.choice(DAYS)}.",
            f"It is a {pay}, so it is {state}.",
            f"{rng.choice(NUMBERS)} x {rng.choice(GOODS)} come by {pay} ({state}).",
            f"The price is {rng.choice(['low', 'medium', 'high'])}.",
            f"{rng.choice(FIRST)} wants {rng.choice(NUMBERS)} more and takes a {rng.choice(GOODS)} too.",
        ]
    )
    return f"{first}. {then} So {who} has a {colour} {thing}."


def weather_prose(rng: random.Random) -> str:
    """A day's weather in words."""
    level, wind = rng.choice(["low", "medium", "high"]), rng.choice(NUMBERS)
    strength = "It is strong. Stay at home!" if int(wind) >= WIND_WARNING else "It is weak."
    ending = rng.choice(
        [
            f"The river is {level}.",
            f"In {rng.choice(PLACES)} the water is {level}.",
            f"{rng.choice(DAYS)} brings {rng.choice(SKIES)} and a wind of {wind}.",
            f"The wind is {wind}. {strength}",
            f"The {rng.choice(WINDS)} wind is {wind}. {strength}",
        ]
    )
    day, sky, side = rng.choice(DAYS), rng.choice(SKIES), rng.choice(WINDS)
    return f"On {day} there is {sky} in the {side}. {ending} So {day} has {sky} in the {side}."


def field_values(rng: random.Random) -> dict[str, str]:
    """Field names with a value each, over all domains; no two values are of one kind."""
    return {
        rng.choice(["name", "customer", "nurse", "clerk"]): person(rng),
        rng.choice(["count", "wind", "bed"]): rng.choice(NUMBERS),
        rng.choice(["pay", "state"]): rng.choice([*PAYMENT, *PAYMENT.values()]),
        "street": rng.choice(STREETS),
        "station": rng.choice(PLACES),
        "day": rng.choice(DAYS),
        "goods": f"{rng.choice(COLOURS)} {rng.choice(GOODS)}",
        "sky": rng.choice(SKIES),
        "from": rng.choice(WINDS),
        "level": rng.choice(["low", "medium", "high"]),
        "seen": rng.choice(["Yes", "No"]),
    }


def record(rng: random.Random) -> str:
    """A record of three to five fields and a question about it: one field, two fields, or the record rewritten."""
    fields = field_values(rng)
    keys = rng.sample(sorted(fields), rng.randint(3, 5))
    gap = rng.choice(["; ", ", ", "\n"])
    context = gap.join(f"{key}: {fields[key]}" for key in keys)
    first, two = rng.sample(keys, 2)
    instruction, response = rng.choice(
        [
            (f"What is the {first}?", fields[first]),
            (f"What is the {first}?", fields[first]),
            (f"Give {first} and {two}.", f"{fields[first]} and {fields[two]}"),
            (f"Put {first} before {two}.", f"{fields[first]}, {fields[two]}"),
            ("List the values.", "; ".join(fields[key] for key in keys)),
            ("Turn it around.", "; ".join(f"{fields[key]} is the {key}" for key in keys)),
        ]
    )
    return layout(rng, instruction, context, response)


def fill_in(rng: random.Random) -> str:
    """A record and a form that names two to four of its fields; the answer is the form with the values in it."""
    fields = field_values(rng)
    keys = rng.sample(sorted(fields), rng.randint(4, 5))
    form = values = ""
    for key in rng.sample(keys, rng.randint(2, 4)):
        joint = rng.choice(JOINTS) if form else ""
        form, values = f"{form}{joint}{key}", f"{values}{joint}{fields[key]}"
    context = rng.choice(["; ", ", ", "\n"]).join(f"{key}: {fields[key]}" for key in keys)
    return layout(rng, f"Fill in: {form}", context, values)


def copy(rng: random.Random) -> str:
    """Random words and the same words again."""
    words = " ".join(rng.choice(ALL_WORDS) for _ in range(rng.randint(3, 8)))
    style = rng.random()
    if style < 0.4:
        return f"{words} / {words}"
    if style < 0.7:
        return layout(rng, f"Say it again: {words}", "", words)
    return layout(rng, "Copy the words.", words, words)


def yes_or_no(rng: random.Random) -> str:
    """A question about a short sentence that is answered with Yes or No."""
    who, thing, other = person(rng), *rng.sample(GOODS, 2)
    truth = rng.random() < 0.5
    return layout(rng, f"Is it a {thing if truth else other}?", f"{who} buys a {thing}.", "Yes" if truth else "No")


# Kind of document and its weight in the mixture.
KINDS: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (hospital_story, 2.0),
    (bank_story, 2.0),
    (tier_list, 1.0),
    (letter, 4.0),
    (shop_prose, 1.0),
    (weather_prose, 1.0),
    (record, 5.0),
    (fill_in, 5.0),
    (copy, 1.0),
    (yes_or_no, 0.5),
)


def documents(seed: int, split: str, count: int) -> Iterator[str]:
    """`count` documents of one split ("train" or "held-out"); the same arguments give the same documents."""
    rng = random.Random(f"fedamole demo text {seed} {split}")
    makers, weights = zip(*KINDS, strict=True)
    for _ in range(count):
        (make,) = rng.choices(makers, weights)
        yield make(rng)
