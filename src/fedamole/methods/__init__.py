"""The federated fine-tuning methods, one file each. METHODS is the registry: adding a method takes one line here."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

from fedamole.federation.method import Method
from fedamole.methods.adaptive_experts import AdaptiveExperts
from fedamole.methods.codream import CoDream
from fedamole.methods.data_engine import DataEngineMethod
from fedamole.methods.ditto import Ditto
from fedamole.methods.fdlora import FdLora
from fedamole.methods.fedaf import FedAf
from fedamole.methods.fedalt import FedAlt
from fedamole.methods.fedamole import FedAmole
from fedamole.methods.fedamole_peers import FedAmolePeers
from fedamole.methods.fedawa import FedAwa
from fedamole.methods.feddat import FedDat
from fedamole.methods.feddm import FedDm
from fedamole.methods.feddpa import FedDpa
from fedamole.methods.feddpms import FedDpms
from fedamole.methods.fedex_lora import FedExLora
from fedamole.methods.fedit import FedIT
from fedamole.methods.fedlease import FedLease
from fedamole.methods.fedmap import FedMap
from fedamole.methods.fedmoe import FedMoe
from fedamole.methods.fedprompt import FedPrompt
from fedamole.methods.fedprox import FedProx
from fedamole.methods.fedptr import FedPtr
from fedamole.methods.fedptuning import FedPTuning
from fedamole.methods.fedrep import FedRep
from fedamole.methods.fedsa_lora import FedSaLora
from fedamole.methods.ffa_lora import FfaLora
from fedamole.methods.flash import Flash
from fedamole.methods.flexlora import FlexLora
from fedamole.methods.flora import Flora
from fedamole.methods.hetlora import HetLora
from fedamole.methods.ifca_lora import IfcaLora
from fedamole.methods.local_only import LocalOnly
from fedamole.methods.model_glue import ModelGlue
from fedamole.methods.pfedhr import PFedHr
from fedamole.methods.pre_aggregation import pre_aggregation
from fedamole.methods.regmean import RegMean
from fedamole.methods.steerable import Steerable

MethodClass = type[Method[Any, Any, Any, Any]]


def with_variants(methods: Mapping[str, MethodClass]) -> dict[str, MethodClass]:
    """Add `<name>_ft`, scored before the aggregation, after each method that is scored after the aggregation."""
    registry: dict[str, MethodClass] = {}
    for name, method in methods.items():
        registry[name] = method
        if method.evaluates == "post_aggregation":
            registry[f"{name}_ft"] = pre_aggregation(method)
    return registry


METHODS = with_variants(
    {
        "fedamole": FedAmole,
        "fedamole_peers": FedAmolePeers,
        "local_only": LocalOnly,
        # the paper's baselines
        "fedit": FedIT,
        "fedprompt": FedPrompt,
        "fedptuning": FedPTuning,
        "fdlora": FdLora,
        # one part of a LoRA shared, one private
        "fedsa_lora": FedSaLora,
        "ffa_lora": FfaLora,
        "feddpa": FedDpa,
        "fedalt": FedAlt,
        "feddat": FedDat,
        # exact aggregation, different ranks
        "flora": Flora,
        "flexlora": FlexLora,
        "hetlora": HetLora,
        "fedex_lora": FedExLora,
        # merging
        "regmean": RegMean,
        "model_glue": ModelGlue,
        "pfedhr": PFedHr,
        # clusters and experts
        "ifca_lora": IfcaLora,
        "fedlease": FedLease,
        "adaptive_experts": AdaptiveExperts,
        "fedmoe": FedMoe,
        # synthetic examples
        "feddm": FedDm,
        "fedaf": FedAf,
        "fedptr": FedPtr,
        "codream": CoDream,
        "feddpms": FedDpms,
        # generated rows
        "data_engine": DataEngineMethod,
        # preferences
        "steerable": Steerable,
        # weights and selection of clients
        "fedawa": FedAwa,
        "flash": Flash,
        # classical personalisation
        "fedprox": FedProx,
        "ditto": Ditto,
        "fedmap": FedMap,
        "fedrep": FedRep,
    }
)
"""Every method by its name in a config, including the `_ft` variants."""


def describe(name: str) -> dict[str, Any]:
    """Return the description of a method for `fedamole methods`, with JSON values only.

    Its keys: name, paper, communicates (what client and server exchange), stays_local (what stays with the client),
    scored (evaluation before or after the aggregation), parameters (defaults of the settings) and about (docstring of
    the method's file).
    """
    method = METHODS[name]
    documented = method.__mro__[1] if name.endswith("_ft") else method
    return {
        "name": name,
        "paper": method.paper,
        "communicates": method.communicates,
        "stays_local": method.stays_local,
        "scored": method.evaluates,
        "parameters": {field.name: field.default for field in dataclasses.fields(method)},
        "about": (sys.modules[documented.__module__].__doc__ or "").strip(),
    }
