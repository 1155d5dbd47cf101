"""Write a federated task with images, a small base that reads images, and a config: all made here, nothing downloaded.

    python scripts/make_image_task.py images
    fedamole run images/images.toml

Four clients have pictures of one to three shapes of one kind and colour. Each asks another question about its
pictures: their colour, kind, number, or side. The base is the bundled language model behind a vision tower of LLaVA's
architecture with random weights, which is never trained: its vectors depend on the picture, and the adapters learn to
read them.
"""

import argparse
import json
import random
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

SIDE, PATCH, WIDTH = 32, 8, 48
"""Sides of a picture and of a patch in pixels, and the width of the vision tower."""
PLACEHOLDER = "<image>"
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}
KINDS = ("circle", "square", "triangle")
QUESTIONS = {
    "colour": "What colour are the shapes?",
    "kind": "What kind of shapes are they?",
    "count": "How many shapes are there?",
    "side": "On which side are the shapes?",
}
NUMBERS = ("one", "two", "three")
CONFIG = """# A federated task with images: four clients ask different questions about pictures of shapes.

[run]
name = "images"
threads = 1

[base]
model = "base"
images = true
targets = ["q_proj", "v_proj", "o_proj"]

[federation]
rounds = 6

[training]
local_steps = 40
batch_size = 4
learning_rate = 5e-3
max_length = 64

[data]
validation_share = 0.15
test_share = 0.15
embedding_share = 0.1

[data.templates.question]
prompt = "{question}\\n"
image = "{picture}"
answer = "{answer}"
options_from = "answer"
"""


@dataclass(frozen=True)
class Picture:
    """What a picture shows."""

    colour: str
    kind: str
    count: int
    side: str

    def answer(self, question: str) -> str:
        """Return the answer to one of QUESTIONS."""
        return NUMBERS[self.count - 1] if question == "count" else str(getattr(self, question))

    def draw(self, rng: random.Random) -> Image.Image:
        """Draw the shapes into one half of the picture, one above the other."""
        image = Image.new("RGB", (SIDE, SIDE), (rng.randrange(40),) * 3)
        pen = ImageDraw.Draw(image)
        left = (1 if self.side == "left" else SIDE // 2 + 1) + rng.randrange(4)
        rows = rng.sample(range(3), self.count)
        for row in rows:
            top, size = 1 + 10 * row + rng.randrange(2), 8
            box = (left, top, left + size, top + size)
            if self.kind == "circle":
                pen.ellipse(box, fill=COLOURS[self.colour])
            elif self.kind == "square":
                pen.rectangle(box, fill=COLOURS[self.colour])
            else:
                corners = [(left, top + size), (left + size, top + size), (left + size // 2, top)]
                pen.polygon(corners, fill=COLOURS[self.colour])
        return image


def drawn(rng: random.Random) -> Picture:
    """Draw the contents of a picture; all are equally likely."""
    return Picture(rng.choice(list(COLOURS)), rng.choice(KINDS), rng.randint(1, 3), rng.choice(("left", "right")))


def write_data(folder: Path, rows: int, seed: int) -> None:
    """Write `rows` pictures and a JSON Lines file of questions for each of the four clients."""
    for question, text in QUESTIONS.items():
        rng = random.Random(f"{seed} {question}")
        (folder / question).mkdir(parents=True, exist_ok=True)
        lines = []
        for number in range(rows):
            picture, name = drawn(rng), f"{question}/{number:04}.png"
            picture.draw(rng).save(folder / name)
            lines.append(json.dumps({"picture": name, "question": text, "answer": picture.answer(question)}) + "\n")
        (folder / f"{question}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_base(folder: Path, seed: int) -> None:
    """Write a LLaVA model around the bundled language model, with its processor."""
    bundled = str(files("fedamole") / "bundled" / "base")
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    tokenizer.add_tokens([PLACEHOLDER], special_tokens=True)
    language_model = AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        config = LlavaConfig(
            text_config=language_model.config,
            vision_config=CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=SIDE,
                patch_size=PATCH,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids(PLACEHOLDER),
            image_seq_length=(SIDE // PATCH) ** 2,
            vision_feature_layer=-1,
            tie_word_embeddings=True,
        )
        model = LlavaForConditionalGeneration(config)
        model.model.language_model.load_state_dict(language_model.model.state_dict())
        sizes = {"height": SIDE, "width": SIDE}
        processor = LlavaProcessor(
            image_processor=CLIPImageProcessorPil(size=sizes, crop_size=sizes),
            tokenizer=tokenizer,
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            image_token=PLACEHOLDER,
            num_additional_image_tokens=1,
        )
        _set_projector(model.eval(), processor, random.Random(seed))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _set_projector(model: Any, processor: Any, rng: random.Random) -> None:
    """Set the projector so that the patches of pictures become vectors as long and as different as word vectors.

    The first layer maps the vision tower's vectors to random combinations of their principal components, each with mean
    0 and variance 1; the second is random, scaled to the standard deviation of the word vectors.
    """
    pictures = [drawn(rng).draw(rng) for _ in range(200)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
    layers = model.model.multi_modal_projector
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels).last_hidden_state[:, 1:].flatten(0, 1)
        mean, (_, scale, directions) = hidden.mean(0), torch.linalg.svd(hidden - hidden.mean(0), full_matrices=False)
        whitening = directions[:24] / scale[:24, None] * len(hidden) ** 0.5
        width = layers.linear_1.out_features
        mixing = torch.randn(width, len(whitening)) / len(whitening) ** 0.5
        layers.linear_1.weight.copy_(mixing @ whitening)
        layers.linear_1.bias.copy_(-layers.linear_1.weight @ mean)
        layers.linear_2.weight.normal_(0, width**-0.5)
        layers.linear_2.bias.zero_()
        vectors = layers(hidden)
        words = model.get_input_embeddings().weight.std()
        layers.linear_2.weight.mul_(words / vectors.std())


def write_task(folder: Path, rows: int = 80, seed: int = 0) -> None:
    """Write base, data and config into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_base(folder / "base", seed)
    write_data(folder, rows, seed)
    sources = "".join(
        f'\n[[data.source]]\nname = "{question}"\npath = "{question}.jsonl"\ntemplate = "question"\n'
        for question in QUESTIONS
    )
    (folder / "images.toml").write_text(f'{CONFIG}{sources}\n[method]\nname = "fedit"\n', encoding="utf-8")


def main() -> None:
    """Write the task into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=80, help="rows of each client (80)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_task(arguments.folder, arguments.rows, arguments.seed)


if __name__ == "__main__":
    main()
