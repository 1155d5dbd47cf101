"""What a round costs on the wire: bytes of every method, against the numbers that have to travel.

The second round of every registered method (the first is special for some) at the paper's size: Llama-3.2-1B's q and v
projections in 16 layers, 10 clients, each method's defaults (rank 8, for FedAMoLE a pool of 30 experts a module, each
chosen by 2 clients), adapters in fp32. The method's own code writes every message and reply; no base is loaded,
training hands back what it was given, and mean embeddings are drawn at random. `--quick` takes 2 of the 16 layers.

Columns, all means per client and round: the way (down: server to client); MiB as packed; numbers that the tensors of
the message hold, in millions, and those divided by the numbers of the client's adapter (above 1 by the mean embeddings
that FedAMoLE sends up); the bytes divided by the minimum, which is 4 bytes for each of those numbers (what is above 1
is names and headers); and the bytes divided by those of FedIT on the same way.

Target: within 1 % of the minimum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from statistics import fmean
from typing import Any

import torch
from measure import arguments, report
from safetensors.torch import load
from typing_extensions import override

from fedamole.data.tokens import TokenRow
from fedamole.engine.reply_template import dry_client
from fedamole.federation.method import BaseInfo, ClientInfo, Method, Request, Server, TrainingRequest, TrainingResult
from fedamole.federation.prompt_states import PromptStates
from fedamole.federation.randomness import torch_generator
from fedamole.federation.record import pack, unpack
from fedamole.federation.server_work import ServerWork
from fedamole.federation.trajectory import TrajectoryRequest, TrajectoryResult
from fedamole.methods import METHODS
from fedamole.model.amole import AdapterSpec
from fedamole.model.batch import Ids
from fedamole.model.layers import MeanEmbeddings
from fedamole.model.params import Adapter, Shapes, expert_ids, layers_of
from fedamole.synthesis.trajectory import Matched

LAYERS, QUICK_LAYERS, HIDDEN, VALUES, VOCABULARY = 16, 2, 2048, 512, 128_256
CLIENTS, SEED = 10, 0


def llama(layers: int) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of the q and v projections of Llama-3.2-1B."""
    return {
        f"model.layers.{layer}.self_attn.{name}": (HIDDEN, d_out)
        for layer in range(layers)
        for name, d_out in (("q_proj", HIDDEN), ("v_proj", VALUES))
    }


@dataclass
class Traffic:
    """What crossed the wire on one way, by client, summed over the exchanges of the round."""

    size: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def send(self, client: str, record: object) -> bytes:
        """Count a packed record and the numbers in it; return what arrives."""
        payload = pack(record)
        numbers = sum(prod(tensor.shape) for tensor in load(payload).values())
        self.size[client] = self.size.get(client, 0) + len(payload)
        self.numbers[client] = self.numbers.get(client, 0) + numbers
        return payload


class IdleServer(ServerWork):
    """Stands in for training at the server, which sends nothing."""

    def __init__(self) -> None:
        """Hold no base."""
        self.notes = {}

    @override
    def train(self, request: TrainingRequest, steps: int, round_: int) -> TrainingResult:
        return request.unchanged()

    @override
    def match(self, request: TrajectoryRequest) -> TrajectoryResult:
        """Return the rows and the end of the move as they are."""
        projected = {key: tensor.clone() for key, tensor in request.end.items()}
        return TrajectoryResult(Matched(request.vectors, request.log_step, ()), projected, 0)

    @override
    def read(self, adapter: Adapter | None, prompts: Sequence[Ids]) -> PromptStates:
        """Return states of eight prompts, drawn at random."""
        assert adapter is not None
        generator = torch_generator(SEED, "states")
        layers = len(layers_of(adapter.modules()))
        return PromptStates(torch.randn(layers, 8, 16, generator=generator), torch.randn(8, 32, generator=generator))


@dataclass
class Round:
    """Two rounds of a method, the second watched: what went down and up, and how large the clients' adapters are."""

    method: Method[Any, Any, Any, Any]
    shapes: Shapes
    down: Traffic = field(default_factory=Traffic)
    up: Traffic = field(default_factory=Traffic)
    parameters: dict[str, int] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Let the method run its rounds, whatever it exchanges."""
        clients = tuple(ClientInfo(f"client-{index:02d}", 1000) for index in range(CLIENTS))
        public = tuple(TokenRow((i,), (), ()) for i in range(8))
        base = BaseInfo(self.shapes, HIDDEN, vocabulary=VOCABULARY)
        server = Server(base, clients, SEED, work=IdleServer(), public=public)
        state = self.method.round(server, self.method.init(server), clients, self._exchange)
        self.down, self.up = Traffic(), Traffic()
        self.method.round(replace(server, round=1), state, clients, self._exchange)

    def _exchange(self, messages: Mapping[str, Any]) -> dict[str, Any]:
        """Carry messages down, do the clients' work, carry the replies up."""
        replies = {}
        for name, message in messages.items():
            client = dry_client(BaseInfo(self.shapes, HIDDEN, vocabulary=VOCABULARY), ClientInfo(name, 1000), SEED, 0)
            self.down.send(name, message)
            kept = self.kept.get(name) or self.method.init_client_state(client)
            work = self.method.update(client, kept, message)
            try:
                request = next(work)
                while True:
                    request = work.send(self._fit(request))
            except StopIteration as end:
                self.kept[name], reply, trained = end.value
            replies[name] = unpack(self.method.records.reply, self.up.send(name, reply))
            self.parameters[name] = trained.adapter.parameters()
        return replies

    def _fit(self, request: Request) -> Any:
        """Stand in for training and for reading the embedding split."""
        generator, means, spec = torch.Generator().manual_seed(SEED), {}, self.method.spec()
        for module, held in expert_ids(request.adapter.tensors).items() if self.method.needs_embeddings else ():
            assert isinstance(spec, AdapterSpec), "only mixtures of experts have router embeddings"
            token, *experts = torch.randn(1 + len(held), spec.rank, generator=generator)
            means[module] = MeanEmbeddings(token, dict(zip(held, experts, strict=True)))
        return request.unchanged(means)


def lines_of(name: str, watched: Round, fedit: Round | None, size: str) -> tuple[list[list[object]], dict[str, float]]:
    """Lines of the table, one per way, and ratios of one method."""
    lines: list[list[object]] = []
    ratios: dict[str, float] = {}
    parameters = fmean(watched.parameters.values())
    for way in ("down", "up"):
        traffic: Traffic = getattr(watched, way)
        sent, numbers = fmean(traffic.size.values()), fmean(traffic.numbers.values())
        if not numbers:
            lines.append([name, way, f"{sent:.0f} bytes", "0", "0", "-", "-"])
            continue
        minimum = ratios[f"{name}_{way}_vs_minimum_at_{size}"] = sent / (4 * numbers)
        against = "-"
        if fedit is not None and fedit is not watched:
            ratio = ratios[f"{name}_{way}_vs_fedit_at_{size}"] = sent / fmean(getattr(fedit, way).size.values())
            against = f"{ratio:.4f}"
        mib, millions, share = sent / 2**20, numbers / 1e6, numbers / parameters
        lines.append([name, way, f"{mib:.4f}", f"{millions:.4f}", f"{share:.4f}", f"{minimum:.5f}", against])
    return lines, ratios


def main() -> None:
    """Run a round of every method and report."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    layers = QUICK_LAYERS if options.quick else LAYERS
    size = "llama1b" if layers == LAYERS else f"llama1b_{layers}_layers"
    rounds = {name: Round(method(), llama(layers)) for name, method in METHODS.items()}
    lines: list[list[object]] = []
    ratios: dict[str, float] = {}
    for watched in rounds.values():
        watched.run()
    for name, watched in rounds.items():
        more, result = lines_of(name, watched, rounds.get("fedit"), size)
        lines += more
        ratios |= result
    title = (
        f"Traffic per client and round, {CLIENTS} clients, fp32:\n"
        f"Llama-3.2-1B's q and v in {layers} of {LAYERS} layers\n"
        "target: bytes / minimum at most 1.01"
    )
    head = ["method", "way", "MiB", "numbers, M", "/ adapter", "/ minimum", "/ fedit"]
    report(title, head, lines, ratios, options.json)


if __name__ == "__main__":
    main()
