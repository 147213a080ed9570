"""ncut: the calls that must raise, one for each row of the family's table."""

from __future__ import annotations

import math
from typing import Any

import torch

from foveate.testing.spec import BadInput, Call


def _bad(id: str, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> BadInput:
    return BadInput(id, lambda: Call(args, kwargs), error, match)


_F = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
_NAN = _F.clone()
_NAN[1, 7, 2] = math.nan
_INF = _F.clone()
_INF[0, 3, 0] = math.inf
_W = torch.rand(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
_W = _W + _W.T
_MASK = torch.zeros(2, 12, dtype=torch.bool)


def _changed(entries: dict[tuple[int, int], Any]) -> torch.Tensor:
    w = _W.clone()
    for (i, j), value in entries.items():
        w[i, j] = value
    return w


def _opposed() -> torch.Tensor:
    """Four directions in a plane, such that the cosines of a token sum to 0."""
    return torch.tensor([[1.0, 0.1], [-1.0, 0.1], [0.1, -1.0], [-0.1, 0.8]])


def _feature_rows(*args: Any) -> tuple[BadInput, ...]:
    """The rows of bad features, common to the three functions; `args` follow the features."""
    return (
        _bad("nan", ValueError, "finite.*nan.*batch 1, token 7", _NAN, *args),
        _bad("infinity", ValueError, "finite.*inf.*batch 0, token 3", _INF, *args),
        _bad("rank", ValueError, r"\[b, n, c\].*\(12,\)", torch.zeros(12), *args),
        _bad("integers", TypeError, "int64", _F.long(), *args),
        _bad("bool", TypeError, "bool", _F > 0, *args),
        _bad("complex", TypeError, "complex64", _F.to(torch.complex64), *args),
        _bad("tau nan", ValueError, "tau", _F, *args, tau=math.nan),
        _bad("tau 1", ValueError, "tau", _F, *args, tau=1.0),
        _bad("eps 0", ValueError, "eps", _F, *args, eps=0.0),
        _bad("eps 1", ValueError, "eps", _F, *args, eps=1.0),
        _bad("tol", ValueError, "tol", _F, *args, tol=0.0),
        _bad("max_iter", ValueError, "max_iter", _F, *args, max_iter=0),
        _bad("check", ValueError, "check", _F, *args, check="yes"),
        _bad("backend", ValueError, "backend must be one of", _F, *args, backend="tpu"),
    )


def _list_rows(*args: Any) -> tuple[BadInput, ...]:
    one = _F[0]
    return (
        _bad("list rank", ValueError, r"features\[1\].*\(2, 12, 4\)", [one, _F], *args),
        _bad("list dtypes", TypeError, "float32.*float64", [one, one.double()], *args),
        _bad("list devices", ValueError, "cpu.*meta", [one, one.to("meta")], *args),
    )


_GRID_ROWS = (
    _bad("grid", ValueError, r"5 x 2 = 10 cells and 12 tokens", _F, (5, 2)),
    _bad("class token", ValueError, "11 cells and 12 tokens; drop the CLS token", _F, (11, 1)),
    _bad("grid is a number", ValueError, "grid must be", _F, 12),
    _bad("size", ValueError, "size", _F, (3, 4), size=(0, 4)),
    _bad("two tokens", ValueError, "3 tokens", _F[:, :2], (1, 2)),
)

NCUT = (
    *_feature_rows(),
    *_list_rows(),
    _bad("k 0", ValueError, "k=0 with n=12", _F, k=0),
    _bad("k 17", ValueError, "k=17 with n=12", _F, k=17),
    _bad("k n - 1", ValueError, "k=11 with n=12", _F, k=11),
    _bad("mask dtype", TypeError, "mask must be bool", _F, mask=_MASK.float()),
    _bad("mask shape", ValueError, "mask must have", _F, mask=_MASK[:, :3]),
)
NCUT_AFFINITY = (
    _bad("rank", ValueError, "square", torch.zeros(12)),
    _bad("not square", ValueError, r"square.*\(3, 4\)", torch.zeros(3, 4)),
    _bad("integers", TypeError, "int64", _W.long()),
    _bad("nan", ValueError, "finite.*row 2", _changed({(2, 5): math.nan})),
    _bad("asymmetric", ValueError, "symmetric.*0.5", _changed({(2, 5): _W[5, 2] + 0.5})),
    _bad("negative", ValueError, "non-negative.*row 2", _changed({(2, 5): -1, (5, 2): -1})),
    _bad(
        "no weight",
        ValueError,
        "degree.*row 4",
        _W * (torch.arange(12) != 4) * (torch.arange(12) != 4).unsqueeze(1),
    ),
    _bad("k", ValueError, "k=11 with n=12", _W, k=11),
    _bad("tol", ValueError, "tol", _W, tol=-1.0),
    _bad("max_iter", ValueError, "max_iter", _W, max_iter=0),
    _bad("backend", ValueError, "backend must be one of", _W, backend="tpu"),
)
MASKCUT = (
    *_feature_rows((3, 4)),
    *_GRID_ROWS,
    _bad("list of grids", ValueError, "list of 2 pairs", [_F[0], _F[1]], (3, 4)),
    _bad("n_masks", ValueError, "n_masks", _F, (3, 4), n_masks=0),
    _bad("corners", ValueError, "corners", _F, (3, 4), corners=5),
    _bad("on_reject", ValueError, "on_reject", _F, (3, 4), on_reject="again"),
    _bad("iou_threshold", ValueError, "iou_threshold", _F, (3, 4), iou_threshold=1.5),
    _bad("min_area", ValueError, "min_area", _F, (3, 4), min_area=-0.1),
)
TOKENCUT = (
    *_feature_rows((3, 4)),
    *_GRID_ROWS,
    _bad("binary", ValueError, "binary", _F, (3, 4), binary=2),
    _bad("degree", ValueError, "degree.*row", _opposed(), (2, 2), binary=False, tau=-0.99),
)
