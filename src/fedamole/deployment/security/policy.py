"""A client's policy: its own limits, which it compares with the coordinator's settings before any training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fedamole.config import Config, build, nearest, plain
from fedamole.data.settings import SourceSettings
from fedamole.data.templates import BUILT_IN, TemplateSettings
from fedamole.errors import ConfigError, FedamoleError
from fedamole.methods import METHODS
from fedamole.methods.shared.ranks import RankedMethod
from fedamole.model.amole import AdapterSpec
from fedamole.model.base import BUNDLED
from fedamole.received.files import read_toml


def read_columns(template: TemplateSettings) -> set[str]:
    """Return the columns that a template reads."""
    return {*template.prompt_columns, *template.answer_columns}


KNOWN_COLUMNS = frozenset({"label", *(column for one in BUILT_IN.values() for column in read_columns(one))})
"""Columns that the built-in templates read."""


class PolicyError(FedamoleError):
    """The coordinator's settings violate the client's policy."""


def _key(default: Any, about: str) -> Any:
    """Define a policy key with a description, which `--write-policy` writes into the file."""
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class PolicySettings:
    """A client's `policy.toml`. Every key has a safe default."""

    methods: tuple[str, ...] | None = _key(None, "Allowed methods; unset: every method of this version.")
    max_rank: int = _key(
        64,
        "Maximum rank of a LoRA or an expert: the higher it is, the more an update can reveal about single rows.",
    )
    min_scaling: float = _key(
        0.01, "Minimum alpha / rank. Below it, an update is a copy of the gradient of the first rows."
    )
    max_scaling: float = _key(16.0, "Maximum alpha / rank.")
    max_learning_rate: float = _key(
        0.1,
        "Maximum learning rate. Far above it, the first step destroys the model, and the update is one row's gradient.",
    )
    min_clip_norm: float = _key(
        0.001,
        "Minimum norm for gradient clipping, if clipping is used: with a lower one, an update is a copy of the "
        "gradient.",
    )
    max_batch_tokens: int = _key(
        1_000_000,
        "Maximum number of tokens of a forward pass: training.batch_size times training.max_length, twice that in "
        "training on preference pairs.",
    )
    min_steps: int = _key(
        5, "Minimum number of optimiser steps per round: an update of one step is the gradient of a few rows."
    )
    max_steps: int = _key(2000, "Maximum number of optimiser steps per round.")
    min_examples_per_update: int = _key(
        20, "Minimum number of different training rows per round: an update must depend on many rows, not on one."
    )
    max_examples_per_update: int = _key(
        100_000, "Maximum number of training rows per round; a row counts each time that it is read."
    )
    min_rows: int = _key(
        20,
        "Minimum number of rows of every split whose mean is sent: train, validation, test, and embedding if it is "
        "used.",
    )
    max_rounds: int = _key(500, "Maximum number of rounds of a run, and of trainings and validations done for it.")
    max_length: int = _key(4096, "Maximum number of tokens of a prompt and its answer.")
    max_new_tokens: int = _key(1024, "Maximum number of tokens of a generated answer.")
    max_disk_mib: int = _key(10_240, "Maximum total size of this client's run folders in MiB.")
    templates: tuple[str, ...] | None = _key(
        None, "Allowed templates; unset: the built-in ones and the one given by --template."
    )
    columns: tuple[str, ...] | None = _key(
        None, "Columns that a template may read; unset: those of the built-in templates and those given by --column."
    )
    hub_base: bool = _key(
        False,
        "Whether the coordinator may choose a base from the hub, which is then downloaded; --base is always allowed.",
    )
    share_labels: bool = _key(
        False, "Whether to send the coordinator the frequency of each answer, if answers are chosen from options."
    )
    share_synthetic: bool = _key(
        False,
        "Whether to send synthetic examples, if the method does that: they are computed from this client's rows and "
        "are not private by themselves.",
    )
    share_majority: bool = _key(
        False,
        "Whether to send the test score of the most frequent answer, and the accuracy of every round: both reveal the "
        "label distribution.",
    )

    def __post_init__(self) -> None:
        """Reject limits that allow nothing, and unknown method names."""
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
                raise ConfigError(f"policy.methods: there is no method {name!r}{nearest(name, METHODS)}")


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
    share_synthetic=True,
    share_majority=True,
)
"""The policy of clients that belong to the coordinator itself, as in a simulation."""


def read_policy(path: Path) -> PolicySettings:
    """Read a policy file; ConfigError names the file, the key and, for an unknown key, the closest known one."""
    try:
        policy: PolicySettings = build(PolicySettings, read_toml(path, ConfigError), "policy")
    except ConfigError as error:
        text = str(error)
        raise ConfigError(f"policy {text}" if str(path) in text else f"{path}: {text}") from error
    return policy


def default_text() -> str:
    """Return a policy file with every key, its description and its default."""
    defaults = plain(PolicySettings())
    lines = ["# The policy of a client (docs/consent.md). Keys that are left out have the values given here."]
    for key in fields(PolicySettings):
        value = defaults.get(key.name)
        text = str(value).lower() if isinstance(value, bool) else value
        lines += [
            "",
            f"# {key.metadata['about']}",
            f"# {key.name} = []" if value is None else f"{key.name} = {text}",
        ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class PolicyCheck:
    """One setting that the coordinator requests, compared with the policy."""

    setting: str
    requested: str
    allowed: str
    passes: bool


def settings_checks(
    config: Config, source: SourceSettings, policy: PolicySettings, own_base: str | None
) -> list[PolicyCheck]:
    """Compare a run's settings with the policy; does not read the client's data.

    `source` is the client's own data, `own_base` the base that the client chose itself, if any.
    """
    return [
        *_method_checks(config, policy),
        *_training_checks(config, policy),
        *_data_checks(config, source, policy, own_base),
    ]


def row_checks(config: Config, rows: Mapping[str, int], policy: PolicySettings) -> list[PolicyCheck]:
    """Compare everything that depends on the client's numbers of rows by split with the policy."""
    training = config.training
    steps = config.method.round_steps(training.steps(rows["train"]), training.budget)
    rows_read = steps * config.method.rows_of_step(training.batch_size * training.accumulation)
    different = rows_read // config.method.trains_together  # partners read the same rows
    rows_read_once = min(int(different * config.method.own_row_share()), rows["train"])
    sent_splits = ["train", "validation", "test"]
    if config.method.needs_embeddings or config.method.probes:
        sent_splits.insert(1, "embedding")
    return [
        *(_at_least(f"rows in the {split} split", rows[split], "min_rows", policy) for split in sent_splits),
        _at_least("steps of a round", steps, "min_steps", policy),
        _at_most("steps of a round", steps, "max_steps", policy),
        _at_least("different training rows that a round reads", rows_read_once, "min_examples_per_update", policy),
        _at_most("training rows that a round reads", rows_read, "max_examples_per_update", policy),
    ]


def refuse_small_update(config: Config, steps: int, train_rows: int, policy: PolicySettings) -> None:
    """Raise PolicyError if an update took too few steps or read too few rows.

    This is checked for every update, as an exchange may take only a few of a round's steps. An update without any step
    is allowed.
    """
    batches = steps // config.method.trains_together * config.training.accumulation  # partners read the same batches
    rows = min(int(batches * config.training.batch_size * config.method.own_row_share()), train_rows)
    if steps and (steps < policy.min_steps or rows < policy.min_examples_per_update):
        raise PolicyError(
            f"the update took {steps} optimiser steps and read at most {rows} different rows; the policy requires at "
            f"least {policy.min_steps} steps (min_steps) and {policy.min_examples_per_update} rows "
            "(min_examples_per_update)"
        )


def enforce(checks: list[PolicyCheck]) -> None:
    """Raise PolicyError, which lists every violation of the policy."""
    violations = [
        f"{check.setting}: requested {check.requested}, allowed {check.allowed}" for check in checks if not check.passes
    ]
    if violations:
        raise PolicyError(
            f"this client's policy forbids what the coordinator requests: {'; '.join(violations)}. Ask the coordinator "
            "to change it, or allow it in your policy file (fedamole client --policy FILE)"
        )


def _method_checks(config: Config, policy: PolicySettings) -> Iterator[PolicyCheck]:
    allowed = METHODS if policy.methods is None else policy.methods
    limit = "every known method" if policy.methods is None else f"{', '.join(allowed)} (methods)"
    yield PolicyCheck("method", config.method_name, limit, config.method_name in allowed)
    method, spec = config.method, config.method.spec()
    if isinstance(spec, AdapterSpec):
        rank = max(method.ranks or method.half_once_twice()) if isinstance(method, RankedMethod) else spec.rank
        yield _at_most("rank", max(rank, spec.rank), "max_rank", policy)
        yield _at_least("alpha / rank", spec.alpha / spec.rank, "min_scaling", policy)
        yield _at_most("alpha / rank", spec.alpha / spec.rank, "max_scaling", policy)
    if (probed := getattr(method, "probe_examples", None)) is not None:
        yield _at_least("method.probe_examples", probed, "min_rows", policy)
    if method.sends_synthetic_examples:
        yield _at_least("rows behind synthetic examples", method.min_synthetic_rows(), "min_rows", policy)
        limit = "yes (share_synthetic)" if policy.share_synthetic else "no; share_synthetic = true allows it"
        yield PolicyCheck("sending synthetic examples", "yes", limit, policy.share_synthetic)


def _training_checks(config: Config, policy: PolicySettings) -> Iterator[PolicyCheck]:
    training = config.training
    exchanges = config.method.exchanges()
    setting = "rounds" if exchanges == 1 else f"rounds times {exchanges} exchanges"
    yield _at_most(setting, config.federation.rounds * exchanges, "max_rounds", policy)
    yield _at_most("training.learning_rate", training.learning_rate, "max_learning_rate", policy)
    if training.clip_norm > 0:
        yield _at_least("training.clip_norm", training.clip_norm, "min_clip_norm", policy)
    tokens = training.batch_size * training.max_length * training.answers_per_example
    yield _at_most("tokens of a forward pass", tokens, "max_batch_tokens", policy)
    chosen = config.evaluation.select
    passes = chosen == "loss" or policy.share_majority
    yield PolicyCheck("evaluation.select", chosen, "loss, or score with share_majority", passes)
    yield _at_most("training.max_length", config.training.max_length, "max_length", policy)
    yield _at_most("evaluation.max_new_tokens", config.evaluation.max_new_tokens, "max_new_tokens", policy)


def _data_checks(
    config: Config, source: SourceSettings, policy: PolicySettings, own_base: str | None
) -> Iterator[PolicyCheck]:
    if own_base is None:
        requested_base = config.base.model
        limit = "any of the hub" if policy.hub_base else "the bundled one, or your own by --base (hub_base)"
        yield PolicyCheck("base", requested_base, limit, policy.hub_base or requested_base == BUNDLED)
    names = (*BUILT_IN, "auto", source.template) if policy.templates is None else policy.templates
    limit = ", ".join(dict.fromkeys(names)) + ("" if policy.templates is None else " (templates)")
    yield PolicyCheck("template", source.template, limit, source.template in names)
    if (template := config.data.templates.get(source.template)) is not None:
        renamed = {new for new, old in source.columns.items() if old}  # without those that are dropped
        columns = KNOWN_COLUMNS | renamed if policy.columns is None else set(policy.columns)
        read = read_columns(template)
        limit = f"{', '.join(sorted(columns))} (columns)"
        yield PolicyCheck(f"columns of template {source.template}", ", ".join(sorted(read)), limit, read <= columns)


def _at_most(setting: str, requested: float, key: str, policy: PolicySettings) -> PolicyCheck:
    limit = getattr(policy, key)
    return PolicyCheck(setting, f"{requested:g}", f"at most {limit:g} ({key})", requested <= limit)


def _at_least(setting: str, requested: float, key: str, policy: PolicySettings) -> PolicyCheck:
    limit = getattr(policy, key)
    return PolicyCheck(setting, f"{requested:g}", f"at least {limit:g} ({key})", requested >= limit)
