"""Write the data of the scenarios in this folder: one JSON-lines file of training rows and one of test rows per source.

    python experiments/real/make_data.py DATA [--out experiments/real/data]

DATA is a folder with these files (JSON lines, also with .gz): banking77.train and banking77.test (text, label_text),
snli.train and snli.test (premise, hypothesis, label_text), natural_instructions.train and .test (instruction, context,
response, category), medquad (instruction, response, source). The column `client` of a written row names its client.
The result depends only on the files and on `--seed`; siblings have no row in common.
"""

import argparse
import gzip
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

GROUPS = {
    "cards": (
        "activate_my_card",
        "card_about_to_expire",
        "card_arrival",
        "card_delivery_estimate",
        "card_linking",
        "card_not_working",
        "compromised_card",
        "getting_spare_card",
        "lost_or_stolen_card",
        "order_physical_card",
    ),
    "topups": (
        "automatic_top_up",
        "pending_top_up",
        "top_up_by_bank_transfer_charge",
        "top_up_by_card_charge",
        "top_up_by_cash_or_cheque",
        "top_up_failed",
        "top_up_limits",
        "top_up_reverted",
        "topping_up_by_card",
        "verify_top_up",
    ),
    "transfers": (
        "balance_not_updated_after_bank_transfer",
        "beneficiary_not_allowed",
        "cancel_transfer",
        "declined_transfer",
        "failed_transfer",
        "pending_transfer",
        "receiving_money",
        "transfer_fee_charged",
        "transfer_into_account",
        "transfer_not_received_by_recipient",
    ),
    "cash": (
        "atm_support",
        "card_swallowed",
        "cash_withdrawal_charge",
        "cash_withdrawal_not_recognised",
        "change_pin",
        "declined_cash_withdrawal",
        "pending_cash_withdrawal",
        "pin_blocked",
        "wrong_amount_of_cash_received",
        "wrong_exchange_rate_for_cash_withdrawal",
    ),
}
"""Ten intents of banking77 per group; two clients have the same group."""
SIBLING_ROWS, TEST_ROWS, HOSTILE = 100, 60, "shuffled"
UNEQUAL_ROWS = {"cards": (20, 400), "topups": (40, 200), "transfers": (60, 120), "cash": (30, 300)}
"""Rows of the two clients of each group in the scenario `unequal`."""
SNLI_ROWS, NI_ROWS, SITE_ROWS = 900, 120, 120
SITES = ("GARD", "GHR", "NIDDK", "NINDS", "NIHSeniorHealth", "CDC")
MAX_ANSWER_WORDS = 60


def read(folder: Path, name: str) -> list[Row]:
    """Return the rows of NAME.jsonl or NAME.jsonl.gz in a folder."""
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.exists():
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "rt", encoding="utf-8") as file:
                return [json.loads(line) for line in file]
    raise SystemExit(f"{folder} has neither {name}.jsonl nor {name}.jsonl.gz; see the docstring of this script")


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def stratified(rows: Sequence[Row], column: str, rng: random.Random) -> list[Row]:
    """Shuffle rows so that every beginning of the list has nearly equal numbers of each value of a column."""
    by_value: dict[str, list[Row]] = {}
    for row in rows:
        by_value.setdefault(row[column], []).append(row)
    order = []
    for value in sorted(by_value):
        shuffled = rng.sample(by_value[value], len(by_value[value]))
        order += [(i + rng.random(), value, row) for i, row in enumerate(shuffled)]
    return [row for _, _, row in sorted(order, key=lambda entry: entry[:2])]


def for_client(rows: Iterable[Row], client: str, columns: Sequence[str]) -> list[Row]:
    """Return rows with these columns and the client's name."""
    return [{**{column: row[column] for column in columns}, "client": client} for row in rows]


def intents(data: Path, out: Path, seed: int) -> None:
    """Write siblings, unequal and hostile: groups of intents, two clients each."""
    train, test, columns = read(data, "banking77.train"), read(data, "banking77.test"), ("text", "label_text")
    known = {row["text"].strip() for row in test}
    train = [row for row in train if row["text"].strip() not in known]
    for group, names in GROUPS.items():
        rng = random.Random(f"{seed}/{group}")
        rows = stratified([row for row in train if row["label_text"] in names], "label_text", rng)
        tests = stratified([row for row in test if row["label_text"] in names], "label_text", rng)[:TEST_ROWS]
        both = [row for client in "ab" for row in for_client(tests, client, columns)]
        for scenario, sizes in (("siblings", (SIBLING_ROWS,) * 2), ("unequal", UNEQUAL_ROWS[group])):
            first, second = rows[: sizes[0]], rows[sizes[0] : sum(sizes)]
            write(
                out / scenario / f"{group}.jsonl", [*for_client(first, "a", columns), *for_client(second, "b", columns)]
            )
            write(out / scenario / f"{group}.test.jsonl", both)
        if group == "cards":
            other = for_client(rows[2 * SIBLING_ROWS : 3 * SIBLING_ROWS], HOSTILE, columns)
            for part, name in ((other, "hostile"), (for_client(tests, HOSTILE, columns), "hostile.test")):
                labels = rng.sample([row["label_text"] for row in part], len(part))
                shuffled = [{**row, "label_text": label} for row, label in zip(part, labels, strict=True)]
                write(out / "hostile" / f"{name}.jsonl", shuffled)


def labels(data: Path, out: Path, seed: int) -> None:
    """Write label skew: SNLI, which the configuration partitions by Dirichlet."""
    for split, count in (("train", SNLI_ROWS), ("test", 6 * TEST_ROWS)):
        rows = [
            row for row in read(data, f"snli.{split}") if len(f"{row['premise']} {row['hypothesis']}".split()) <= 24
        ]
        chosen = stratified(rows, "label_text", random.Random(f"{seed}/snli/{split}"))[:count]
        columns = ("premise", "hypothesis", "label_text")
        write(out / "labels" / f"snli.{split}.jsonl", ({column: row[column] for column in columns} for row in chosen))


def tasks(data: Path, out: Path, seed: int) -> None:
    """Write strangers: six tasks of Super-NaturalInstructions, one client each."""
    for split, count in (("train", NI_ROWS), ("test", 40)):
        rows, kept = read(data, f"natural_instructions.{split}"), list[Row]()
        for category in sorted({row["category"] for row in rows}):
            of_task = [row for row in rows if row["category"] == category]
            drawn = random.Random(f"{seed}/{category}/{split}").sample(of_task, min(count, len(of_task)))
            kept += for_client(drawn, category.partition("_")[0], ("instruction", "context", "response"))
        write(out / "strangers" / f"tasks.{split}.jsonl", kept)


def sites(data: Path, out: Path, seed: int) -> None:
    """Write sites: questions and short answers of MedQuAD, one client per NIH site."""
    rows = read(data, "medquad")
    training, test = list[Row](), list[Row]()
    for site in SITES:
        short = [
            {**row, "response": " ".join(row["response"].split()[:MAX_ANSWER_WORDS])}
            for row in rows
            if row["source"] == site
        ]
        drawn = random.Random(f"{seed}/{site}").sample(short, min(SITE_ROWS + 30, len(short)))
        test += for_client(drawn[:30], site, ("instruction", "response"))
        training += for_client(drawn[30:], site, ("instruction", "response"))
    write(out / "sites" / "medquad.jsonl", training)
    write(out / "sites" / "medquad.test.jsonl", test)


def main() -> None:
    """Write all scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data", metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for scenario in (intents, labels, tasks, sites):
        scenario(options.data, options.out, options.seed)
        print(f"{scenario.__name__}: written to {options.out}")


if __name__ == "__main__":
    main()
