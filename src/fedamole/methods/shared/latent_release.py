"""The one private release of a client of FedDPMS: noisy mean latent vectors of its classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedamole.federation.method import Client
from fedamole.federation.privacy.gaussian import noise_multiplier, released
from fedamole.federation.record import tensor_as_bytes
from fedamole.model.amole import AdapterSpec
from fedamole.model.batch import Ids
from fedamole.model.params import Adapter
from fedamole.synthesis.latent_exchange import JOINED, NEW, RELEASED, LatentKept, LatentMessage
from fedamole.synthesis.latents import class_means, class_sums, encode


@dataclass(frozen=True)
class Release:
    """How class means are released."""

    epsilon: float
    delta: float
    latent_norm: float
    """Norm to which latent vectors are clipped."""
    min_count: int
    """Smallest noisy number of examples of a class whose mean is released."""


def release(
    client: Client,
    kept: LatentKept,
    message: LatentMessage,
    spec: AdapterSpec,
    prompts: Mapping[int, Sequence[Ids]],
    how: Release | None,
) -> LatentKept:
    """Return a client's next state, with the means that it releases; without `how` it releases none yet.

    `prompts` are those of all its training examples by class; a client without any releases nothing. A client that has
    released keeps its means. None releases in its first round, at the end of which its key is on the disk: a repeated
    round would otherwise have another key, and be another release.
    """
    if kept.phase == NEW:
        return replace(kept, phase=JOINED)
    if kept.phase == RELEASED or how is None or not prompts:
        return kept
    reader, latents = Adapter(spec, message.reader or message.tensors), dict[int, Tensor]()
    for label, of_class in sorted(prompts.items()):
        latents[label] = encode(message.autoencoder, client.probe.prompt_hidden(reader, of_class))[0]
    sums = class_sums(latents, len(client.outline().class_answers()), how.latent_norm)
    multiplier, key = noise_multiplier(how.epsilon, how.delta), tensor_as_bytes(kept.key) or b""
    noisy = released(sums, 2 * how.latent_norm, multiplier, key)
    means = class_means(noisy, how.latent_norm, how.min_count)
    return replace(kept, phase=RELEASED, means={str(label): mean for label, mean in means.items()})
