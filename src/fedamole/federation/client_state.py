"""Private state of clients on disk.

A client writes its state after every exchange in which it took part. No state leaves the client, and a worker holds
none in memory between two calls, so the memory of a machine does not limit the number of clients it can serve.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fedamole.errors import RunError
from fedamole.federation.method import Client, Method
from fedamole.federation.record import PayloadError, bytes_as_tensor, pack, tensor_as_bytes, unpack
from fedamole.files import write_atomic
from fedamole.model.adapter_files import check_fits
from fedamole.model.base import Base
from fedamole.model.params import Adapter
from fedamole.received.files import inside
from fedamole.runs.checkpoint import latest_state, round_and_exchange, state_path
from fedamole.runs.run_folder import RunFolder


@dataclass(frozen=True)
class PrivateState:
    """The file of one client's state."""

    client_state: Mapping[str, Tensor]
    """The method's own record (`Records.client_state`), packed, as one tensor of bytes; empty for none."""
    trained: Adapter | None
    """The adapter after the client's last local training, if the run scores it."""
    step_fraction: float = 0.0
    """Fraction of the optimiser steps of its round that the client has taken so far."""
    trained_sizes: Mapping[str, int] = field(default_factory=dict)
    """Values of each tensor that it has trained in its round so far; empty after the last exchange of a round."""


@dataclass(frozen=True)
class ClientState:
    """What a client goes on from."""

    client_state: Any
    """The method's own record."""
    trained: Adapter | None
    """The adapter after its last local training, if the run scores it."""
    step_fraction: float
    """Fraction of the optimiser steps of the current round taken in earlier exchanges."""
    trained_sizes: Mapping[str, int]
    """Values of each tensor that was trained in earlier exchanges of the current round."""


class ClientStates:
    """Reads and writes the private states in a run folder."""

    def __init__(self, folder: RunFolder, method: Method[Any, Any, Any, Any], base: Base) -> None:
        """Use the clients' folders of a run of `method` on `base`."""
        self.folder, self.method, self.base = folder, method, base

    def load(self, client: Client) -> ClientState:
        """Return the last state of a client; before its first update the method's initial one.

        Raises RunError if the file is damaged, and BaseModelError if its adapter does not fit the base.
        """
        path = latest_state(self.folder, client.name)
        if path is None:
            return ClientState(self.method.init_client_state(client), None, 0.0, {})
        try:
            private = self._read(path)
            client_state = unpack(self.method.records.client_state, tensor_as_bytes(private.client_state) or b"")
        except PayloadError as error:
            raise RunError(
                f"{path} is damaged ({error}): put it back from a copy, or remove the folder it is in; then "
                f"{client.name} starts again without its private state"
            ) from error
        if round_and_exchange(path)[0] < client.round:
            return ClientState(client_state, private.trained, 0.0, {})
        return ClientState(client_state, private.trained, private.step_fraction, private.trained_sizes)

    def save(self, client: Client, exchange: int, state: ClientState) -> None:
        """Write a client's state after an exchange of the current round."""
        packed = bytes_as_tensor(pack(state.client_state))
        sizes = state.trained_sizes if exchange + 1 < self.method.exchanges() else {}
        private = PrivateState(packed, state.trained, state.step_fraction, sizes)
        write_atomic(state_path(self.folder, client.name, client.round, exchange), pack(private))

    def load_candidate(self, name: str, variant: str) -> Adapter | None:
        """Return the model of a variant that was scored last after an aggregation; None before the first time."""
        path = self._candidate_path(name, variant)
        return self._read(path).trained if path.exists() else None

    def save_candidate(self, name: str, variant: str, adapter: Adapter | None) -> None:
        """Keep the model of a variant that is about to be scored, in case it becomes the best."""
        write_atomic(self._candidate_path(name, variant), pack(PrivateState({}, adapter)))

    def _candidate_path(self, name: str, variant: str) -> Path:
        return self.folder.client(name) / f"candidate-{variant}.safetensors"

    def _read(self, path: Path) -> PrivateState:
        private = unpack(PrivateState, inside(self.folder.path, path).read_bytes())
        if private.trained is not None:
            check_fits(private.trained, self.base, path)
        return private
