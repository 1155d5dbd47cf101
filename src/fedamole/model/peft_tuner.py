"""AMoLE as a PEFT tuner, to load and use personal adapters with PEFT.

After `import fedamole`, `get_peft_model(model, AmoleConfig(...))`, `save_pretrained`, `PeftModel.from_pretrained`,
`load_adapter` and `set_adapter` work as for PEFT's own adapters. The layers use the same functions as federated
training. Training with PEFT minimises the language-model loss alone, without the load-balancing loss of federated
training.
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

from fedamole.model.adapter_files import router_of
from fedamole.model.amole import AdapterSpec
from fedamole.model.mixer import InstanceWeights
from fedamole.model.params import expert_keys, new_pool, stack
from fedamole.model.peft_gate import InstanceGate
from fedamole.model.router import LinearAdapters
from fedamole.model.segments import Segments


class _PeftType(str):
    """A PEFT type that is not a member of PEFT's enum: a string with the attribute `value`."""

    @property
    def value(self) -> str:
        return str(self)


AMOLE = _PeftType("AMOLE")


@dataclass
class AmoleConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of one personal AMoLE adapter, as saved in adapter_config.json."""

    r: int = field(default=8, metadata={"help": "Rank of every expert."})
    alpha: float = field(default=16.0, metadata={"help": "Numerator of the scaling alpha/r."})
    dropout: float = field(default=0.05, metadata={"help": "Dropout on the experts' inputs during training."})
    dropout_kind: Literal["exact", "rank"] = field(default="exact", metadata={"help": "Where dropout applies."})
    top_k: int = field(default=2, metadata={"help": "Number of domain experts per token."})
    target_modules: list[str] | None = field(default=None, metadata={"help": "Full names of the adapted linears."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "Names of modules that are not adapted."})
    expert_pattern: dict[str, list[int]] = field(
        default_factory=dict, metadata={"help": "Global ids of the domain experts, by full module name."}
    )
    router: Literal["embedding", "mixer", "instance"] = field(
        default="embedding", metadata={"help": "How experts are weighed."}
    )
    instance_weight: float = field(default=0.5, metadata={"help": "Largest weight of the first expert."})
    own_expert: int | None = field(
        default=None, metadata={"help": "Id of the client's own expert, for a mixer with 2n - 1 logits."}
    )
    references: list[list[float]] | None = field(
        default=None, metadata={"help": "Hidden states that prompts are compared with, with router = instance."}
    )
    init_seed: int = field(default=0, metadata={"help": "Seed of newly initialised experts."})

    def __post_init__(self) -> None:
        """Set the PEFT type; without target modules, those of the expert pattern are adapted."""
        super().__post_init__()
        self.peft_type = AMOLE
        self.target_modules = list(self.target_modules or self.expert_pattern)

    @property
    def spec(self) -> AdapterSpec:
        """The settings of the layers."""
        return AdapterSpec(
            self.r, self.alpha, self.dropout, self.dropout_kind, self.top_k, router=router_of(vars(self))
        )


class AmoleLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A frozen linear with one AMoLE mixture per adapter name."""

    adapter_layer_names = ("amole_down", "amole_up")
    other_param_names = ("specs", "experts", "own_experts", "gates")

    if TYPE_CHECKING:  # inherited from PEFT, which has no type annotations
        active_adapters: Any
        disable_adapters: Any
        get_base_layer: Any
        set_adapter: Any
        _active_adapter: Any
        _move_adapter_to_device_of_base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        """Wrap a linear; `update_layer` adds adapters."""
        super().__init__()
        self.base_layer = base_layer
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        self.in_features, self.out_features = int(in_features), int(out_features)
        self.specs: dict[str, AdapterSpec] = {}
        self.experts: dict[str, list[int]] = {}
        self.own_experts: dict[str, int | None] = {}
        self.gates: dict[str, InstanceGate] = {}
        self.amole_down = nn.ParameterDict({})
        self.amole_up = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: AmoleConfig, module: str) -> None:
        """Add newly initialised experts as `adapter_name`; `module` must be a key of the expert pattern."""
        spec, experts = config.spec, config.expert_pattern.get(module, [])
        shapes = {module: (self.in_features, self.out_features)}
        # Each module has its own seed. The pool reaches up to the largest id, so an id always gets the same values.
        generator = torch.Generator().manual_seed(config.init_seed + zlib.crc32(module.encode()))
        size = max(experts, default=-1) + 1
        pool = new_pool(shapes, config.r, size, generator)
        if not spec.router.has_shared_expert:
            keys = {key for expert in experts for key in expert_keys(module, expert)}
            pool = {key: tensor for key, tensor in pool.items() if key in keys}
            if rows := spec.router.num_rows(len(experts), config.r):
                pool[f"{module}/{spec.router.tensor_name}"] = torch.zeros(rows, self.in_features)
        down, up = stack(pool, module, experts)
        self.own_experts[adapter_name] = config.own_expert
        self.specs[adapter_name], self.experts[adapter_name] = spec, experts
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
                y = self._add_adapter(x, y, name)
        return y

    def _add_adapter(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        """Add the output of one adapter."""
        spec, own_expert, gate = self.specs[name], self.own_experts[name], self.gates.get(name)
        drop = partial(_drop, probability=spec.dropout) if self.training and spec.dropout else None
        own_expert_mask = None
        if own_expert is not None:
            own_expert_mask = torch.tensor([[float(e == own_expert) for e in self.experts[name]]], device=x.device)
        adapters = LinearAdapters(
            self.amole_down[name][None],
            self.amole_up[name][None],
            own_expert_mask=own_expert_mask,
            expert_weights=None if gate is None else gate.weights,
        )
        segments = Segments((x.numel() // x.shape[-1],), x.device)
        return spec.router.forward(x, y, adapters, spec, drop, segments).y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ValueError: a mixture of experts has no fixed weight matrix to merge."""
        raise ValueError(
            "a mixture of experts cannot be merged, because its weights depend on the token; load it as an adapter"
        )


def _drop(values: Tensor, probability: float) -> Tensor:
    return values.masked_fill(torch.rand_like(values, dtype=torch.float32) < probability, 0)


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
        """Connect a layer to its adapter's gate, if its experts have instance weights."""
        router = config.spec.router
        if config.references is None or not isinstance(router, InstanceWeights):
            return
        gates: dict[str, InstanceGate] = self.__dict__.setdefault("_gates", {})
        if adapter_name not in gates:
            gate = gates[adapter_name] = InstanceGate(config.references, router)

            def before(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if adapter_name in self.active_adapters:
                    gate.before(model, args, kwargs)

            self.model.register_forward_pre_hook(before, with_kwargs=True)
        layer.gates[adapter_name] = gates[adapter_name]


# Register the AMoLE adapter type with PEFT.
PEFT_TYPE_TO_CONFIG_MAPPING[AMOLE] = AmoleConfig
PEFT_TYPE_TO_TUNER_MAPPING[AMOLE] = AmoleModel
PEFT_TYPE_TO_PREFIX_MAPPING[AMOLE] = AmoleModel.prefix
