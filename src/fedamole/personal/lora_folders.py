"""LoRA folders of one base, which PEFT, another tool or fedamole wrote, and their base."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from fedamole.errors import BaseModelError
from fedamole.merging.low_rank import LoraFactors, with_all_modules
from fedamole.model.base import BUNDLED, Base, BaseSettings, NoSuchTargetError, is_elsewhere
from fedamole.model.lora_files import LoraFolder, read_lora
from fedamole.model.pretrained import CONFIG, IDENTITY, read_identity
from fedamole.personal.saved_models import load_named
from fedamole.received.names import quoted
from fedamole.runs.identity import Identity

Notify = Callable[[str], None]


def load_lora_folders(
    folders: Mapping[str, Path], device: str, base: str | None, notify: Notify
) -> tuple[Base, dict[str, LoraFactors]]:
    """Read LoRA folders, by name, and load their base; return it and the factors of each LoRA.

    All LoRAs have the same modules: one that a folder lacks has a change of zero there. `base` replaces the base that
    the folders name. Where a folder holds the identity of its base, weights and tokenizer are compared with it.

    Raises:
        RunError: A file is missing or damaged.
        ConfigError: A folder holds no LoRA, or more than a LoRA.
        BaseModelError: The folders name different bases, or the base is missing or does not fit.
    """
    loras = {name: read_lora(folder) for name, folder in folders.items()}
    identities = {name: read_identity(folder) for name, folder in folders.items() if (folder / IDENTITY).exists()}
    named = base or _common_base(list(loras.values()), len(identities) == len(loras))
    missing = base is None and is_elsewhere(named)
    if base is None and Path(named).is_dir():
        notify(f"reads the base {Path(named).resolve()}, which {loras[next(iter(loras))].folder / CONFIG} names")
    notify("loading the base")
    try:
        # The path of the bundled base differs between machines; its identity shows whether it is the right one.
        resident = _load(BUNDLED if missing else named, device, loras, named_by_user=base is not None)
        for name, identity in identities.items():
            # The targets of this base are the modules of all folders together, those of the identity its own.
            expected = Identity(**{**asdict(identity), "targets": resident.identity.targets})
            resident.identity.check(expected, f"the adapter in {name}")
    except BaseModelError as error:
        if missing:
            raise _not_here(named, next(iter(loras))) from error
        raise
    if unknown := [name for name in loras if name not in identities]:
        notify(f"no {IDENTITY} in {', '.join(unknown)}: only names and sizes of the layers show that the base fits")
    return resident, with_all_modules({name: lora.factors for name, lora in loras.items()})


def _load(model: str, device: str, loras: Mapping[str, LoraFolder], named_by_user: bool) -> Base:
    """Load a base with all modules of the LoRAs as its targets; raise BaseModelError if a LoRA does not fit it."""
    targets = tuple(sorted({module for lora in loras.values() for module in lora.factors}))
    try:
        resident = load_named(BaseSettings(model, targets), device, named_by_user)
    except NoSuchTargetError as error:
        name = next(name for name, lora in loras.items() if error.target in lora.factors)
        raise BaseModelError(
            f"{name} adapts {quoted(error.target, 200)}, which is no linear layer inside the base {model}: name the "
            "right base with --base, or leave this folder out"
        ) from error
    for lora in loras.values():
        lora.check_fits(resident.shapes)
    return resident


def _not_here(base: str, name: str) -> BaseModelError:
    return BaseModelError(f"{base}, the base of {name}, is not on this machine: pass a copy with --base")


def _common_base(loras: Sequence[LoraFolder], all_identified: bool) -> str:
    """Return the base that all folders name; with `all_identified`, their identities are compared later instead."""
    for lora in loras:
        if not lora.base:
            raise BaseModelError(f"{lora.folder / CONFIG} names no base: pass it with --base")
        if lora.revision is not None:
            raise BaseModelError(
                f"{lora.folder / CONFIG} names the version {quoted(lora.revision)} of {lora.base}: pass a copy of that "
                "version with --base"
            )
    first, base = loras[0], str(loras[0].base)
    different = next((lora for lora in loras if _resolved(str(lora.base)) != _resolved(base)), None)
    if different is not None and not all_identified:
        raise BaseModelError(
            f"{first.folder} names the base {base}, and {different.folder} names {different.base}: only LoRAs of one "
            "base can be merged; if both are the same model, pass it with --base"
        )
    if is_elsewhere(base) and not all_identified:
        raise _not_here(base, str(first.folder))
    return base


def _resolved(base: str) -> str:
    return str(Path(base).resolve()) if Path(base).exists() else base
