"""The image part of a base: its processor, and a test that batches of images give what single images give."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from typing_extensions import override

from fedamole.errors import BaseModelError
from fedamole.model.batch import Batch, Ids, TokenPair, collate
from fedamole.model.causality import near
from fedamole.model.media import ImageIds, Picture
from fedamole.received.images import checked_image

if TYPE_CHECKING:
    from fedamole.model.base import Base

PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""Outputs of processors that have one entry for each token. They are not kept: a row's ids are known, the mask follows
from them, and bases that need token types do not pass `check_images`."""


MOST_CACHED = 4 * 2**30
"""Bytes of preprocessed images that stay in memory: those of 7,000 images of 224 x 224 pixels."""


class MediaCache:
    """The preprocessed images that were used last, by digest, of at most `most` bytes in total."""

    def __init__(self, most: int) -> None:
        """Start empty."""
        self.most, self.size = most, 0
        self._media = OrderedDict[str, Mapping[str, Tensor]]()

    def get(self, digest: str) -> Mapping[str, Tensor] | None:
        """Return an image's tensors, or None if they are not in the cache."""
        if digest in self._media:
            self._media.move_to_end(digest)
        return self._media.get(digest)

    def add(self, digest: str, media: Mapping[str, Tensor]) -> None:
        """Add an image, and remove those that were not used for longest."""
        if digest in self._media:
            return
        self._media[digest] = media
        self.size += _bytes(media)
        while self.size > self.most:
            self.size -= _bytes(self._media.popitem(last=False)[1])


def _bytes(media: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in media.values())


class CachedMedia(Mapping[str, Tensor]):
    """The tensors of an image, preprocessed again when they are no longer in the cache."""

    def __init__(self, cache: MediaCache, digest: str, preprocess: Callable[[], Mapping[str, Tensor]]) -> None:
        """Use what `preprocess` returns for the image with this digest."""
        self._cache, self._digest, self._preprocess = cache, digest, preprocess

    def _load(self) -> Mapping[str, Tensor]:
        media = self._cache.get(self._digest)
        if media is None:
            media = self._preprocess()
            self._cache.add(self._digest, media)
        return media

    @override
    def __getitem__(self, name: str) -> Tensor:
        return self._load()[name]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._load())

    @override
    def __len__(self) -> int:
        return len(self._load())


class ImageReader:
    """Preprocesses images with a base's own processor. The result for an image is shared by all rows that use it."""

    def __init__(self, processor: Any, name: str) -> None:
        """Use a processor of transformers; BaseModelError if it has no placeholder for images. `name` is the base's."""
        self.processor = processor
        token = getattr(processor, "image_token", None)
        self.token = str(getattr(token, "content", token))
        """Text of the placeholder, a special token."""
        ids = getattr(processor, "tokenizer", processor).get_vocab()  # without an image part it is the tokenizer itself
        if token is None or self.token not in ids:
            raise BaseModelError(
                f"base {name!r}: base.images = true, but its processor ({type(processor).__name__}) has no placeholder "
                "token for images; choose a base such as LLaVA, Idefics3 or SmolVLM"
            )
        self.token_id = int(ids[self.token])
        self._pictures, self._cache = WeakValueDictionary[str, Picture](), MediaCache(MOST_CACHED)

    def read(self, content: bytes, where: str) -> Picture:
        """Return the preprocessed image of a file's content; DataError, which begins with `where`, if it is none."""
        digest = hashlib.sha256(content).hexdigest()
        picture = self._pictures.get(digest)
        if picture is None:
            first = self.picture(checked_image(content, where), digest)
            self._cache.add(digest, first.media)

            def preprocess() -> Mapping[str, Tensor]:
                return self.picture(checked_image(content, where), digest).media

            picture = replace(first, media=CachedMedia(self._cache, digest, preprocess))
            self._pictures[digest] = picture
        return picture

    def picture(self, image: Any, digest: str) -> Picture:
        """Preprocess a Pillow image in RGB."""
        inputs = self.inputs(self.token, image)
        media = {name: value for name, value in inputs.items() if name not in PER_TOKEN and torch.is_tensor(value)}
        return Picture(tuple(inputs["input_ids"][0].tolist()), media, digest)

    def inputs(self, text: str, image: Any) -> dict[str, Any]:
        """Return what the processor makes of a text with one placeholder and an image, without added special tokens."""
        return dict(self.processor(text=[text], images=[image], add_special_tokens=False, return_tensors="pt"))

    def expand(self, prompt: tuple[int, ...], picture: Picture) -> ImageIds:
        """Replace the one placeholder of a prompt by the tokens of an image."""
        index = prompt.index(self.token_id)
        return ImageIds((*prompt[:index], *picture.ids, *prompt[index + 1 :]), picture)


def trial_images() -> list[Any]:
    """Return two different small Pillow images, one wide and one high."""
    from PIL import Image

    ramp = bytes(range(0, 192, 2))  # 96 bytes: 32 pixels
    return [Image.frombytes("RGB", (8, 4), ramp), Image.frombytes("RGB", (4, 8), ramp[::-1])]


def trial_pairs(reader: ImageReader) -> list[TokenPair]:
    """Return (prompt, answer) pairs for tests of a base: two with different images and one, between them, without."""
    one, two = (
        ImageIds((*range(5, 7 + i), *picture.ids, 9), picture)
        for i, picture in enumerate(reader.picture(image, str(i)) for i, image in enumerate(trial_images()))
    )
    return [(one, (5, 6)), ((7, 8), (9,)), (two, (5, 6, 7))]


def check_images(base: "Base", forward: Callable[[Batch], AbstractContextManager[Tensor]]) -> None:
    """Raise BaseModelError unless a padded batch gives the logits that the processor's own inputs give row by row.

    They differ in bases that need an entry for each token beside the ids, or in which images of a batch affect each
    other, and do not depend on the image in bases without an image part. `forward` yields the logits of a batch.
    """
    assert base.images is not None
    problem = f"base {base.name!r} ({type(base.model).__name__}): base.images = true, but "
    remedy = "choose a base such as LLaVA, Idefics3 or SmolVLM"
    expected = list[Tensor]()
    try:
        pairs = trial_pairs(base.images)
        with torch.no_grad():
            for prompt, answer in pairs:
                ids = torch.tensor([[*prompt, *answer]], device=base.device)
                inputs = _own_inputs(base, prompt, len(answer)) if isinstance(prompt, ImageIds) else {}
                logits = base.model(input_ids=ids, use_cache=False, **inputs).logits[0]
                expected.append(logits[len(prompt) - 1 : -1].float())
            with forward(collate([pairs], base.pad_id, device=base.device)) as logits:
                parts = logits.float().split([len(answer) for _, answer in pairs])
            others = [(_inverted(prompt), answer) for prompt, answer in pairs]
            with forward(collate([others], base.pad_id, device=base.device)) as logits:
                inverted = logits.float().split([len(answer) for _, answer in pairs])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # code of any architecture
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BaseModelError(f"{problem}it cannot read a batch of images ({reason}); {remedy}") from error
    if not all(near(part, own, base.model.dtype) for part, own in zip(parts, expected, strict=True)):
        raise BaseModelError(f"{problem}it reads images in a batch differently than one by one; {remedy}")
    if torch.equal(parts[0], inverted[0]):
        raise BaseModelError(f"{problem}its answers do not depend on the image; {remedy}")


def _inverted(prompt: Ids) -> Ids:
    """Return a trial prompt with the negative of its image."""
    if not isinstance(prompt, ImageIds):
        return prompt
    media = {name: -value if value.is_floating_point() else value for name, value in prompt.picture.media.items()}
    return ImageIds(prompt, replace(prompt.picture, media=media))


def _own_inputs(base: "Base", prompt: ImageIds, more: int) -> dict[str, Tensor]:
    """Return the processor's inputs for a trial prompt with `more` tokens after it, beside the ids."""
    assert base.images is not None
    inputs = base.images.inputs(base.images.token, trial_images()[int(prompt.picture.digest)])
    before = prompt.index(prompt.picture.ids[0])
    after = len(prompt) - before - len(prompt.picture.ids) + more
    own = {}
    for name, value in inputs.items():
        if name in PER_TOKEN[2:]:
            value = torch.nn.functional.pad(value, (before, after))
        if torch.is_tensor(value) and name not in PER_TOKEN[:2]:
            value = value.to(base.model.dtype) if value.is_floating_point() else value
            own[name] = value.to(base.device)
    return own
