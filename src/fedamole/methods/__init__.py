"""The federated fine-tuning methods, one file each. METHODS is the registry: adding a method takes one line here."""

import dataclasses
import logging
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from fedamole.errors import ConfigError
from fedamole.federation.method import Method
from fedamole.methods.adaptive_experts import AdaptiveExperts
from fedamole.methods.codream import CoDream
from fedamole.methods.data_engine import DataEngineMethod
from fedamole.methods.ditto import Ditto
from fedamole.methods.fdlora import FdLora
from fedamole.methods.fed_et import FedEt
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
from fedamole.methods.fedsvd import FedSvd
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
log = logging.getLogger(__name__)


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
        "fedsvd": FedSvd,
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
        "fed_et": FedEt,
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
ENTRY_POINTS = "fedamole.methods"
"""Group of entry points by which an installed package adds methods: NAME = "module:Class"."""


def register(name: str, method: MethodClass) -> None:
    """Add a method from outside this package, with its `_ft` variant; see `fedamole.register_method`.

    Raises:
        ConfigError: The name is taken or no identifier, or the class is not a frozen dataclass derived from `Method`.
    """
    if not (name.isascii() and name.isidentifier() and name.islower()) or name.endswith("_ft"):
        raise ConfigError(
            f"method {name!r}: use lower-case ASCII letters, digits and underscore, and no _ft at the end, such as "
            "my_method"
        )
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise ConfigError(f"method {name!r}: {method!r} is not a class derived from fedamole.federation.method.Method")
    if "__dataclass_fields__" not in vars(method):  # a subclass without the decorator would ignore its own settings
        raise ConfigError(f"method {name!r}: {method.__name__} must be decorated with @dataclass(frozen=True)")
    added = with_variants({name: method})
    if taken := [key for key in added if key in METHODS]:
        raise ConfigError(f"method {taken[0]!r} is registered already; choose another name")
    METHODS.update(added)


def _register_installed() -> None:
    """Register the methods of installed packages. A package that fails is reported, and does not stop the others."""
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            register(entry.name, entry.load())
        except Exception as error:  # code of another package, which may raise anything
            log.warning("method %r of %s is not available: %s", entry.name, entry.value, error)


_register_installed()


def describe(name: str) -> dict[str, Any]:
    """Return the description of a method for `fedamole methods`, with JSON values only.

    Its keys: name, paper, communicates (what client and server exchange), stays_local (what stays with the client),
    scored (evaluation before or after the aggregation), logged_relevance (meaning of the values in assignment.jsonl),
    parameters (defaults of the settings) and about (docstring of the method's file).
    """
    method = METHODS[name]
    documented = method.__mro__[1] if name.endswith("_ft") else method
    return {
        "name": name,
        "paper": method.paper,
        "communicates": method.communicates,
        "stays_local": method.stays_local,
        "scored": method.evaluates,
        "logged_relevance": method.logged_relevance,
        "parameters": {field.name: field.default for field in dataclasses.fields(method)},
        "about": (sys.modules[documented.__module__].__doc__ or "").strip(),
    }
