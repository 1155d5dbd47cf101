"""AMoLE as a PEFT tuner: the public face of a personal adapter.

After `import fedamole`, `get_peft_model(model, AmoleConfig(...))`, `save_pretrained`, `PeftModel.from_pretrained`,
`load_adapter` and `set_adapter` work as for PEFT's own adapters. The mathematics is `amole_linear`, the same function
that training in a federation uses. Training through this face sees the language-model loss alone: the balance loss
belongs to federated training.
"""

import zlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from fedamole.model.amole import AdapterSpec, Drop, amole_linear
from fedamole.model.mixer import mixer_linear
from fedamole.model.params import expert_keys, mixer_key, new_pool, stack
from fedamole.model.peft_gate import InstanceGate
from fedamole.model.segments import Segments


class _PeftType(str):
    """A PEFT type from outside PEFT's closed enum: a string that also answers `.value`."""

    @property
    def value(self) -> str:
        return str(self)


AMOLE = _PeftType("AMOLE")


@dataclass
class AmoleConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of one personal AMoLE adapter, as saved in adapter_config.json."""

    r: int = field(default=8, metadata={"help": "Rank of every expert."})
    alpha: float = field(default=16.0, metadata={"help": "Numerator of the scaling alpha/r."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout on the value path while training."})
    dropout_kind: Literal["exact", "rank"] = field(default="exact", metadata={"help": "Where values are dropped."})
    top_k: int = field(default=2, metadata={"help": "Domain experts each token is routed to."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Whole names of the adapted linears."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Names never adapted."})
    expert_pattern: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Global ids of the domain experts held, by whole module name."}
    )
    router: Literal["embedding", "mixer", "instance"] = field(
        default="embedding", metadata={"help": "What weighs the experts."}
    )
    instance_weight: float = field(default=0.5, metadata={"help": "Largest weight of the first expert, by instance."})
    own_expert: int | None = field(
        default=None, metadata={"help": "The expert that a mixer with 2n - 1 logits can choose again."}
    )
    references: list[list[float]] | None = field(
        default=None, metadata={"help": "Hidden states that prompts are compared with, for weights by instance."}
    )
    init_seed: int = field(default=0, metadata={"help": "Seed of fresh experts; loading overwrites them."})

    def __post_init__(self) -> None:
        """Name the PEFT type; target modules must be spelled out, they come with an expert pattern."""
        super().__post_init__()
        self.peft_type = AMOLE
        self.target_modules = list(self.target_modules or self.expert_pattern)

    @property
    def spec(self) -> AdapterSpec:
        """What the layers need to know."""
        return AdapterSpec(
            self.r,
            self.alpha,
            self.dropout,
            self.dropout_kind,
            self.top_k,
            router=self.router,
            instance_weight=self.instance_weight,
        )


class AmoleLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen linear with one AMoLE mixture per adapter name."""

    adapter_layer_names = ("amole_down", "amole_up")
    other_param_names = ("specs", "experts", "own", "gates")

    if TYPE_CHECKING:  # what the class has from PEFT, which carries no types
        active_adapters: Any
        disable_adapters: Any
        get_base_layer: Any
        set_adapter: Any
        _active_adapter: Any
        _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap a linear; adapters are added by `update_layer`."""
        super().__init__()
        self.base_layer = base_layer
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.specs: dict[str, AdapterSpec] = {}
        self.experts: dict[str, list[int]] = {}
        self.own: dict[str, int | None] = {}
        self.gates: dict[str, InstanceGate] = {}
        self.amole_down = nn.ParameterDict({})
        self.amole_up = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: AmoleConfig, module: str) -> None:
        """Add fresh experts under `adapter_name`; module names match exactly, not as a pattern."""
        experts = config.expert_pattern.get(module, [])
        shapes = {module: (self.in_features, self.out_features)}
        # A draw of its own for every module, and an id always names the same one: hence the pool up to the largest id.
        generator = torch.Generator().manual_seed(config.init_seed + zlib.crc32(module.encode()))
        size = max(experts, default=-1) + 1
        pool = new_pool(shapes, config.r, size, generator)
        if config.router != "embedding":
            keys = {key for expert in experts for key in expert_keys(module, expert)}
            pool = {key: tensor for key, tensor in pool.items() if key in keys}
            self.own[adapter_name] = config.own_expert
        if config.router == "mixer":
            logits = len(experts) if config.own_expert is None else 2 * len(experts) - 1
            pool[mixer_key(module)] = torch.zeros(logits, self.in_features)
        down, up = stack(pool, module, experts)
        self.specs[adapter_name], self.experts[adapter_name] = config.spec, experts
        self.amole_down[adapter_name], self.amole_up[adapter_name] = nn.Parameter(down), nn.Parameter(up)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus the mixtures of the active adapters."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.specs:
                spec = self.specs[name]
                drop = partial(_zeroed, share=spec.dropout) if self.training and spec.dropout else None
                down, up = self.amole_down[name], self.amole_up[name]
                if spec.router != "embedding":
                    y = self._mixed(x, y, down, up, spec, drop, name)
                else:
                    y, _ = amole_linear(x, y, down, up, spec, drop)
        return y

    def _mixed(
        self, x: Tensor, y: Tensor, down: Tensor, up: Tensor, spec: AdapterSpec, drop: Drop | None, name: str
    ) -> Tensor:
        """Add the experts of an adapter with a learned mixer, or with weights by instance."""
        tokens, own, gates = x.numel() // x.shape[-1], None, None
        if spec.router == "instance":
            gates = self.gates[name].of(tokens)
        if self.own[name] is not None:
            chosen = [float(expert == self.own[name]) for expert in self.experts[name]]
            own = torch.tensor([chosen], device=x.device)
        return mixer_linear(x, y, down[None], up[None], spec, drop, Segments((tokens,), x.device), own, gates)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: experts chosen per token have no fixed weight to merge."""
        raise ValueError(
            "a mixture of experts cannot be merged: which experts act depends on the token. Load it as an adapter"
        )


def _zeroed(values: Tensor, share: float) -> Tensor:
    return values.masked_fill(torch.rand_like(values, dtype=torch.float32) < share, 0)


class AmoleModel(BaseTuner):  # type: ignore[misc]
    """Injects AMoLE layers into a model; use it through `get_peft_model`."""

    prefix = "amole_"
    tuner_layer_cls = AmoleLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's contract

    def _create_and_replace(
        self,
        config: AmoleConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        **_: Any,
    ) -> None:
        if isinstance(target, AmoleLayer):
            target.update_layer(adapter_name, config, current_key)
            self._gate(target, adapter_name, config)
            return
        layer = AmoleLayer(target)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, config, current_key)
        self._gate(layer, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _gate(self, layer: AmoleLayer, adapter_name: str, config: AmoleConfig) -> None:
        """Give a layer the adapter's one gate, where its experts are weighted by instance."""
        if config.references is None:
            return
        gates: dict[str, InstanceGate] = self.__dict__.setdefault("_gates", {})
        if adapter_name not in gates:
            gate = gates[adapter_name] = InstanceGate(config.references, config.instance_weight)

            def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if adapter_name in self.active_adapters:
                    gate.before(model, args, kwargs)

            self.model.register_forward_pre_hook(before, with_kwargs=True)
        layer.gates[adapter_name] = gates[adapter_name]


def register() -> None:
    """Make the AMoLE type known to PEFT (idempotent)."""
    PEFT_TYPE_TO_CONFIG_MAPPING[AMOLE] = AmoleConfig
    PEFT_TYPE_TO_TUNER_MAPPING[AMOLE] = AmoleModel
    PEFT_TYPE_TO_PREFIX_MAPPING[AMOLE] = AmoleModel.prefix
