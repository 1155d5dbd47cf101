"""Noisy mean latent vectors of FedDPMS: how a client releases its own, and decodes those of other clients."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedamole.federation.method import Client
from fedamole.federation.privacy.gaussian import noise_multiplier, released
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import pack, unpack
from fedamole.model.amole import AdapterSpec
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter
from fedamole.synthesis.dream_exchange import DreamTask
from fedamole.synthesis.examples import VECTORS, SyntheticExamples
from fedamole.synthesis.latent_exchange import LatentKept, LatentMessage
from fedamole.synthesis.latents import class_means, class_sums, decode, encode
from fedamole.synthesis.rows import ExtraRows

Prompts = Mapping[int, Sequence[Ids]]
"""Prompts of a client's training examples by class; empty if it takes no part in the synthesis."""


@dataclass(frozen=True)
class Release:
    """How class means are released."""

    epsilon: float
    delta: float
    latent_norm: float
    """Norm to which latent vectors are clipped."""
    min_count: int
    """Smallest noisy number of examples of a class whose mean is released."""


@dataclass(frozen=True)
class Decoding:
    """How synthetic examples are made from class means."""

    rare_below: int
    """Classes of which a client has fewer training examples get synthetic ones."""
    examples_per_class: int
    """Synthetic examples of such a class, at most."""
    latent_noise: float
    """Standard deviation of the latent vectors around the mean."""


def release(
    client: Client,
    kept: LatentKept,
    message: LatentMessage,
    spec: AdapterSpec,
    prompts: Prompts,
    how: Release | None,
) -> LatentKept:
    """Return a client's next state, with the means that it releases; without `how` it releases none yet.

    A class is left out if its noisy number n is so small that the noise of its mean, whose expected length is about
    2 latent_norm m sqrt(k) / n for k latent dimensions and the noise multiplier m, would be longer than `latent_norm`.
    A client without prompts releases nothing, and one that has released keeps its means. In a deployment they are on
    the client's disk before they leave, and a repeated round releases the same ones (`Client.once`).
    """
    if kept.released or how is None or not prompts:
        return kept

    def compute() -> bytes:
        reader, latents = Adapter(spec, message.reader or message.tensors), dict[int, Tensor]()
        for label, of_class in sorted(prompts.items()):
            latents[label] = encode(message.autoencoder, client.probe.prompt_hidden(reader, of_class))[0]
        sums = class_sums(latents, len(client.outline().class_answers()), how.latent_norm)
        multiplier = noise_multiplier(how.epsilon, how.delta)
        noisy = released(sums, 2 * how.latent_norm, multiplier, client.new_key())
        smallest = 2 * multiplier * math.sqrt(sums.shape[1] - 1)  # there the noise of a mean is as long as latent_norm
        means = class_means(noisy, how.latent_norm, max(how.min_count, smallest))
        return pack(LatentKept({str(label): mean for label, mean in means.items()}, released=True))

    return unpack(LatentKept, client.once(compute))


def synthetic_rows(
    client: Client, message: LatentMessage, task: DreamTask, prompts: Prompts, how: Decoding
) -> ExtraRows | None:
    """Return synthetic examples of the classes that are rare at a client, or None if there are none.

    Those of all classes together are no more than the client's own examples.
    """
    answers = client.outline().class_answers()
    rare = [
        label
        for label in range(len(answers) if prompts else 0)
        if str(label) in message.means and len(prompts.get(label, ())) < how.rare_below
    ]
    count = min(how.examples_per_class, client.info.examples // max(len(rare), 1))
    if not rare or not count:
        return None
    classes, base = tuple(label for label in rare for _ in range(count)), client.base
    generator = torch_generator(client.seed, "latents", client.name, client.round)
    means = torch.stack([message.means[str(label)] for label in classes])
    latents = means + how.latent_noise * torch.randn(means.shape, generator=generator)
    vectors = decode(message.autoencoder, latents, base.width, base.embedding_std)
    examples = SyntheticExamples({VECTORS: vectors}, task.prompt, (), classes)
    return examples.answered([answers[label] for label in classes]).rows()
