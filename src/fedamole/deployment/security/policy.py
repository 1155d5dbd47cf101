"""What a client consents to: limits of its own, compared with what a coordinator asks before anything is trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedamole.config import Config, build, nearest, plain
from fedamole.data.settings import SourceSettings
from fedamole.data.templates import BUILT_IN, TemplateSettings, columns_of
from fedamole.errors import ConfigError, FedamoleError
from fedamole.methods import METHODS
from fedamole.methods.shared.ranks import RankedMethod
from fedamole.model.amole import AdapterSpec
from fedamole.model.base import BUNDLED
from fedamole.received.files import read_toml


def read_columns(template: TemplateSettings) -> set[str]:
    """The columns that a template reads."""
    texts = {"prompt": template.prompt, "answer": template.answer}
    if template.prompt_without_context is not None:
        texts["prompt_without_context"] = template.prompt_without_context
    found = {column for key, text in texts.items() for column in columns_of(text, key)}
    return found | ({template.options_from} if template.options_from is not None else set())


KNOWN_COLUMNS = frozenset({"label", *(column for one in BUILT_IN.values() for column in read_columns(one))})
"""Columns that the built-in templates read."""


class PolicyError(FedamoleError):
    """The coordinator asks for what the client's policy forbids."""


def _key(default: Any, about: str) -> Any:
    """A key of the policy with what it means, for the file that `--write-policy` writes."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class PolicySettings:
    """A client's `policy.toml`; every key has a safe default."""

    methods: tuple[str, ...] | None = _key(None, "Methods that may be run; unset: every method of this version.")
    max_rank: int = _key(
        64,
        "Largest rank of a LoRA or an expert: what an update can tell of single rows grows with it.",
    )
    min_scaling: float = _key(
        0.01, "Smallest alpha / rank. Below it an update is no training, but a copy of the gradient of its first rows."
    )
    max_scaling: float = _key(16.0, "Largest alpha / rank.")
    max_learning_rate: float = _key(
        0.1,
        "Largest learning rate. Far above it the first step destroys the model, and the update is one row's gradient.",
    )
    min_clip_norm: float = _key(
        0.001, "Smallest norm that gradients may be clipped to, where they are: so small a gradient would be a copy."
    )
    max_batch_tokens: int = _key(
        1_000_000, "Most tokens that one forward pass may hold: training.batch_size times training.max_length."
    )
    min_steps: int = _key(5, "Fewest optimiser steps of a round: an update of one step is the gradient of a few rows.")
    max_steps: int = _key(2000, "Most optimiser steps of a round.")
    min_examples_per_update: int = _key(
        20, "Fewest different training rows that a round reads: an update must be about many rows, not about one."
    )
    max_examples_per_update: int = _key(100_000, "Most rows that a round reads, the same row counted each time.")
    min_rows: int = _key(
        20,
        "Fewest rows of every split of which a mean leaves: train, validation, test, and embedding where it is used.",
    )
    max_rounds: int = _key(
        500, "Most rounds of a run; also the most trainings, and the most validations, that are done for it."
    )
    max_length: int = _key(4096, "Most tokens of a prompt and its answer.")
    max_new_tokens: int = _key(1024, "Most tokens of a generated answer.")
    max_disk_mib: int = _key(10_240, "Most MiB that this client's run folders may take together.")
    templates: tuple[str, ...] | None = _key(
        None, "Templates that may be used; unset: the built-in ones, and the one that --template names."
    )
    columns: tuple[str, ...] | None = _key(
        None, "Columns that a template may read; unset: those of the built-in templates, and those that --column names."
    )
    hub_base: bool = _key(
        False,
        "Whether the coordinator may name a base of the hub, which is then downloaded; --base is your own choice.",
    )
    share_labels: bool = _key(
        False, "Whether the coordinator is told how often each answer occurs, where answers are chosen from options."
    )
    share_majority: bool = _key(
        False,
        "Whether the test score of the most frequent answer is told, and accuracy in every round: both tell the mix of "
        "labels.",
    )

    def __post_init__(self) -> None:
        """Refuse limits that leave nothing, and names that do not exist."""
        for key in ("max_rank", "max_steps", "max_examples_per_update", "max_rounds", "max_new_tokens", "max_disk_mib"):
            if getattr(self, key) < 1:
                raise ConfigError(f"policy.{key} = {getattr(self, key)}: must be at least 1")
        if self.max_length < 8:
            raise ConfigError(f"policy.max_length = {self.max_length}: must be at least 8")
        for key in ("min_steps", "min_examples_per_update", "min_rows", "min_scaling", "min_clip_norm"):
            if getattr(self, key) < 0:
                raise ConfigError(f"policy.{key} = {getattr(self, key)}: must not be negative")
        for key in ("max_scaling", "max_learning_rate", "max_batch_tokens"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"policy.{key} = {getattr(self, key)}: must be above 0")
        for low, high in (
            ("min_scaling", "max_scaling"),
            ("min_steps", "max_steps"),
            ("min_examples_per_update", "max_examples_per_update"),
        ):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(f"policy.{low} = {getattr(self, low)} is above policy.{high} = {getattr(self, high)}")
        for name in self.methods or ():
            if name not in METHODS:
                raise ConfigError(f"policy.methods names {name!r}: there is no such method{nearest(name, METHODS)}")


UNBOUNDED = PolicySettings(
    max_rank=10**9,
    min_scaling=0.0,
    min_steps=0,
    max_steps=10**9,
    min_examples_per_update=0,
    max_examples_per_update=10**15,
    min_rows=0,
    max_rounds=10**9,
    max_length=10**9,
    max_new_tokens=10**9,
    max_disk_mib=10**9,
    max_scaling=1e30,
    max_learning_rate=1e30,
    min_clip_norm=0.0,
    max_batch_tokens=10**15,
    hub_base=True,
    share_majority=True,
)
"""The policy of clients that belong to the coordinator itself, as in a simulation."""


def read_policy(path: Path) -> PolicySettings:
    """Read a policy file; ConfigError names the file, the key and, for an unknown key, the one that was meant."""
    try:
        policy: PolicySettings = build(PolicySettings, read_toml(path, ConfigError), "policy")
    except ConfigError as error:
        text = str(error)
        raise ConfigError(f"policy {text}" if str(path) in text else f"{path}: {text}") from error
    return policy


def default_text() -> str:
    """Content of a policy file with every key, what it means and its default."""
    default = plain(PolicySettings())
    lines = ["# What this client consents to (docs/consent.md). A key that is left out has the value given here."]
    for item in fields(PolicySettings):
        value = default.get(item.name)
        text = str(value).lower() if isinstance(value, bool) else value
        lines += [
            "",
            f"# {item.metadata['about']}",
            f"# {item.name} = []" if value is None else f"{item.name} = {text}",
        ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class PolicyCheck:
    """One thing that a coordinator asks, beside what the policy allows."""

    setting: str
    asked: str
    allowed: str
    passes: bool


def asked(config: Config, source: SourceSettings, policy: PolicySettings, own_base: str | None) -> list[PolicyCheck]:
    """What a run's settings ask of a client, beside its policy; nothing of its data is looked at.

    `source` is the client's own data, `own_base` the base that it has named itself, if it has.
    """
    return [*_of_method(config, policy), *_of_work(config, policy), *_of_data(config, source, policy, own_base)]


def row_checks(config: Config, rows: Mapping[str, int], policy: PolicySettings) -> list[PolicyCheck]:
    """The same for what depends on the client's numbers of rows by split."""
    training = config.training
    steps = round(training.steps(rows["train"]) * config.method.round_share(training.budget))
    read = steps * training.batch_size * training.accumulation
    different = min(read, rows["train"])
    leaving = ["train", "validation", "test"]
    if config.method.embeds or config.method.looks:
        leaving.insert(1, "embedding")
    return [
        *(_at_least(f"rows in the {split} split", rows[split], "min_rows", policy) for split in leaving),
        _at_least("steps of a round", steps, "min_steps", policy),
        _at_most("steps of a round", steps, "max_steps", policy),
        _at_least("different training rows that a round reads", different, "min_examples_per_update", policy),
        _at_most("training rows that a round reads", read, "max_examples_per_update", policy),
    ]


def enforce(items: list[PolicyCheck]) -> None:
    """Raise PolicyError that names everything that the policy forbids."""
    broken = [f"{item.setting}: asked {item.asked}, allowed {item.allowed}" for item in items if not item.passes]
    if broken:
        raise PolicyError(
            f"the coordinator asks for what this client's policy forbids: {'; '.join(broken)}. Ask the coordinator to "
            "change it, or allow it in your policy file (fedamole client --policy FILE)"
        )


def _of_method(config: Config, policy: PolicySettings) -> Iterator[PolicyCheck]:
    allowed = METHODS if policy.methods is None else policy.methods
    told = "every known method" if policy.methods is None else f"{', '.join(allowed)} (methods)"
    yield PolicyCheck("method", config.method_name, told, config.method_name in allowed)
    method, spec = config.method, config.method.spec()
    if isinstance(spec, AdapterSpec):
        rank = max(method.ranks or method.half_once_twice()) if isinstance(method, RankedMethod) else spec.rank
        yield _at_most("rank", max(rank, spec.rank), "max_rank", policy)
        yield _at_least("alpha / rank", spec.alpha / spec.rank, "min_scaling", policy)
        yield _at_most("alpha / rank", spec.alpha / spec.rank, "max_scaling", policy)
    if (probed := getattr(method, "probe_examples", None)) is not None:
        yield _at_least("method.probe_examples", probed, "min_rows", policy)


def _of_work(config: Config, policy: PolicySettings) -> Iterator[PolicyCheck]:
    training = config.training
    yield _at_most("rounds", config.federation.rounds, "max_rounds", policy)
    yield _at_most("training.learning_rate", training.learning_rate, "max_learning_rate", policy)
    if training.clip_norm > 0:
        yield _at_least("training.clip_norm", training.clip_norm, "min_clip_norm", policy)
    yield _at_most("tokens of a forward pass", training.batch_size * training.max_length, "max_batch_tokens", policy)
    chosen = config.evaluation.select
    passes = chosen == "loss" or policy.share_majority
    yield PolicyCheck("evaluation.select", chosen, "loss, or score with share_majority", passes)
    yield _at_most("training.max_length", config.training.max_length, "max_length", policy)
    yield _at_most("evaluation.max_new_tokens", config.evaluation.max_new_tokens, "max_new_tokens", policy)


def _of_data(
    config: Config, source: SourceSettings, policy: PolicySettings, own_base: str | None
) -> Iterator[PolicyCheck]:
    if own_base is None:
        named = config.base.model
        told = "any of the hub" if policy.hub_base else "the bundled one, or your own by --base (hub_base)"
        yield PolicyCheck("base", named, told, policy.hub_base or named == BUNDLED)
    names = (*BUILT_IN, "auto", source.template) if policy.templates is None else policy.templates
    told = ", ".join(dict.fromkeys(names)) + ("" if policy.templates is None else " (templates)")
    yield PolicyCheck("template", source.template, told, source.template in names)
    if (template := config.data.templates.get(source.template)) is not None:
        renamed = {new for new, old in source.columns.items() if old}  # without those that are dropped
        columns = KNOWN_COLUMNS | renamed if policy.columns is None else set(policy.columns)
        read = read_columns(template)
        told = f"{', '.join(sorted(columns))} (columns)"
        yield PolicyCheck(f"columns of template {source.template}", ", ".join(sorted(read)), told, read <= columns)


def _at_most(setting: str, asked: float, key: str, policy: PolicySettings) -> PolicyCheck:
    limit = getattr(policy, key)
    return PolicyCheck(setting, f"{asked:g}", f"at most {limit:g} ({key})", asked <= limit)


def _at_least(setting: str, asked: float, key: str, policy: PolicySettings) -> PolicyCheck:
    limit = getattr(policy, key)
    return PolicyCheck(setting, f"{asked:g}", f"at least {limit:g} ({key})", asked >= limit)
