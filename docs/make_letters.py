"""Write letters to two clinics as JSON lines, for docs/tutorial.md: python docs/make_letters.py FOLDER"""

import json
import random
import sys
from pathlib import Path

URGENT = ("a pain in my chest", "a fit every hour", "blood in my eye", "no air at night", "a heart that stops")
ROUTINE = ("a small cough", "a short nail", "an itch", "a hoarse voice", "a rash on my arm")
ASIDES = ("I have a new phone.", "The letter has my old street.", "My bed was by the window.", "I take one pill a day.")
PEOPLE = ("Emma Ford", "Ben Hart", "Vera Lane", "Oscar Hill", "Ella Moor", "Finn Reed", "Tom West", "Ida Young")
QUESTION = "How urgent is this letter?"
GREETINGS = {"north": "Dear ward,", "south": "To the clinic."}


def letters(clinic: str, number: int) -> list[dict[str, str]]:
    """Return different letters to one clinic, half of them urgent."""
    rng, rows = random.Random(clinic), {}
    while len(rows) < number:
        label = ("high", "low")[len(rows) % 2]
        complaint = rng.choice(URGENT if label == "high" else ROUTINE)
        text = f"{GREETINGS[clinic]} {rng.choice(ASIDES)} I have {complaint}. {rng.choice(PEOPLE)}"
        rows.setdefault(text, {"instruction": QUESTION, "context": text, "response": label})
    return list(rows.values())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in GREETINGS:
        lines = (json.dumps(row) + "\n" for row in letters(name, 100))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
