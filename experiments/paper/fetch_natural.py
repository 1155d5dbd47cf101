"""Download the tasks of natural.toml from the Hugging Face Hub, each into the file that its source reads."""

import tomllib
from pathlib import Path

from datasets import load_dataset

HUB = "Muennighoff/natural-instructions"


def main() -> None:
    """Download the tasks whose files do not exist yet."""
    folder = Path(__file__).parent
    for source in tomllib.loads((folder / "natural.toml").read_text())["data"]["source"]:
        path = (folder / source["path"]).resolve()
        if path.exists():
            continue
        # The data set has one file per task.
        rows = load_dataset(HUB, data_files=f"train/{source['name']}*", split="train")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows.to_json(path)
        print(f"{len(rows):6} rows  {path}")


if __name__ == "__main__":
    main()
