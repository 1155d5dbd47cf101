"""The model card of an export."""

import json
from pathlib import Path
from typing import Any

from fedamole.model.base import is_path
from fedamole.personal.saved_models import SavedModel
from fedamole.reporting.markdown import code, literal, table
from fedamole.runs.adapter_folder import CARD

LOAD = {
    "lora": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

folder = "path/to/this/folder"  # or its name on the hub
model = AutoPeftModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"  # or its name on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)""",
}


def export_card(model: SavedModel, base: str, report: dict[str, Any]) -> str:
    """Return the card of an export, without paths of this machine.

    The sections on data, method, test scores and privacy are those of the personal model's card, if it has one.

    Args:
        model: The personal model.
        base: Name of its base, a hub id or a path.
        report: The report of `export`.
    """
    public = None if is_path(base) else base
    losses = [(name, f"{value:.4f}") for name, value in report["losses"].items()]
    kind = "A LoRA" if report["to"] == "lora" else "A complete model with a merged LoRA"
    exact = (
        "It is equal to the personal model."
        if report["exact"]
        else (f"It approximates the personal model by a LoRA of rank {report['rank']}; the losses below show how well.")
    )
    parts = [
        _front_matter(report["to"], public),
        f"# A personal model of {literal(report['client'])}, exported\n\n{kind}, exported by fedamole from the "
        f"personal model of the client {code(report['client'])}. {exact}\n\nNo licence has been chosen: the owner "
        "fills in `license` and `license_name` above. The terms of the base's licence apply to this model too.",
        "## Validation loss\n\nIn nats per answer token, on the client's validation split.\n\n"
        + table(("model", "loss"), losses),
        f"## Load it\n\n```python\n{LOAD[report['to']]}\n```",
        *_sections(model.folder / CARD),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(kind: str, public: str | None) -> str:
    fields: dict[str, Any] = {
        "library_name": "peft" if kind == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "unspecified",
        "tags": ["fedamole", "federated-learning", "personalised"],
        **({} if public is None else {"base_model": public}),
    }
    return "\n".join(("---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"))


def _sections(card: Path) -> list[str]:
    """Return the sections of a personal model's card that hold for its export too; empty if there is no card."""
    if not card.is_file():
        return []
    titles = {"## Data": "## Data", "## Method": "## Method", "## Test scores": "## Test scores of the personal model"}
    sections = card.read_text(encoding="utf-8", errors="replace").split("\n\n## ")[1:]
    kept = []
    for section in sections:
        title, _, body = section.partition("\n")
        if (renamed := titles.get(f"## {title}")) is not None:
            kept.append(f"{renamed}\n{body}".rstrip())
        elif title == "Privacy":
            points = [point for point in body.strip().splitlines() if "adapter_config.json" not in point]
            kept.append("## Privacy\n\n" + "\n".join(points))
    return kept
