"""A personal model as something that needs nothing of this package: an ordinary LoRA, or a whole model.

A mixture chooses experts token by token, so no fixed weights do exactly what it does. What is written is the one LoRA
per adapted linear that comes nearest to it on the client's own text (`ridge.py`), each module seen with the inputs that
it has while the mixture is at work. How much that costs is measured, and where it costs too much nothing is written.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedamole.data.examples import Shard
from fedamole.data.manifest import load_federation
from fedamole.data.settings import DataSettings, SourceSettings
from fedamole.data.tokens import tokenise
from fedamole.errors import BaseModelError, ConfigError, DataError, FedamoleError, RunError
from fedamole.evaluation.likelihood import mean_losses
from fedamole.evaluation.personal import EvaluationSettings
from fedamole.federation.randomness import torch_generator
from fedamole.federation.settings import TrainingSettings
from fedamole.files import new_folder, write_atomic
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, auto_class, load_base
from fedamole.model.batch import TokenPair, batches
from fedamole.model.params import Adapter, Shapes, expert_ids, shared_keys
from fedamole.model.pretrained import load_adapter, save_adapter, without_deltas
from fedamole.personal.ridge import Moments, best_lora
from fedamole.personal.saved_models import Place, base_of, own_shard, read_adapter

REPORT = "export.json"
CAP = 64
"""Largest rank that is chosen by itself; engines that serve LoRAs reserve room for the largest."""
SUMS_AT_ONCE = 2**31
"""Bytes of sums held at a time; more modules than that allows are seen in further passes over the text."""

Say = Callable[[str], None]


class LossyError(FedamoleError):
    """An export that loses too much of the personal model; `report` has the numbers."""

    def __init__(self, text: str, report: dict[str, Any]) -> None:
        """Say what was lost."""
        super().__init__(text)
        self.report = report


@dataclass(frozen=True)
class ExportSettings:
    """What is written, and how near to the personal model it has to be."""

    to: str = "lora"
    """lora: a PEFT LoRA adapter; merged: the same LoRA added to the base, a whole model."""
    rank: int | None = None
    """Rank of the LoRA; unset: that of all experts of a module together, at most CAP, and a LoRA's own."""
    ridge: float = 1e-4
    """Penalty on the size of the LoRA, relative to the mean square of a module's inputs."""
    tokens: int = 32768
    """Most tokens of text that the mixture is watched on."""
    tolerance: float = 0.05
    """Most nats per answer token that the export's validation loss may lie above the personal model's."""
    force: bool = False
    """Write it however much is lost."""

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.to not in ("lora", "merged"):
            raise ConfigError(f"--to {self.to}: write lora or merged")
        for name, value in (("rank", self.rank), ("tokens", self.tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: must be at least 1")
        if self.ridge <= 0 or self.tolerance < 0:
            raise ConfigError(f"--ridge {self.ridge} must be above 0, --tolerance {self.tolerance} not below")


@dataclass(frozen=True)
class Texts:
    """Token rows: those a mixture is watched on, and those an export is judged by."""

    calibration: list[TokenPair]
    validation: list[TokenPair]
    batch_tokens: int
    """Most tokens read at a time."""


def export(
    place: Place,
    out: Path,
    settings: ExportSettings,
    *,
    calibration: SourceSettings | None = None,
    device: str = "auto",
    base: str | None = None,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """Write a personal model as a folder that plain PEFT, or plain transformers, loads; return the report.

    The text comes from the client's own training split, or from the `calibration` file; an adapter folder without its
    run is judged by that file's validation rows too. The report (also export.json in the folder) has the validation
    losses in nats per answer token of the bare base, the personal model and the export, read back from disk.
    Errors: RunError where `out` exists, LossyError where more than the tolerance is lost; then nothing is left behind.
    """
    with new_folder(out):  # before the work, so that nobody else takes the name meanwhile
        return _export(place, out, settings, calibration, device, base, say)


def _export(
    place: Place,
    out: Path,
    settings: ExportSettings,
    calibration: SourceSettings | None,
    device: str,
    base: str | None,
    say: Say,
) -> dict[str, Any]:
    """Write the model into the empty folder `out`, all at once."""
    say("loading the base")
    resident = base_of(place, device, base)
    personal = read_adapter(place, resident)
    spec = personal.spec
    if not isinstance(spec, AdapterSpec):
        raise ConfigError(
            f"{place.adapter} is a soft prompt, which no LoRA can stand for; plain PEFT loads that folder as it is"
        )
    if settings.to == "merged":
        refuse_unmergeable(resident, personal.modules())
    texts = _texts(place, resident, calibration, settings.tokens)
    bank = Bank(resident)
    say(f"fitting a LoRA to {place.client}'s model")
    lora, about = as_lora(bank, personal, texts, settings)
    losses = {}
    for name, adapters in (("base", []), ("personal", [personal])):
        say(f"scoring {name} on validation")
        bank.load(adapters)
        losses[name] = _loss(bank, texts)
    with TemporaryDirectory(prefix=f".{out.name}.writing-", dir=out.parent) as writing:
        target = Path(writing) / "lora"
        save_adapter(lora, target, resident.name, resident.identity)
        if settings.to == "merged":
            say("merging")
            bank.load([])
            merge(target, resident, Path(writing) / "merged")
            target = Path(writing) / "merged"
        say("scoring the export on validation")
        losses["export"] = _written_loss(target, bank, texts)
        report = {
            "client": place.client,
            "to": settings.to,
            **about,
            "losses": losses,
            "tolerance": settings.tolerance,
        }
        if not losses["export"] <= losses["personal"] + settings.tolerance and not settings.force:
            raise LossyError(_lost(report), report)
        write_atomic(target / REPORT, json.dumps(report, indent=1) + "\n")
        target.rename(out)
    return report


def _lost(report: dict[str, Any]) -> str:
    losses = report["losses"]
    return (
        f"nothing is written: the export's validation loss is {losses['export']:.4f}, that of {report['client']}'s own "
        f"model {losses['personal']:.4f}, which is more than --tolerance {report['tolerance']} above; raise --rank "
        f"(now {report['rank']}), give more text by --tokens or --calibration, or write it all the same by --force"
    )


def _texts(place: Place, base: Base, calibration: SourceSettings | None, most: int) -> Texts:
    """The rows to watch the mixture on, at most so many tokens of them, and those to judge by."""
    training, evaluation, data, seed = TrainingSettings(), EvaluationSettings(), DataSettings(), 0
    own: Shard | None = None
    if place.run is not None:
        config, own = own_shard(place)
        training, evaluation, data, seed = config.training, config.evaluation, config.data, config.run.seed
    given = own
    if calibration is not None:
        settings = replace(data, source=(calibration,), manifest=None)
        given = load_federation(settings, Path.cwd()).shards[0]
    if given is None:
        raise ConfigError(
            f"{place.adapter} is a copied folder, away from the data of its run: name some text by --calibration FILE"
        )
    length = min(training.max_length, base.max_positions)

    def rows(shard: Shard, split: str) -> list[TokenPair]:
        found = tokenise(getattr(shard, split), base.tokenizer, length).rows
        if not found:
            raise DataError(f"client {shard.client}: no {split} example fits into {length} tokens")
        return [(row.prompt, row.answer) for row in found]

    watched = rows(given, "train")
    order = torch.randperm(len(watched), generator=torch_generator(seed, "calibration", place.client)).tolist()
    chosen, tokens = list[TokenPair](), 0
    for index in order:
        prompt, answer = watched[index]
        tokens += len(prompt) + len(answer)
        if chosen and tokens > most:
            break
        chosen.append(watched[index])
    return Texts(chosen, rows(own or given, "validation"), evaluation.batch_tokens)


def _loss(bank: Bank, texts: Texts) -> float:
    return mean_losses(bank, [texts.validation], texts.batch_tokens)[0]


def as_lora(bank: Bank, personal: Adapter, texts: Texts, settings: ExportSettings) -> tuple[Adapter, dict[str, Any]]:
    """The LoRA of a personal model, and what to tell of it: rank, tokens watched, share that each module misses.

    One that is a LoRA already is itself, unless a smaller rank is asked for.
    """
    spec, held = personal.spec, expert_ids(personal.tensors)
    assert isinstance(spec, AdapterSpec)
    if not any(held.values()):
        personal = without_deltas(personal)
        assert isinstance(personal.spec, AdapterSpec)
        own = personal.spec.rank
        if settings.rank is None or settings.rank >= own:
            return personal, {"rank": own, "exact": True}
        spec = personal.spec
    rank = settings.rank or min(CAP, _rank_of(personal, held))
    tensors, missed = dict[str, Tensor](), dict[str, float]()
    tokens = sum(len(prompt) + len(answer) for prompt, answer in texts.calibration)
    for modules in _passes({name: bank.base.shapes[name] for name in held}):
        for module, sums in watched(bank, personal, modules, texts).items():
            factors = best_lora(sums, rank, settings.ridge)
            a, b = shared_keys(module)
            tensors[a], tensors[b], missed[module] = factors.a, factors.b, factors.unexplained
    lora = Adapter(AdapterSpec(rank=rank, alpha=float(rank), dropout=spec.dropout), tensors)
    return lora, {"rank": rank, "exact": False, "ridge": settings.ridge, "tokens": tokens, "unexplained": missed}


def _rank_of(personal: Adapter, held: dict[str, list[int]]) -> int:
    """Ranks of all experts of a module together, the shared one included, where a module has most."""
    ranks = dict.fromkeys(held, 0)
    for name, tensor in personal.tensors.items():
        module, kind, factor = name.rsplit("/", 2)
        if factor == "A" and (kind == "shared" or kind.startswith("expert-")):
            ranks[module] += len(tensor)
    return max(ranks.values())


def _passes(shapes: Shapes) -> Iterator[list[str]]:
    """Cut the modules into runs whose sums are held together."""
    run, size = list[str](), 0
    for name, (d_in, d_out) in shapes.items():
        more = 8 * d_in * (d_in + d_out)
        if run and size + more > SUMS_AT_ONCE:
            yield run
            run, size = [], 0
        run.append(name)
        size += more
    yield run


def watched(bank: Bank, personal: Adapter, modules: Sequence[str], texts: Texts) -> dict[str, Moments]:
    """Sums of some modules' inputs and of what the mixture adds there, over all tokens of the calibration rows."""
    base = bank.base
    sums = {name: Moments(*base.shapes[name], base.device) for name in modules}
    plain: dict[str, Tensor] = {}

    def watch(name: str) -> list[torch.utils.hooks.RemovableHandle]:
        def linear(_: torch.nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
            plain[name] = out

        def mixture(_: torch.nn.Module, inputs: tuple[Any, ...], out: Tensor) -> None:
            if bank.context.hidden_states is not None:
                return  # a first look at the prompts, for weights by instance
            x, added = inputs[0].flatten(0, -2), (out - plain.pop(name)).flatten(0, -2)
            not_padding = bank.context.not_padding
            sums[name].add(*((x, added) if not_padding is None else (x[not_padding], added[not_padding])))

        layer = bank.layers[name]
        return [layer.base_layer.register_forward_hook(linear), layer.register_forward_hook(mixture)]

    bank.load([personal])
    handles = [handle for name in modules for handle in watch(name)]
    try:
        with torch.no_grad():
            for batch in batches([texts.calibration], base.pad_id, bank.packs, texts.batch_tokens):
                with bank.forward(batch.to(base.device)):
                    pass
    finally:
        for handle in handles:
            handle.remove()
    return sums


def refuse_unmergeable(base: Base, modules: Sequence[str]) -> None:
    """Raise BaseModelError where a LoRA cannot be added to the weights: quantised ones, or ones used elsewhere too."""
    if getattr(base.model, "is_quantized", False):
        raise BaseModelError(
            "--to merged: a quantised base cannot take a LoRA into its weights; export --to lora, or name an "
            'unquantised copy of the base in its config.toml (base.quantization = "none")'
        )
    owners: dict[int, list[str]] = {}
    for name, weight in base.model.named_parameters(remove_duplicate=False):
        owners.setdefault(weight.data_ptr(), []).append(name)
    for names in owners.values():
        for module in modules:
            if f"{module}.weight" in names and len(names) > 1:
                other = next(name for name in names if name != f"{module}.weight")
                raise BaseModelError(
                    f"--to merged: {module} shares its weights with {other}, so what is added for one would change "
                    "the other; export --to lora"
                )


def merge(lora: Path, base: Base, target: Path) -> None:
    """Add a LoRA to a fresh copy of the base, in the base's own dtype, and save the whole with its tokenizer."""
    from peft import PeftModel

    fresh = auto_class(base.model.config).from_pretrained(
        base.name, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    merged = PeftModel.from_pretrained(fresh, str(lora)).merge_and_unload(safe_merge=True)
    try:
        merged.save_pretrained(target)
    except SafetensorError as error:  # a full disk, for one; it is no OSError
        raise RunError(f"{target}: the model cannot be written ({error}); is there space for it?") from error
    base.tokenizer.save_pretrained(target)


def _written_loss(folder: Path, bank: Bank, texts: Texts) -> float:
    """Validation loss of what was written: a LoRA on the resident base, or a whole model."""
    if (folder / "adapter_config.json").exists():
        bank.load([load_adapter(folder, bank.base.identity)])
        return _loss(bank, texts)
    dtype: Literal["float32", "bfloat16"] = "float32" if bank.base.model.dtype == torch.float32 else "bfloat16"
    whole = load_base(BaseSettings(str(folder), tuple(bank.base.shapes), dtype), bank.base.device, Path.cwd())
    return _loss(Bank(whole), texts)
