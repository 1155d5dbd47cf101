"""A base that reads images: batches of images of several clients against single images."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fedamole.errors import BaseModelError, ConfigError
from fedamole.evaluation import likelihood
from fedamole.evaluation.generation import generate_ids
from fedamole.evaluation.likelihood import option_losses
from fedamole.model import vision
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.batch import TokenPair, collate
from fedamole.model.media import ImageIds, Picture, media_of
from fedamole.model.params import Adapter, new_shared
from fedamole.model.prompt import PROMPT, PromptSpec
from fedamole.received.images import checked_image
from tests.model.image_bases import gemma3, idefics3

CPU = torch.device("cpu")


def loaded(folder: Path) -> Base:
    return load_base(BaseSettings(str(folder), images=True), CPU, Path("/"))


@pytest.fixture(scope="module")
def llava(image_task: Path) -> Base:
    base = loaded(image_task / "base")
    base.model.double()
    return base


@pytest.fixture(scope="module", params=["llava", "idefics3"])
def bank(request: Any, image_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """In float64, with adapters of two clients that change the answers."""
    if request.param == "idefics3":
        folder = tmp_path_factory.mktemp("idefics3")
        idefics3(folder)
    else:
        folder = image_task / "base"
    base = loaded(folder)
    base.model.double()
    made = Bank(base)
    made.load([adapter(base, 1), adapter(base, 2)])
    return made


def adapter(base: Base, seed: int) -> Adapter:
    tensors = new_shared(base.shapes, 4, torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(seed)
    drawn = {
        name: (0.3 * torch.randn(tensor.shape, generator=draw) if name.endswith("/B") else tensor).double()
        for name, tensor in tensors.items()
    }
    return Adapter(AdapterSpec(4, 8.0), drawn)


def pictures(base: Base) -> list[Picture]:
    """Pictures of three sizes and colours."""
    assert base.images is not None
    sizes = [(9, 4), (4, 9), (16, 16)]
    return [
        base.images.picture(Image.effect_noise(size, 50 + 10 * i).convert("RGB"), str(i))
        for i, size in enumerate(sizes)
    ]


def rows(base: Base) -> list[list[TokenPair]]:
    """Two clients; the second has a row without an image between two with one."""
    first, second, third = pictures(base)
    return [
        [(ImageIds((5, *first.ids, 6, 7), first), (8, 9))],
        [
            (ImageIds((*second.ids, 6), second), (8,)),
            ((5, 6), (7, 8, 9)),
            (ImageIds((4, 4, 4, 4, *third.ids, 7), third), (9, 8)),
        ],
    ]


def own_logits(bank: Bank, client: int, prompt: Any, answer: Any) -> torch.Tensor:
    """Logits of one row alone, from the model's own forward pass."""
    bank.select_clients(client, client + 1)
    ids = torch.tensor([[*prompt, *answer]])
    media = {}
    if isinstance(prompt, ImageIds):
        media = {k: v.double() if v.is_floating_point() else v for k, v in prompt.picture.media.items()}
    with torch.no_grad():
        logits: torch.Tensor = bank.base.model(input_ids=ids, use_cache=False, **media).logits
    bank.select_clients(0, 2)
    return logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_several_clients_in_one_batch(bank: Bank, packed: bool) -> None:
    """Each client's rows go through its adapter with their own image, whatever else is in the batch."""
    clients = rows(bank.base)
    assert bank.packs
    expected = [own_logits(bank, i, *pair) for i, part in enumerate(clients) for pair in part]
    with torch.no_grad(), bank.forward(collate(clients, bank.base.pad_id, packed)) as logits:
        assert torch.allclose(logits, torch.cat(expected), atol=1e-9)


def test_the_image_changes_the_answers(bank: Bank) -> None:
    ((prompt, answer),) = rows(bank.base)[0]
    assert isinstance(prompt, ImageIds)
    other = ImageIds(prompt, replace(prompt.picture, media=_negative(prompt.picture)))
    both = [own_logits(bank, 0, ids, answer) for ids in (prompt, other)]
    assert (both[0] - both[1]).abs().max() > 1e-3


def _negative(picture: Picture) -> dict[str, torch.Tensor]:
    return {name: -value if value.is_floating_point() else value for name, value in picture.media.items()}


def test_option_losses(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the prefix tree after one pass over the prompts, from whole rows, and by hand."""
    options = ((8, 9), (8, 7), (6,))
    examples = [[(prompt, options) for prompt, _ in part] for part in rows(bank.base)]
    by_tree = option_losses(bank, examples, 10_000)
    monkeypatch.setattr(likelihood, "_tree_losses", None)
    monkeypatch.setattr(bank, "packs", False)
    by_row = option_losses(bank, examples, 10_000)
    for client, part in enumerate(examples):
        for i, (prompt, _) in enumerate(part):
            by_hand = []
            for option in options:
                chosen = own_logits(bank, client, prompt, option).log_softmax(1)
                by_hand.append(-float(chosen.gather(1, torch.tensor(option)[:, None]).mean()))
            assert by_tree[client][i] == pytest.approx(by_hand, abs=1e-9)
            assert by_row[client][i] == pytest.approx(by_hand, abs=1e-9)


def test_generation(bank: Bank) -> None:
    """Greedy tokens of a padded batch of both clients against one row at a time, token by token without a cache."""
    prompts = [[prompt for prompt, _ in part] for part in rows(bank.base)]
    answers = generate_ids(bank, prompts, 3, 10_000)
    assert bank.base.images is not None
    for client, part in enumerate(prompts):
        for i, prompt in enumerate(part):
            ids: tuple[int, ...] = ()
            for _ in answers[client][i]:
                logits = own_logits(bank, client, prompt, (*ids, 0))[-1]
                logits[bank.base.images.token_id] = -torch.inf
                ids = (*ids, int(logits.argmax()))
            assert answers[client][i] == ids


def test_adapters_are_in_the_language_model_alone(bank: Bank) -> None:
    names = [name for name, _ in bank.base.model.named_modules() if name.endswith("q_proj")]
    assert any("vision" in name for name in names), "the tower has linears of the same name"
    assert bank.base.shapes
    assert not [name for name in bank.base.shapes if "vision" in name or "proj" in name.split(".")[1]]


def test_virtual_tokens_stand_before_the_image(llava: Base) -> None:
    """A soft prompt of which each vector is the embedding of a word gives what the words give."""
    bank, words = Bank(llava), (8, 9)
    vectors = llava.model.get_input_embeddings().weight[list(words)].clone()
    bank.load([Adapter(PromptSpec(2), {PROMPT: vectors})])
    ((prompt, answer),) = rows(llava)[0]
    with torch.no_grad(), bank.forward(collate(bank.prefixed([[(prompt, answer)]]), 1)) as logits:
        virtual = logits.clone()
    bank.load([])
    assert isinstance(prompt, ImageIds)
    spelt = ImageIds((*words, *prompt), prompt.picture)
    with torch.no_grad(), bank.forward(collate([[(spelt, answer)]], 1)) as logits:
        assert torch.allclose(virtual, logits, atol=1e-9)


def test_tensors_of_different_sizes_are_padded_with_zeros() -> None:
    """Images of 1 x 2 and 2 x 1 pixels become two of 2 x 2; whole numbers stay whole numbers."""
    wide = Picture((1,), {"pixels": torch.tensor([[[1.0, 2.0]]]), "sizes": torch.tensor([[1, 2]])}, "a")
    high = Picture((1,), {"pixels": torch.tensor([[[3.0], [4.0]]]), "sizes": torch.tensor([[2, 1]])}, "b")
    prompts = [ImageIds((1,), wide), (5,), ImageIds((1,), high)]
    media = media_of(prompts, CPU, torch.float64)
    assert media["pixels"].tolist() == [[[1, 2], [0, 0]], [[3, 0], [4, 0]]]
    assert media["pixels"].dtype == torch.float64
    assert media["sizes"].tolist() == [[1, 2], [2, 1]]
    assert media_of([(5,)], CPU, torch.float64) == {}


def test_prompts_with_the_same_ids_and_other_images_differ() -> None:
    first, same, other = (ImageIds((1, 2), Picture((1,), {}, digest)) for digest in "aab")
    assert first == same
    assert hash(first) == hash(same)
    assert first != other
    assert first != (1, 2)
    assert (1, 2) not in [first]
    assert len({first, same, other, (1, 2)}) == 3
    assert isinstance(first[1:], ImageIds)
    assert (first[1:], first[0]) == (ImageIds((2,), first.picture), 1)


def test_images_that_left_the_cache_are_preprocessed_again(image_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of two images of 32 x 32 pixels: 3 x 32 x 32 x 4 bytes each. The third removes the first."""
    monkeypatch.setattr(vision, "MOST_CACHED", 2 * 12_288)
    reader = loaded(image_task / "base").images
    assert reader is not None
    read, make = list[str](), reader.picture

    def counted(image: Any, digest: str) -> Picture:
        read.append(digest[:4])
        return make(image, digest)

    monkeypatch.setattr(reader, "picture", counted)
    contents = [(image_task / "colour" / f"000{i}.png").read_bytes() for i in range(3)]
    made = [reader.read(content, "f") for content in contents]
    prompts = [ImageIds(picture.ids, picture) for picture in made]
    assert len(read) == 3
    media_of([prompts[1], prompts[2]], CPU, torch.float32)
    assert len(read) == 3, "the two that were read last are in the cache"
    pixels = media_of(prompts, CPU, torch.float32)["pixel_values"]
    assert read[3] == made[0].digest[:4]
    monkeypatch.undo()
    for own, content in zip(pixels, contents, strict=True):
        expected = reader.picture(checked_image(content, "f"), "").media["pixel_values"][0]
        assert torch.equal(own, expected)


# --- bases that cannot be used -------------------------------------------------------------------------------------


def test_a_base_without_an_image_part(tiny: Path) -> None:
    with pytest.raises(BaseModelError, match="LlamaConfig has no image part"):
        loaded(tiny / "base")


def test_a_base_whose_image_tokens_see_each_other(tmp_path: Path) -> None:
    """Gemma 3 needs token types beside the ids; without them its logits are others."""
    gemma3(tmp_path)
    with pytest.raises(BaseModelError, match="reads images in a batch differently than one by one"):
        Bank(loaded(tmp_path))


def test_a_base_that_ignores_images(image_task: Path) -> None:
    base = loaded(image_task / "base")
    base.model.model.multi_modal_projector.linear_2.weight.zero_()
    with pytest.raises(BaseModelError, match="its answers do not depend on the image"):
        Bank(base)


def test_images_that_affect_each_other(image_task: Path) -> None:
    """A tower that subtracts the mean over the batch gives one image nothing."""
    base = loaded(image_task / "base")
    base.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, inputs: (inputs[0] - inputs[0].mean(0),))
    with pytest.raises(BaseModelError, match="reads images in a batch differently"):
        Bank(base)


def test_a_processor_without_a_placeholder() -> None:
    with pytest.raises(BaseModelError, match="has no placeholder token for images"):
        vision.ImageReader(type("Odd", (), {"tokenizer": type("T", (), {"get_vocab": dict})()})(), "odd")


def test_a_processor_that_needs_another_package(image_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the processors of some bases need torchvision."""
    import transformers

    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("needs torchvision")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)
    with pytest.raises(BaseModelError, match="its image processor cannot be loaded: needs torchvision"):
        loaded(image_task / "base")


def test_without_pillow(image_task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"images need Pillow, which is not installed; .*\[vision\]"):
        loaded(image_task / "base")
    assert load_base(BaseSettings(str(image_task / "base")), CPU, Path("/")).images is None


def test_a_base_without_a_processor(image_task: Path, tmp_path: Path) -> None:
    for path in (image_task / "base").iterdir():
        if "processor" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(BaseModelError, match=r"cannot be loaded|has no placeholder"):
        loaded(tmp_path)
