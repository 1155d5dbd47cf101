"""Second moments of a module's inputs: shrinking, checking, and the form in which they travel.

Moments travel divided by their trace, so that their norm is at most 1 however large a base's activations are; the
logarithm of the trace travels beside them. They are either the upper triangle, or the largest eigenvectors and what
they leave of the diagonal.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedamole.errors import DataError

TOLERANCE = 1e-6
"""Largest share of the trace by which an eigenvalue may be negative, as float32 rounds that far."""
_TINY = torch.finfo(torch.float32).tiny
_SAME_INPUT = re.compile(r"(.*\.)?((?:q|k|v)_proj|(?:gate|up)_proj)")


def input_modules(modules: Iterable[str]) -> dict[str, str]:
    """Return for each module the first one, by name, that reads the same input.

    In a decoder layer q_proj, k_proj and v_proj read one input, and gate_proj and up_proj another. Any other module is
    taken to have an input of its own.
    """
    first: dict[tuple[str, bool], str] = {}
    result = {}
    for module in sorted(modules):
        match = _SAME_INPUT.fullmatch(module)
        if match is None:
            result[module] = module
            continue
        result[module] = first.setdefault((match[1] or "", match[2] in ("gate_proj", "up_proj")), module)
    return result


def shrink(moments: Tensor, off_diagonal: float) -> Tensor:
    """Return the moments with all values off the diagonal multiplied by `off_diagonal`, which is from 0 to 1."""
    diagonal = moments.diagonal().diag()
    return diagonal + off_diagonal * (moments - diagonal)


def check_positive(moments: Tensor, where: str) -> None:
    """Raise a DataError unless moments are finite, symmetric and positive semidefinite up to `TOLERANCE`."""
    values = moments.double()
    if not values.isfinite().all():
        raise DataError(f"{where}: the second moments hold NaN or infinity, which moments of finite inputs do not")
    tolerance = TOLERANCE * max(float(values.trace().abs()), _TINY)
    shifted = values + tolerance * torch.eye(len(values), dtype=torch.float64, device=values.device)
    symmetric = bool(((values - values.T).abs() <= tolerance).all())
    if not symmetric or int(torch.linalg.cholesky_ex(shifted).info) != 0:
        raise DataError(
            f"{where}: the second moments are not positive semidefinite, which a mean of x x^T is; compute them again"
        )


def to_tensors(moments: Tensor, rank: int) -> dict[str, Tensor]:
    """Return moments in the form in which they travel: all values, or with `rank` > 0 so many eigenvectors."""
    trace = moments.double().trace().clamp(min=_TINY)
    unit, log_trace = moments.double() / trace, trace.log().float()
    if rank == 0:
        rows, columns = torch.triu_indices(*unit.shape)
        return {"log_trace": log_trace, "upper": unit[rows, columns].float()}
    values, vectors = torch.linalg.eigh(unit)
    kept = min(rank, len(values))
    factor = vectors[:, -kept:] * values[-kept:].clamp(min=0).sqrt()
    rest = (unit.diagonal() - factor.square().sum(1)).clamp(min=0)
    return {"diagonal": rest.float(), "factor": factor.float(), "log_trace": log_trace}


def from_tensors(tensors: Mapping[str, Tensor], where: str) -> Tensor:
    """Undo `to_tensors`, in float64; raise a DataError for moments that are not positive, `where` names them."""
    if "upper" in tensors:
        upper = tensors["upper"].double()
        size = int((2 * len(upper) + 0.25) ** 0.5)
        rows, columns = torch.triu_indices(size, size)
        unit = torch.zeros(size, size, dtype=torch.float64)
        unit[rows, columns] = upper
        unit = unit + unit.triu(1).T
    else:
        factor = tensors["factor"].double()
        unit = factor @ factor.T + tensors["diagonal"].double().diag()
    moments = unit * tensors["log_trace"].double().exp()
    check_positive(moments, where)
    return moments
