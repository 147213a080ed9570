"""pearson: the correlation matrix and its pairs, to the accuracy that each precision states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import foveate
from foveate.ops.pearson.grids import joint_grid, resize_matrix
from foveate.testing import inputs
from foveate.testing.check import Verdict, evaluate
from foveate.testing.spec import BadInput, Bench, Call, Cases, Cost, OpSpec

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATED = {"bf16": 4e-3, "tf32": 1e-3, "bf16x3": 3e-5, "fp32": 2e-6, "fp64": 1e-12}  # |dr|


def _gradient_bounds(call: Call, stated: float, upstream: torch.Tensor) -> list[torch.Tensor]:
    """What |dr| <= stated allows each unit's gradient: sum_j |g_ij| / alpha_i, times |R^T 1|."""
    a, b = (x.detach().double() for x in call.args[:2])
    a, b = (x[:, :, None, None] if x.ndim == 2 else x for x in (a, b))
    size_a, size_b = ((x.shape[2], x.shape[3]) for x in (a, b))
    grid = joint_grid(call.kwargs.get("grid", "pair-max"), size_a, size_b)
    resample = call.kwargs.get("resample", "bilinear")
    bounds = []
    for maps, sums in ((a, upstream.abs().sum(1)), (b, upstream.abs().sum(0))):
        rows = resize_matrix(maps.shape[2], grid[0], resample)
        columns = resize_matrix(maps.shape[3], grid[1], resample)
        x = (rows @ maps @ columns.mT).transpose(0, 1).flatten(1)
        root = (x - x.mean(1, keepdim=True)).norm(dim=1)
        reach = float(rows.sum(0).max() * columns.sum(0).max())
        bounds.append(stated * reach * sums / root)
    return bounds


def _stated(spec: OpSpec, call: Call, backend: str) -> list[Verdict]:
    """|dr| and the gradients against float64, within the error that the precision states."""
    got = evaluate(spec.api, call, backend)
    exact = evaluate(spec.api, call.to(torch.float64), "reference")
    double = any(t.dtype == torch.float64 for t in call.tensors())
    stated = STATED["fp64" if double else call.kwargs.get("precision", "fp32")]
    verdicts = []
    for name, want in exact.items():
        have = got[name].double()
        if have.shape != want.shape:
            verdicts.append(Verdict(name, 0.0, 0.0, f"shape {have.shape}, not {want.shape}"))
            continue
        if bool((have.isnan() != want.isnan()).any()):
            verdicts.append(Verdict(name, float("inf"), 0.0, "NaN at other elements"))
            continue
        if name == "out":
            allowed = torch.full_like(want, stated)
        else:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(exact["out"].shape, generator=generator, dtype=torch.float64)
            leaves = [t for t in call.args[:2] if t.requires_grad]
            side = 0 if leaves[int(name[-1])] is call.args[0] else 1
            bound = _gradient_bounds(call, stated, noise)[side]
            bound = bound.view(-1, *[1] * (want.ndim - 2)).expand(want.shape[1:])
            info = torch.finfo(got[name].dtype)
            allowed = 2 * bound + info.eps * want.abs() + info.smallest_normal * info.eps
            allowed = torch.where(want.abs() > info.max, float("inf"), allowed)
        off = (have - want).abs() - allowed
        kept = want.isfinite() & allowed.isfinite()
        error = float((have - want).abs()[kept].max()) if bool(kept.any()) else 0.0
        budget = float(allowed[kept].max()) if bool(kept.any()) else 0.0
        wrong = bool((~(off[kept] <= 0)).any())
        verdicts.append(Verdict(name, error, budget, "over the stated error" if wrong else ""))
    return verdicts


def _matrix_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for shape in (case["a"], case["b"]):
        x = torch.randn(shape, generator=generator)
        x = x * case.get("scale", 1.0) + case.get("offset", 0.0)
        sides.append(x.to(device=device, dtype=dtype).requires_grad_(case.get("grad", True)))
    if case.get("same"):
        sides[1] = sides[0]
    names = ("precision", "grid", "resample", "constant", "nan_policy")
    return Call(tuple(sides), {name: case[name] for name in names if name in case})


def _draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    n = integers(2, 6)

    def side() -> tuple[int, ...]:
        units = integers(0, 9)
        return (n, units, integers(1, 9), integers(1, 9)) if integers(0, 2) else (n, units)

    case: dict[str, Any] = {"a": side(), "b": side()}
    case["resample"] = ("bilinear", "nearest", "area")[integers(0, 2)]
    case["constant"] = ("nan", "zero")[integers(0, 1)]
    case["grid"] = ("pair-max", "a", "b", (integers(1, 9), integers(1, 9)))[integers(0, 3)]
    return case


_CASES = Cases(
    {
        "samples": {"a": (7, 5), "b": (7, 3)},
        "empty": {"a": (5, 0), "b": (5, 3)},
        "two samples": {"a": (2, 1), "b": (2, 3), "constant": "zero"},
        "same grid": {"a": (3, 4, 5, 5), "b": (3, 6, 5, 5)},
        "mixed grids": {"a": (2, 3, 7, 7), "b": (2, 5, 14, 14)},
        "crossed axes": {"a": (2, 3, 4, 9), "b": (2, 2, 8, 3)},
        "near sizes, nearest": {"a": (2, 3, 7, 7), "b": (2, 3, 8, 8), "resample": "nearest"},
        "canonical grid, area": {
            "a": (2, 3, 9, 5),
            "b": (2, 3, 4, 11),
            "grid": (5, 6),
            "resample": "area",
        },
        "maps and samples": {"a": (5, 3, 4, 4), "b": (5, 7)},
        "tile - 1": {"a": (63, 31), "b": (63, 15)},
        "tile": {"a": (64, 32), "b": (64, 16)},
        "tile + 1": {"a": (65, 33), "b": (65, 17)},
        "odd": {"a": (197, 17), "b": (197, 37)},
        "large mean": {"a": (33, 4), "b": (33, 5), "offset": 60.0},
    },
    _draw,
)


def _two_layers(batch: int, shapes: tuple[tuple[int, ...], ...]) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        a, b = (inputs.activation_maps(batch, *shape, seed=i) for i, shape in enumerate(shapes))
        return Call((a.to(device), b.to(device)))

    return make


def _layer_samples(samples: int, widths: tuple[int, int]) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        a, b = (
            inputs.unit_samples(samples, width, seed=i).to(device) for i, width in enumerate(widths)
        )
        return Call((a, b))

    return make


def _self_samples(samples: int, width: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        a = inputs.unit_samples(samples, width, seed=0).to(device)
        return Call((a, a))

    return make


def _corrcoef_numpy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """np.corrcoef of all units, the cross block cut out."""
    import numpy as np

    full = np.corrcoef(a.numpy(), b.numpy(), rowvar=False)
    return torch.from_numpy(full[: a.shape[1], a.shape[1] :])


def _corrcoef_torch(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch.corrcoef of all units, the cross block cut out."""
    if b is a:
        return torch.corrcoef(a.T)
    return torch.corrcoef(torch.cat([a, b], 1).T)[: a.shape[1], a.shape[1] :]


def _standardise_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Centre, normalise, multiply."""
    a, b = a - a.mean(0), b - b.mean(0)
    r: torch.Tensor = (a / a.norm(dim=0)).T @ (b / b.norm(dim=0))
    return r


def _interpolate_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The original's way: the smaller map blown up to the larger grid, then a product."""
    size = (max(a.shape[2], b.shape[2]), max(a.shape[3], b.shape[3]))
    columns = []
    for maps in (a, b):
        if maps.shape[2:] != size:
            maps = F.interpolate(maps, size, mode="bilinear")
        columns.append(maps.transpose(1, 2).transpose(2, 3).flatten(0, 2))
    return _standardise_matmul(*columns)


def _matrix_cost(call: Call) -> Cost:
    a, b = call.args[:2]
    grid = min(a[0, 0].numel(), b[0, 0].numel())
    factor = 1 if b is a else 2
    flops = factor * a.shape[0] * a.shape[1] * b.shape[1] * grid
    read = a.numel() * a.element_size() + (0 if b is a else b.numel() * b.element_size())
    return Cost(flops, read + 4 * a.shape[1] * b.shape[1])


def _bad(id: str, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> BadInput:
    return BadInput(id, lambda: Call(args, kwargs), error, match)


_X = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
_MAPS = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(1))
_HOLED = torch.where(torch.arange(16)[:, None] == 3, float("nan"), _X)

_NAN = torch.full((2, 3), float("nan"))

_MATRIX_BAD = (
    _bad("first sizes", ValueError, "a has n=16, b has n=15", _X, _X[:15]),
    _bad("integers", TypeError, "a must be float16.*torch.int64", _X.long(), _X),
    _bad("complex", TypeError, "b must be float16.*torch.complex64", _X, _X.to(torch.complex64)),
    _bad("not an array", TypeError, "a must be a torch.Tensor", [[1.0]], _X),
    _bad("1-D", ValueError, r"a must be \[s, c\] or \[n, c, h, w\], got \(16,\)", _X[:, 0], _X),
    _bad("tokens", ValueError, "PearsonAccumulator with LayerSpec", _X[:, None], _X),
    _bad("no rows", ValueError, r"b must be .* got \(16, 3, 0, 4\)", _X, _MAPS[:, :, :0]),
    _bad("no samples", ValueError, "at least 2 samples, got 0", _X[:0], _X[:0]),
    _bad("grids differ", ValueError, r"\(4, 4\) and \(1, 1\).*grid=", _MAPS, _X, grid="native"),
    _bad("grid", ValueError, "grid must be one of 'pair-max'", _X, _X, grid="max"),
    _bad("grid 0", ValueError, "at least 1, got 0", _X, _X, grid=(0, 3)),
    _bad("resample", ValueError, "resample must be one of 'bilinear'", _X, _X, resample="cubic"),
    _bad("precision", ValueError, "precision must be one of 'bf16'", _X, _X, precision="fp8"),
    _bad("nan_policy", ValueError, "must be one of 'propagate'", _X, _X, nan_policy="skip"),
    _bad("constant", ValueError, "constant must be one of 'nan'", _X, _X, constant="one"),
    _bad("raise", ValueError, "b .* 1 non-finite .*channel 0", _X, _HOLED, nan_policy="raise"),
    _bad("all omitted", ValueError, "2 samples, got 0", _NAN, _X[:2], nan_policy="omit"),
    _bad("backend", ValueError, "backend must be one of 'auto'", _X, _X, backend="gpu"),
)

SPECS = (
    OpSpec(
        name="pearson_matrix",
        api=foveate.pearson_matrix,
        backends=("cpu",),
        dtypes=_FLOATS,
        make_inputs=_matrix_inputs,
        cases=_CASES,
        bench=(
            Bench(
                "50000 x (64, 96)",
                _layer_samples(50000, (64, 96)),
                {
                    "centre, normalise, matmul": _standardise_matmul,
                    "np.corrcoef": _corrcoef_numpy,
                    "torch.corrcoef": _corrcoef_torch,
                },
                quick=True,
            ),
            Bench(
                "20000 x (768, 768)",
                _layer_samples(20000, (768, 768)),
                {
                    "centre, normalise, matmul": _standardise_matmul,
                    "np.corrcoef": _corrcoef_numpy,
                    "torch.corrcoef": _corrcoef_torch,
                },
            ),
            Bench(
                "8192 x 2048 with itself",
                _self_samples(8192, 2048),
                {"torch.corrcoef": _corrcoef_torch},
            ),
            Bench(
                "n=4, 512@7 x 256@56",
                _two_layers(4, ((512, 7), (256, 56))),
                {"interpolate, mm": _interpolate_mm},
            ),
        ),
        cost=_matrix_cost,
        bad_inputs=_MATRIX_BAD,
        check=_stated,
    ),
)
