"""What clients and server of FedDPMS exchange: a LoRA, an autoencoder, and mean latent vectors by class."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedamole.synthesis.examples import require


@dataclass(frozen=True)
class LatentState:
    """Server state."""

    tensors: Mapping[str, Tensor]
    """The global LoRA."""
    autoencoder: Mapping[str, Tensor]
    reader: Mapping[str, Tensor]
    """The LoRA under which hidden states are encoded; empty during the warm-up, when it is the global one."""
    means: Mapping[str, Mapping[str, Tensor]]
    """Noisy mean latent vectors (k) that each client has released, by class; by client."""
    tasks: Mapping[str, str]
    """Task of each client that has one."""

    def task_means(self, client: str) -> dict[str, Tensor]:
        """Return the mean by class over the clients of a client's task; empty if it has no task."""
        task, by_class = self.tasks.get(client, ""), dict[str, list[Tensor]]()
        for name, means in sorted(self.means.items()) if task else ():
            for label, mean in means.items() if self.tasks[name] == task else ():
                by_class.setdefault(label, []).append(mean)
        return {label: torch.stack(means).mean(0) for label, means in by_class.items()}


@dataclass(frozen=True)
class LatentMessage:
    """Message: the global LoRA, and what a client needs of the autoencoder."""

    tensors: Mapping[str, Tensor]
    autoencoder: Mapping[str, Tensor]
    """All of it for a client that has not released its means, else the decoder."""
    reader: Mapping[str, Tensor]
    """The LoRA under which hidden states are encoded; empty: the global one, or the client has released its means."""
    means: Mapping[str, Tensor]
    """Mean latent vectors (k) of the client's task by class; empty during the warm-up."""


@dataclass(frozen=True)
class LatentKept:
    """Client state."""

    means: Mapping[str, Tensor]
    """The noisy means that the client has released, by class."""
    released: bool = False


@dataclass(frozen=True)
class LatentReply:
    """Reply of a client."""

    tensors: Mapping[str, Tensor]
    """The trained LoRA."""
    autoencoder: Mapping[str, Tensor]
    """The trained autoencoder; that of the message from a client without a task; empty after the warm-up."""
    means: Mapping[str, Tensor]
    """Noisy mean latent vectors (k) by class, the same in every round after the client's release."""
    task: str = ""
    """Hash of prompt and answer options; empty for a client that takes no part in the synthesis."""


def expected_latents(template: LatentReply, reply: LatentReply, options: int, size: int, norm: float) -> LatentReply:
    """Return the record with which a reply is compared, for `Method.expected_reply`.

    The classes are below `options`, and their means have `size` values and at most this norm. Which classes there are,
    and the task, come from the reply, after they are checked. Raises SyntheticExamplesError.
    """
    require(bool(re.fullmatch("([0-9a-f]{64})?", reply.task)), "a hash of the task of an unexpected form")
    require(bool(reply.task) or not reply.means, "means of a client without a task")
    for label, mean in reply.means.items():
        require(bool(re.fullmatch("0|[1-9][0-9]{0,5}", label)) and int(label) < options, "means of an unknown class")
        require(mean.shape == (size,), "means of an unexpected form")
        require(float(mean.double().norm()) <= norm * (1 + 1e-5), "means that are too long")
    largest = torch.full((size,), norm)  # a norm that no mean has
    return replace(template, means=dict.fromkeys(reply.means, largest), task=reply.task)
