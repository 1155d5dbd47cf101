"""Write the data of this folder: DBpedia's texts with four coarse topics in place of its fourteen classes.

    python experiments/privacy/make_data.py DATA [--out experiments/privacy/data]

DATA is a folder with dbpedia14 (JSON lines, also with .gz; title, text, label_text). Companies and means of
transportation are left out. A row has the columns text, topic and class.
"""

import argparse
import gzip
import json
from pathlib import Path

TOPICS = {
    "person": ("Athlete", "Artist", "Office Holder"),
    "place": ("Village", "Natural Place", "Building", "Educational Institution"),
    "work": ("Written Work", "Film", "Album"),
    "species": ("Plant", "Animal"),
}
"""DBpedia's classes by topic."""
TOPIC_OF = {name: topic for topic, names in TOPICS.items() for name in names}


def main() -> None:
    """Read the command line and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    chosen = parser.parse_args()
    source = next(path for path in sorted(chosen.data.glob("dbpedia14.jsonl*")))
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    chosen.out.mkdir(parents=True, exist_ok=True)
    with (chosen.out / "topics.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            if topic := TOPIC_OF.get(row["label_text"]):
                values = {"text": row["text"], "topic": topic, "class": row["label_text"]}
                file.write(json.dumps(values, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
