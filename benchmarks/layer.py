"""One AMoLE linear, forward and backward, against what else a layer could be.

Opponents: PEFT's LoRA of one expert's rank r, PEFT's LoRA of the same total rank (n + 1) r, and the mixture computed
as the literature does it, expert after expert over the tokens routed to each. `products` is the floor: the matrix
products that AMoLE cannot do without, forward and backward, and nothing else. Columns: time relative to AMoLE's (above
1: the opponent is slower), memory kept for the backward pass beside the input and the weights, and operations launched.

Targets: at most 1.10 x the time of LoRA r = 8 and 1.02 x that of equal total rank (d = 2048, 512 tokens, dropout off);
the loop at least 1.5 x (d = 1024) and 1.3 x (d = 2048) slower, with 10 x the memory.

    python benchmarks/layer.py [--quick] [--json FILE]
"""

from collections.abc import Callable
from typing import Any

import torch
from measure import arguments, interleaved, report
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedamole.model.amole import AdapterSpec, amole_linear, mixture_weights, route

N, R, K, TOKENS = 8, 8, 2, 512
SPEC = AdapterSpec(rank=R, alpha=16.0, dropout=0.0, top_k=K)


class Amole(nn.Module):
    """This package's layer for one client."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        """Wrap a frozen linear."""
        super().__init__()
        self.base, self.down, self.up = base, nn.Parameter(down.clone()), nn.Parameter(up.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus mixture."""
        return amole_linear(x, self.base(x), self.down, self.up, SPEC)[0]


class ExpertLoop(nn.Module):
    """The same mixture, expert after expert: select the tokens routed to it, compute, add back."""

    def __init__(self, base: nn.Linear, down: Tensor, up: Tensor) -> None:
        """Wrap a frozen linear; every expert has its own A and B."""
        super().__init__()
        self.base = base
        blocks = down.split(R)
        self.router = nn.Parameter(blocks[0].clone())
        self.A = nn.ParameterList([block.clone() for block in blocks[1:]])
        self.B = nn.ParameterList([block.clone() for block in up.split(R)])

    def forward(self, x: Tensor) -> Tensor:
        """Base output plus mixture."""
        tokens = x.flatten(0, -2)
        embeddings = torch.stack([tokens @ a.T for a in self.A[:N]], dim=1)
        routing = route(tokens @ self.router.T, embeddings, K)
        weights = mixture_weights(routing).to(x.dtype)
        y: Tensor = self.base(tokens) + SPEC.scaling * ((tokens @ self.A[N].T) @ self.B[N])
        for expert in range(N):
            rows = (routing.chosen == expert).any(1).nonzero().squeeze(1)
            part = (tokens[rows] @ self.A[expert].T) @ self.B[expert]
            y = y.index_add(0, rows, SPEC.scaling * weights[rows, expert, None] * part)
        return y.view(*x.shape[:-1], -1)


def lora(base: nn.Linear, rank: int) -> nn.Module:
    """PEFT's own LoRA layer on a frozen linear."""
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, init_lora_weights=False)
    layer: nn.Module = Linear(base, "default", config, r=rank, lora_alpha=2 * rank)
    return layer


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass beside its input and the weights."""
    known = {tensor.untyped_storage().data_ptr() for tensor in [x, *layer.parameters()]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    del out
    return sum(sizes.values())


def products(base: nn.Linear, down: Tensor, up: Tensor, x: Tensor, pull: Tensor) -> Callable[[], None]:
    """The matrix products of one forward and backward pass, without anything in between."""
    tokens, gradient = x.detach().flatten(0, -2), pull.flatten(0, -2)
    weight, down, up = base.weight, down.to(tokens), up.to(tokens)
    values = tokens @ down[R:].T

    def run() -> None:
        with torch.no_grad():
            torch.mm(tokens, weight.T), torch.mm(gradient, weight)  # the frozen linear, there and back
            torch.mm(tokens, down.T), torch.mm(values, up)
            back = torch.mm(gradient, up.T)
            torch.mm(values.T, gradient), torch.mm(back, down[R:]), torch.mm(back.T, tokens)
        if tokens.device.type == "cuda":
            torch.cuda.synchronize()

    return run


class Counter(TorchDispatchMode):
    """Counts operations that do work (views launch nothing)."""

    def __init__(self) -> None:
        """Start at 0."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def step(layer: nn.Module, x: Tensor, pull: Tensor) -> Callable[[], None]:
    """One forward and backward pass."""

    def run() -> None:
        (layer(x) * pull).sum().backward()
        layer.zero_grad(set_to_none=True)
        x.grad = None
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def launched(run: Callable[[], None]) -> int:
    """Operations of one forward and backward pass."""
    counter = Counter()
    with counter:
        run()
    return counter.count


def main() -> None:
    """Measure every width."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lines: list[list[object]] = []
    ratios: dict[str, float] = {}
    for d in (576,) if options.quick else (576, 1024, 2048):
        draw = torch.Generator().manual_seed(0)
        base = nn.Linear(d, d, bias=False).requires_grad_(False).to(device, dtype)
        down = torch.randn((N + 2) * R, d, generator=draw) / d**0.5
        up = torch.randn((N + 1) * R, d, generator=draw) * 0.02
        x = torch.randn(1, TOKENS, d, generator=draw).to(device, dtype).requires_grad_()
        pull = torch.randn(1, TOKENS, d, generator=draw).to(device, dtype)
        layers: dict[str, nn.Module] = {
            "amole": Amole(base, down, up),
            "lora_r8": lora(base, R),
            "lora_same_rank": lora(base, (N + 1) * R),
            "expert_loop": ExpertLoop(base, down, up),
        }
        layers = {name: layer.to(device) for name, layer in layers.items()}
        same = 1e-3 if dtype == torch.float32 else 0.1
        assert torch.allclose(layers["amole"](x), layers["expert_loop"](x), atol=same)
        runs = {name: step(layer, x, pull) for name, layer in layers.items()}
        floor = {"products": products(base, down, up, x, pull)}
        seconds = interleaved({**runs, **floor}, 5 if options.quick else 60)
        ratios[f"amole_vs_products_at_{d}x{TOKENS}"] = seconds["amole"] / seconds["products"]
        lines.append([f"{d} x {TOKENS}", "products", seconds["products"] / seconds["amole"], "-", 8])
        memory = {name: kept(layer, x) for name, layer in layers.items()}
        for name, run in runs.items():
            relative = seconds[name] / seconds["amole"]
            lines.append([f"{d} x {TOKENS}", name, relative, memory[name] / 2**20, launched(run)])
            if name == "expert_loop":
                ratios[f"expert_loop_vs_amole_at_{d}x{TOKENS}"] = relative
                ratios[f"expert_loop_memory_vs_amole_at_{d}x{TOKENS}"] = memory[name] / memory["amole"]
            elif name != "amole":
                ratios[f"amole_vs_{name}_at_{d}x{TOKENS}"] = 1 / relative
    head = ["d x tokens", "layer", "time / amole's", "MiB kept", "operations"]
    report(f"one adapted linear, n = {N}, r = {R}, k = {K}, {device.type} {dtype}", head, lines, ratios, options.json)


if __name__ == "__main__":
    main()
