"""`fedamole plan` and `fedamole partition`, which train nothing. Heavy packages are imported inside the commands."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedamole.cli.options import AsJson, ConfigPath, Overrides, read_config
from fedamole.terminal import say_json, screen

if TYPE_CHECKING:
    from fedamole.planning import Plan


def plan(
    config: ConfigPath = None,
    overrides: Overrides = None,
    without_data: Annotated[
        bool,
        typer.Option("--without-data", help="Read no data and load no base; estimate sizes and memory for a GPU."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do, without training: clients, sizes, feasibility, parameters, traffic, memory.

    fedamole plan my.toml

    fedamole plan my.toml federation.rounds=50 --without-data
    """
    from dataclasses import asdict

    from fedamole.cli.console import show_sizes
    from fedamole.experiment import plan as plan_run
    from fedamole.experiment import plan_without_data

    settings = read_config(config, overrides)
    planned = plan_without_data(settings) if without_data else plan_run(settings)
    if as_json:
        say_json(asdict(planned))
        return
    console = screen()
    show_sizes(console, planned.clients, f"{len(planned.clients)} clients (examples per split)")
    for name, value in (("method", settings.method_name), *_plan_lines(planned)):
        console.print(f"{name:>12}  {value}", soft_wrap=True)


def _plan_lines(planned: "Plan") -> Iterator[tuple[str, str]]:
    """Yield name and value of each line below the clients of a plan."""
    from fedamole.planning import PlanWithoutData

    mib = planned.bytes_down / 2**20
    total = 2 * mib * planned.clients_per_round * planned.rounds
    yield "base", f"{planned.base}: {planned.base_parameters:,} parameters, {planned.targets} linear modules adapted"
    yield "adapter", f"{planned.adapter_parameters:,.0f} trainable parameters per client on average"
    yield "traffic", f"{mib:.2f} MiB to a client and about as much back per round, {total:,.0f} MiB in total"
    yield "work", f"{planned.rounds} rounds x {planned.clients_per_round} clients x {planned.steps:.0f} steps"
    if planned.server_steps:
        yield "work at the server", f"{planned.rounds} rounds x {planned.server_steps} steps, on the base there"
    if isinstance(planned, PlanWithoutData):
        parts = f"base {planned.base_mib:,.0f}, {planned.mib_per_client:,.0f} for each client in lock-step"
        yield "memory", f"about {planned.memory_mib:,.0f} MiB on a GPU with run.group = {planned.group} ({parts})"
        yield "not included", planned.not_included
        yield "assumptions", planned.assumed
    else:
        yield "memory", f"about {planned.memory_mib:,.0f} MiB with {planned.group} clients in lock-step (run.group)"
    for source, share in planned.label_noise.items():
        yield "label noise", f"{source}: {share:.0%} of the training and embedding answers are wrong on purpose"
    if planned.profile:
        yield "profile", f"privacy.profile has set {planned.profile}"
    if planned.not_from_profile:
        yield "not applied", f"privacy.profile has not set {planned.not_from_profile}"
    if planned.noise:
        yield "privacy", planned.noise
    yield "assignment", "feasible"
    for sentence in planned.exposure:
        yield "exposure", sentence


def partition(
    config: ConfigPath = None,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the manifest to this file; data.manifest=FILE uses it again.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the partition of a config, or check a stored one, and show the data of each client.

    fedamole partition my.toml

    fedamole partition my.toml --out my-manifest.json
    """
    from fedamole.cli.console import show_sizes
    from fedamole.data.manifest import load_federation
    from fedamole.files import new_file, write_atomic

    settings = read_config(config, overrides)
    with contextlib.nullcontext() if out is None else new_file(out):
        federation = load_federation(settings.data, Path.cwd())
        if out is not None:
            write_atomic(out, federation.manifest.to_json())
    values = federation.manifest.values()
    clients = [
        {
            "client": shard.client,
            **({"value": values.get(shard.client, "")} if values else {}),
            "task": shard.task,
            **{split: len(getattr(shard, split)) for split in ("train", "embedding", "validation", "test")},
            "answers": _label_shares([example.answer for example in shard.train]),
        }
        for shard in federation.shards
    ]
    if as_json:
        say_json(clients)
    else:
        show_sizes(screen(wide=140), clients, "partition (examples per split)")


def _label_shares(answers: list[str], max_shown: int = 4) -> str:
    """Return the most frequent answers with their shares, or "free text"."""
    from collections import Counter

    counts = Counter(answers)
    if len(counts) > len(answers) / 2:
        return "free text"
    shares = [f"{answer[:20]} {count / len(answers):.0%}" for answer, count in counts.most_common(max_shown)]
    return ", ".join(shares) + (f", {len(counts) - max_shown} more" if len(counts) > max_shown else "")
