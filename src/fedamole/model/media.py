"""Prompts with images: token ids that carry the tensors which a base's processor made from the image.

A prompt with an image is a tuple of ids like any other prompt, in which a placeholder token is repeated as often as the
image has vectors. The tensors travel with the ids through batches of any clients and are put together again for each
forward pass.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.model.segments import to_device


@dataclass(frozen=True, eq=False)
class Picture:
    """One preprocessed image."""

    ids: tuple[int, ...]
    """What replaces the placeholder in a prompt: the placeholder tokens, and tokens around them if the base has any."""
    media: Mapping[str, Tensor]
    """Inputs of the base by name, such as `pixel_values`. The first dimension is that of a batch. They may be computed
    again whenever they are read."""
    digest: str
    """SHA-256 of the image file; prompts with the same ids and different images are different prompts."""


class ImageIds(tuple[int, ...]):
    """Token ids of a prompt with one image. A slice keeps the image, so it must contain all its placeholder tokens."""

    picture: Picture

    def __new__(cls, ids: Iterable[int], picture: Picture) -> "ImageIds":
        """Attach the preprocessed image to ids that contain its placeholder tokens."""
        self = super().__new__(cls, ids)
        self.picture = picture
        return self

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return ImageIds(part, self.picture) if isinstance(index, slice) else part

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, ImageIds) and other.picture.digest == self.picture.digest
        return same and tuple.__eq__(self, other) is True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple.__hash__(self), self.picture.digest))


def with_prefix(prefix: Sequence[int], prompt: Sequence[int]) -> Sequence[int]:
    """Return a prompt with tokens before it; a prompt with an image keeps the image."""
    ids = (*prefix, *prompt)
    return ImageIds(ids, prompt.picture) if isinstance(prompt, ImageIds) else ids


def media_of(prompts: Iterable[Sequence[int]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the images' inputs of a batch, in the order of the prompts; empty for prompts without images.

    Tensors of different sizes are padded with zeros on the right, as processors do, and concatenated. Floating-point
    tensors are converted to `dtype`.
    """
    pictures = [prompt.picture for prompt in prompts if isinstance(prompt, ImageIds)]
    loaded = [dict(picture.media) for picture in pictures]
    media = {}
    for name in dict.fromkeys(name for tensors in loaded for name in tensors):
        parts = [tensors[name] for tensors in loaded]
        largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        joined = torch.cat([_padded(part, largest) for part in parts])
        media[name] = to_device(joined.to(dtype) if joined.is_floating_point() else joined, device)
    return media


def _padded(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Pad all dimensions but the first with zeros at the end."""
    missing = [size - own for own, size in zip(tensor.shape[1:], sizes, strict=True)]
    return F.pad(tensor, [pad for size in reversed(missing) for pad in (0, size)]) if any(missing) else tensor
