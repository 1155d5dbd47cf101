"""A variational autoencoder from hidden states to virtual tokens, and sums of latent vectors by class.

The encoder maps the last hidden state h (d) at a prompt's end to a normal distribution of latent vectors z (k). The
decoder maps z to L virtual tokens. Its reconstruction of h is the hidden state that the language model computes from
them. Source: Chen and Vikalo, "Federated Learning in Non-IID Settings Aided by Differentially Private Synthetic Data",
2022, https://arxiv.org/abs/2206.00686, whose autoencoder reconstructs images.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedamole.model.params import Tensors

ENCODER, DECODER = "encoder/", "decoder/"
"""Prefixes of the names of an autoencoder's tensors."""


@dataclass(frozen=True)
class AutoencoderSizes:
    """Sizes of an autoencoder."""

    hidden_size: int
    """Units of the one hidden layer of the encoder, and of the decoder."""
    latent_size: int
    """Size k of a latent vector."""
    virtual_tokens: int
    """Virtual tokens L that the decoder makes."""


def new_autoencoder(sizes: AutoencoderSizes, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return an untrained autoencoder for hidden states and token embeddings of this width d."""
    hidden, latent = sizes.hidden_size, sizes.latent_size
    shapes = {
        f"{ENCODER}in": (hidden, width),
        f"{ENCODER}mean": (latent, hidden),
        f"{ENCODER}log_variance": (latent, hidden),
        f"{DECODER}in": (hidden, latent),
        f"{DECODER}out": (sizes.virtual_tokens * width, hidden),
    }
    tensors = {}
    for name, (rows, columns) in shapes.items():
        tensors[name] = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
        tensors[f"{name}_bias"] = torch.zeros(rows)
    return tensors


def encode(tensors: Tensors, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and logarithms of the variances (N, k) of the latent vectors of hidden states (N, d)."""
    inner = torch.tanh(_linear(tensors, f"{ENCODER}in", normalised(hidden)))
    return _linear(tensors, f"{ENCODER}mean", inner), _linear(tensors, f"{ENCODER}log_variance", inner)


def decode(tensors: Tensors, latent: Tensor, width: int, scale: float) -> Tensor:
    """Return the virtual tokens (N, L, d) of latent vectors (N, k); `scale` is the size of token embeddings."""
    inner = torch.tanh(_linear(tensors, f"{DECODER}in", latent))
    vectors = _linear(tensors, f"{DECODER}out", inner)
    return scale * vectors.view(len(latent), -1, width)


def normalised(hidden: Tensor) -> Tensor:
    """Give each hidden state (N, d) mean 0 and variance 1."""
    scaled: Tensor = F.layer_norm(hidden, hidden.shape[-1:])
    return scaled


def autoencoder_loss(read: Tensor, real: Tensor, mean: Tensor, log_variance: Tensor, kl_weight: float) -> Tensor:
    """Return the mean squared error of reconstructed states (N, d) plus `kl_weight` times the mean divergence.

    Both hidden states are normalised first. The divergence from the standard normal distribution is the mean over the
    values of the latent vectors, whose means and logarithms of the variances are (N, k).
    """
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
    return (normalised(read) - normalised(real)).square().mean() + kl_weight * divergence


def clipped(vectors: Tensor, norm: float) -> Tensor:
    """Shorten each vector (N, k) that is longer than `norm` to it; values that are not finite become 0."""
    finite = vectors.nan_to_num(0.0, 0.0, 0.0)
    lengths: Tensor = torch.linalg.vector_norm(finite, dim=1, keepdim=True)
    return finite * (norm / lengths.clamp(min=norm))


def class_sums(latents: Mapping[int, Tensor], classes: int, norm: float) -> Tensor:
    """Return for each class the sum of its clipped latent vectors, and `norm` times their number: (classes, k + 1).

    `latents` (n, k) are by class, at least one of them; classes are numbered below `classes`. float64 on the CPU.

    If one example is replaced, also by one of another class, all these values together change by at most 2 `norm` in
    L2: within a class the sum changes by at most 2 `norm` and the number not at all; between classes two sums change by
    at most `norm` each, and two numbers by 1 each.
    """
    size = next(iter(latents.values())).shape[1]
    sums = torch.zeros(classes, size + 1, dtype=torch.float64)
    for label, vectors in latents.items():
        sums[label, :size] = clipped(vectors.double().cpu(), norm).sum(0)
        sums[label, size] = norm * len(vectors)
    return sums


def class_means(sums: Tensor, norm: float, min_count: float) -> dict[int, Tensor]:
    """Return the mean latent vector (k) by class, float32, from `class_sums` with noise.

    A class whose number with noise is below `min_count` is left out, and a mean longer than `norm` is shortened to it.
    """
    means = {}
    for label, values in enumerate(sums):
        count = float(values[-1]) / norm
        if count >= min_count:
            means[label] = clipped((values[:-1] / count).unsqueeze(0), norm)[0].float()
    return means


def _linear(tensors: Tensors, name: str, inputs: Tensor) -> Tensor:
    return F.linear(inputs, tensors[name], tensors[f"{name}_bias"])
