"""Export a personal model for use without fedamole: as a LoRA adapter, or merged into the base as a whole model.

A mixture chooses its experts per token, so no fixed weights are equivalent to it. The export is the LoRA that, in each
adapted linear layer, is closest to the mixture on the client's own text (`ridge.py`). A layer's inputs are those
that it has while the mixture is active. The loss of quality is measured; if it is too large, nothing is written.
"""

import json
from collections.abc import Callable, Sequence
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
from fedamole.files import follow_umask, new_folder, write_atomic
from fedamole.model.amole import AdapterSpec
from fedamole.model.bank import Bank
from fedamole.model.base import Base, BaseSettings, load_base
from fedamole.model.batch import TokenPair
from fedamole.model.causality import auto_class
from fedamole.model.moments import collect_moments, module_runs
from fedamole.model.params import Adapter, expert_ids, shared_keys
from fedamole.model.pretrained import load_adapter, save_adapter, without_deltas
from fedamole.personal.export_card import export_card
from fedamole.personal.export_settings import MAX_DEFAULT_RANK, ExportSettings
from fedamole.personal.ridge import best_lora
from fedamole.personal.saved_models import SavedModel, client_shard, load_base_for, read_adapter
from fedamole.runs.adapter_folder import CARD

REPORT = "export.json"


class LossyError(FedamoleError):
    """An export whose validation loss exceeds the tolerance; `report` is the same as that of a successful export."""

    def __init__(self, text: str, report: dict[str, Any]) -> None:
        """Keep the report with the message."""
        super().__init__(text)
        self.report = report


@dataclass(frozen=True)
class Texts:
    """Token rows to fit the LoRA on, and to measure the loss on."""

    calibration: list[TokenPair]
    validation: list[TokenPair]
    batch_tokens: int
    """Maximum number of tokens per forward pass."""


def export(
    model: SavedModel,
    out: Path,
    settings: ExportSettings,
    *,
    calibration: SourceSettings | None = None,
    device: str = "auto",
    base: str | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write a personal model to a new folder that plain PEFT, or plain transformers, loads; return the report.

    The LoRA is fitted on the client's training split, or on the `calibration` file. An adapter folder without its run
    is also validated on that file. The report, saved as export.json as well, has the validation losses (nats per answer
    token) of the untuned base, the personal model and the export, which is read back from disk.

    Raises:
        RunError: `out` exists.
        LossyError: The loss exceeds the tolerance; nothing is written.
        ConfigError: The model is a soft prompt, or there is no calibration text.
        BaseModelError: The base is missing or different, or the LoRA cannot be merged into it.
    """
    with new_folder(out):  # reserves the name before the work begins
        return _export(model, out, settings, calibration, device, base, notify)


def _export(
    model: SavedModel,
    out: Path,
    settings: ExportSettings,
    calibration: SourceSettings | None,
    device: str,
    base: str | None,
    notify: Callable[[str], None],
) -> dict[str, Any]:
    """Replace the empty folder `out` by the finished export, in one step."""
    notify("loading the base")
    resident = load_base_for(model, device, base)
    personal = read_adapter(model, resident)
    spec = personal.spec
    if not isinstance(spec, AdapterSpec):
        raise ConfigError(
            f"{model.folder} is a soft prompt, which cannot be written as a LoRA; plain PEFT loads that folder as it is"
        )
    if settings.to == "merged":
        refuse_unmergeable(resident, personal.modules())
    texts = texts_of(model, resident, calibration, settings.tokens)
    bank = Bank(resident)
    notify(f"fitting a LoRA to {model.client}'s model")
    lora, about = as_lora(bank, personal, texts, settings)
    losses = {}
    for name, adapters in (("base", []), ("personal", [personal])):
        notify(f"scoring {name} on validation")
        bank.load(adapters)
        losses[name] = _loss(bank, texts)
    with TemporaryDirectory(prefix=f".{out.name}.writing-", dir=out.parent) as writing:
        target = Path(writing) / "lora"
        save_adapter(lora, target, resident.name, resident.identity)
        if settings.to == "merged":
            notify("merging")
            bank.load([])
            merge(target, resident, Path(writing) / "merged")
            target = Path(writing) / "merged"
        save_tokenizer(resident, target)
        notify("scoring the export on validation")
        losses["export"] = _written_loss(target, bank, texts)
        report = {
            "client": model.client,
            "to": settings.to,
            **about,
            "losses": losses,
            "tolerance": settings.tolerance,
        }
        if not losses["export"] <= losses["personal"] + settings.tolerance and not settings.force:
            raise LossyError(_lossy_message(report), report)
        write_atomic(target / REPORT, json.dumps(report, indent=1) + "\n")
        write_atomic(target / CARD, export_card(model, resident.name, report))
        follow_umask(target)
        target.rename(out)
    return report


def _lossy_message(report: dict[str, Any]) -> str:
    losses = report["losses"]
    return (
        f"nothing was written: the validation loss is {losses['export']:.4f} for the export and "
        f"{losses['personal']:.4f} for {report['client']}'s model, and the difference exceeds --tolerance "
        f"{report['tolerance']}; raise --rank (now {report['rank']}), give more text with --tokens or --calibration, "
        "or write it anyway with --force"
    )


def texts_of(model: SavedModel, base: Base, calibration: SourceSettings | None, max_tokens: int) -> Texts:
    """Return the rows to fit on, with at most `max_tokens` tokens in total, and the rows to validate on."""
    training, evaluation, data, seed = TrainingSettings(), EvaluationSettings(), DataSettings(), 0
    own: Shard | None = None
    if model.run is not None:
        config, own = client_shard(model)
        training, evaluation, data, seed = config.training, config.evaluation, config.data, config.run.seed
    shard = own
    if calibration is not None:
        settings = replace(data, source=(calibration,), manifest=None)
        shard = load_federation(settings, Path.cwd()).shards[0]
    if shard is None:
        raise ConfigError(
            f"{model.folder} was copied out of its run, so the client's data are not known: pass --calibration FILE"
        )
    length = min(training.max_length, base.max_positions)

    def rows(shard: Shard, split: str) -> list[TokenPair]:
        tokens = tokenise(getattr(shard, split), base.tokenizer, length).rows
        if not tokens:
            raise DataError(f"client {shard.client}: no {split} example fits into {length} tokens")
        return [(row.prompt, row.answer) for row in tokens]

    available = rows(shard, "train")
    order = torch.randperm(len(available), generator=torch_generator(seed, "calibration", model.client)).tolist()
    chosen, tokens = list[TokenPair](), 0
    for index in order:
        prompt, answer = available[index]
        tokens += len(prompt) + len(answer)
        if chosen and tokens > max_tokens:
            break
        chosen.append(available[index])
    return Texts(chosen, rows(own or shard, "validation"), evaluation.batch_tokens)


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
    rank = settings.rank or min(MAX_DEFAULT_RANK, _rank_of(personal, held))
    tensors, missed = dict[str, Tensor](), dict[str, float]()
    tokens = sum(len(prompt) + len(answer) for prompt, answer in texts.calibration)
    bank.load([personal])
    for modules in module_runs({name: bank.base.shapes[name] for name in held}, outputs=True):
        moments = collect_moments(bank, modules, texts.calibration, texts.batch_tokens, outputs=True)
        for module, sums in moments.items():
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


def refuse_unmergeable(base: Base, modules: Sequence[str]) -> None:
    """Raise BaseModelError if a LoRA cannot be merged: for quantised weights, and weights that modules share."""
    if getattr(base.model, "is_quantized", False):
        raise BaseModelError(
            "--to merged: a LoRA cannot be merged into a quantised base; export with --to lora, or set "
            'base.quantization = "none" in the run\'s config.toml'
        )
    names_by_weight: dict[int, list[str]] = {}
    for name, weight in base.model.named_parameters(remove_duplicate=False):
        names_by_weight.setdefault(weight.data_ptr(), []).append(name)
    for names in names_by_weight.values():
        for module in modules:
            if f"{module}.weight" in names and len(names) > 1:
                other = next(name for name in names if name != f"{module}.weight")
                raise BaseModelError(
                    f"--to merged: {module} shares its weights with {other}, so merging would change both; "
                    "export with --to lora"
                )


def merge(lora: Path, base: Base, target: Path) -> None:
    """Merge a LoRA into a new copy of the base, in the base's own dtype, and save it."""
    from peft import PeftModel

    copy = auto_class(base.model.config, base.images is not None).from_pretrained(
        base.name, dtype="auto", use_safetensors=True, trust_remote_code=False
    )
    merged = PeftModel.from_pretrained(copy, str(lora)).merge_and_unload(safe_merge=True)
    try:
        merged.save_pretrained(target)
    except SafetensorError as error:  # for example a full disk; it is not an OSError
        raise RunError(f"{target}: the model cannot be written ({error}); check the free disk space") from error


def save_tokenizer(base: Base, target: Path) -> None:
    """Write the tokenizer of a base into a folder; of one with images, the processor that contains it."""
    (base.tokenizer if base.images is None else base.images.processor).save_pretrained(target)


def _written_loss(folder: Path, bank: Bank, texts: Texts) -> float:
    """Validation loss of an exported folder: a LoRA on the bank's base, or a whole model."""
    if (folder / "adapter_config.json").exists():
        bank.load([load_adapter(folder, bank.base.identity)])
        return _loss(bank, texts)
    dtype: Literal["float32", "bfloat16"] = "float32" if bank.base.model.dtype == torch.float32 else "bfloat16"
    settings = BaseSettings(str(folder), tuple(bank.base.shapes), dtype, images=bank.base.images is not None)
    whole = load_base(settings, bank.base.device, Path.cwd())
    return _loss(Bank(whole), texts)
