"""FedSVD: Lee, Park, Lee, Wagner, Seong, Bocklet, Lee, Hwang, "FedSVD: Adaptive Orthogonalization for Private Federated
Learning with LoRA", NeurIPS 2025, https://arxiv.org/abs/2505.12805.

One round:
    1. The server sends the factors A and B of the global LoRA to the selected clients.
    2. Each client trains B with A frozen and sends B back.
    3. The server averages the B's. With the same A everywhere this is exactly the average of the products BA.
    4. It computes the singular value decomposition of the average B times A, and factors it anew:
       B A = U S V^T,    A <- V^T (the right singular vectors, so its rows are orthonormal),    B <- U S.
       The product stays the same.
Steps 3 and 4 read nothing but the clients' replies, so under `[privacy]` they are post-processing of noised values.

The rows of the new A span the same space as those of the A before it, which is drawn from the run's seed: the method
scales and rotates A within this space. With orthonormal rows, the norm of an example's gradient of B is at most that of
its gradient of the product.
Deviations: the decomposition is computed from the factors, without forming the product. All clients have the same
weight unless `weighting` is "examples". A client trains with Adam, as with every method here; the authors use SGD.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from fedamole.federation.method import Client, Server, TrainingResult
from fedamole.federation.privacy.releases import Release
from fedamole.federation.record import Nothing
from fedamole.methods.fedit import FedIT
from fedamole.methods.shared.averaging import SharedTensors
from fedamole.methods.shared.checks import check_at_least
from fedamole.methods.shared.stacks import truncated
from fedamole.model.params import Adapter, shared_keys


@dataclass(frozen=True)
class FedSvd(FedIT):
    """One LoRA for all clients, of which only B is trained, and whose A is made orthonormal by the server."""

    refactor_every: int = 1
    """Factor the LoRA anew after every n-th round."""

    paper = "Lee et al., FedSVD: Adaptive Orthogonalization for Private FL with LoRA, NeurIPS 2025, arXiv 2505.12805"
    communicates = "one LoRA down, B up"
    stays_local = "the data"
    releases: ClassVar[Mapping[str, Release]] = {"tensors": "trained"}

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, refactor_every=1)

    # server
    @override
    def aggregate(self, server: Server, state: SharedTensors, replies: Mapping[str, SharedTensors]) -> SharedTensors:
        averaged = super().aggregate(server, state, replies)
        if (server.round + 1) % self.refactor_every:
            return averaged
        tensors = dict(averaged.tensors)
        for module in sorted(server.shapes):
            key_a, key_b = shared_keys(module)
            a, b = tensors[key_a], tensors[key_b]
            tensors[key_a], tensors[key_b] = truncated(a, b, len(a))
        return SharedTensors(tensors)

    # client
    @override
    def adapter(self, client: Client, client_state: Nothing, message: SharedTensors) -> Adapter:
        """Return the global LoRA with A frozen."""
        frozen = tuple(sorted(name for name in message.tensors if name.endswith("/A")))
        return Adapter(self.spec(), message.tensors, frozen=frozen)

    @override
    def reply(
        self, client: Client, client_state: Nothing, message: SharedTensors, trained: TrainingResult
    ) -> tuple[Nothing, SharedTensors]:
        tensors = {name: tensor for name, tensor in trained.adapter.tensors.items() if name.endswith("/B")}
        return client_state, SharedTensors(tensors)
