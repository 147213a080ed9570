"""ncut: eigenpairs of thresholded cosine graphs and of affinities, MaskCut and TokenCut.

A bit of the affinity is only defined up to the rounding of a cosine, so every case places tau
midway between neighbouring cosines.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

import foveate
from foveate.ops.ncut.reference import cosines
from foveate.testing.check import Verdict, evaluate
from foveate.testing.spec import Call, Cases, OpSpec
from foveate.testing.specs import ncut_bad_inputs, ncut_bench

_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _features(case: dict[str, Any], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Tokens `[b, n, c]` in soft groups: neighbours in the row are alike."""
    b, n, c = case["b"], case["n"], case["c"]
    generator = torch.Generator().manual_seed(1000 * seed + 17 * n + c)
    groups = torch.randn(b, 4, c, generator=generator)
    place = torch.arange(n) * 4 // max(n, 1)
    noise = torch.randn(b, n, c, generator=generator)
    features = groups[:, place] + case.get("noise", 0.8) * noise
    for token in range(case.get("zeros", 0)):
        features[:, (7 * token + 3) % n] = 0
    result: torch.Tensor = features.to(dtype)
    return result


def _clear_tau(images: list[torch.Tensor], share: float) -> float:
    """A threshold that about `share` of the cosines exceed, and none comes near."""
    values = []
    for image in images:
        s = cosines(image.float() if image.dtype != torch.float64 else image).double()
        values.append(s[torch.ones_like(s).triu(1).bool()])
    joined = torch.cat([torch.tensor([-1.0, 1.0], dtype=torch.float64), *values]).sort().values
    middle = (joined[1:] + joined[:-1]) / 2
    wide = (joined[1:] - joined[:-1]) > 2e-5
    wanted = joined[int((1 - share) * (joined.numel() - 1))]
    return float(middle[wide][(middle[wide] - wanted).abs().argmin()])


def _ncut_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    features = _features(case, dtype, seed)
    kwargs: dict[str, Any] = {"k": case.get("k", 1)}
    kwargs["tau"] = case["tau"] if "tau" in case else _clear_tau(list(features), 0.25)
    if case.get("masked"):
        mask = torch.zeros(features.shape[:2], dtype=torch.bool)
        mask[:, : case["masked"]] = True
        kwargs["mask"] = mask.to(device)
    if case.get("ragged"):
        images = [features[0], features[0, : case["n"] // 2 + 1]]
        kwargs["tau"] = _clear_tau(images, 0.25)
        return Call(([image.to(device) for image in images],), kwargs)
    return Call((features.to(device),), kwargs)


def _affinity_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    copies = case.get("copies", 1)
    features = _features({**case, "n": case["n"] // copies, "c": 8}, torch.float64, seed)
    s = torch.stack([cosines(image) for image in features]) if case["b"] else features[:, :, :0]
    s = s.reshape(case["b"], case["n"] // copies, case["n"] // copies)
    if case.get("chain"):
        place = torch.arange(s.shape[1], dtype=torch.float64)
        s = torch.exp(-0.3 * (place[:, None] - place).abs()).expand_as(s)
    if case.get("two_valued"):
        s = torch.where(s > 0.2, 2.0, case.get("low", 0.125))
    else:
        s = s.clamp_min(0.01)
    if copies > 1:  # eigenvalues that occur copies - 1 times or more
        same = torch.eye(copies, dtype=torch.float64)
        s = torch.kron(same, s) + torch.kron(1 - same, torch.full_like(s, 0.0078125))
    s = s.to(dtype)
    return Call((s.to(device).requires_grad_(case.get("grad", False)),), {"k": case.get("k", 1)})


def _grid_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    features = _features(case, dtype, seed)
    kwargs: dict[str, Any] = {
        name: case[name]
        for name in ("n_masks", "on_reject", "binary", "size", "corners")
        if name in case
    }
    kwargs["tau"] = _clear_tau(list(features), 0.3)
    return Call((features.to(device), case["grid"]), kwargs)


def _relative(name: str, got: torch.Tensor, want: torch.Tensor, budget: float) -> Verdict:
    if got.shape != want.shape or got.dtype != want.dtype:
        return Verdict(
            name, 0.0, 0.0, f"{got.dtype} {tuple(got.shape)}, not {want.dtype} {tuple(want.shape)}"
        )
    if not got.is_floating_point():
        different = int((got != want).sum())
        return Verdict(name, different, 0.0, "not equal" if different else "")
    if got.numel() == 0:
        return Verdict(name, 0.0, budget, "")
    error = float((got - want).abs().max())
    return Verdict(name, error, budget, "" if error <= budget else "over budget")


def _pair_verdicts(
    got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], prefix: str
) -> list[Verdict]:
    """The accuracies of the family: residual 1e-9, eigenvalues 1e-10, angles 1e-9 / gap."""
    mine = {name.removeprefix(prefix): value for name, value in got.items()}
    theirs = {name.removeprefix(prefix): value for name, value in want.items()}
    found = [_relative("eigenvalues", mine["eigenvalues"], theirs["eigenvalues"], 1e-10)]
    residual = mine["residual"]
    worst = float(residual.max()) if residual.numel() else 0.0
    found.append(Verdict("residual", worst, 1e-9, "" if worst <= 1e-9 else "over tol"))
    found.append(_relative("degenerate", mine["degenerate"], theirs["degenerate"], 0))
    found.append(_relative("converged", mine["converged"], theirs["converged"], 0))
    x, y = mine["eigenvectors"], theirs["eigenvectors"]
    if x.shape != y.shape or mine["gap"].shape != theirs["gap"].shape:
        return [*found, Verdict("eigenvectors", 0.0, 0.0, "shape")]
    shape = (-1, *y.shape[-2:])
    x, y = x.reshape(shape), y.reshape(shape)
    gaps, gap = theirs["gap"].flatten(), mine["gap"].flatten()
    off = 0.0
    vector = 0.0
    for i, true in enumerate(gaps.tolist()):
        off = max(off, abs(float(gap[i]) - true) - 0.1 * true - 2e-9)
        if true > 1e-8:
            scale = float(y[i].abs().max())
            vector = max(vector, float((x[i] - y[i]).abs().max()) / scale * true)
    found.append(Verdict("gap", off, 0.0, "" if off <= 0 else "not within 10 %"))
    # An angle of 1e-9 / gap, in entries relative to the largest.
    return [*found, Verdict("eigenvectors", vector, 1e-8, "" if vector <= 1e-8 else "angle")]


def _degenerate_entries(
    spec: OpSpec, call: Call, backend: str
) -> tuple[dict[str, torch.Tensor], set[int]]:
    """`evaluate`, and the batch entries whose gradient a UserWarning called undefined."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = evaluate(spec.api, call, backend)
    entries: set[int] = set()
    for warning in caught:
        found = re.match(r"batch entry (\d+) is degenerate", str(warning.message))
        if found and warning.category is UserWarning:
            entries.add(int(found[1]))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return outputs, entries


def _check_pairs(spec: OpSpec, call: Call, backend: str) -> list[Verdict]:
    bad = _not_finite(spec, call, backend)
    if bad is not None:
        return bad
    got, warned = _degenerate_entries(spec, call, backend)
    want, _ = _degenerate_entries(spec, call, "reference")
    if got.keys() != want.keys():
        return [Verdict("outputs", 0.0, 0.0, f"{sorted(got)}, not {sorted(want)}")]
    found: list[Verdict] = []
    prefixes = sorted({name.rpartition(".")[0] + "." for name in got if name.startswith("out")})
    for prefix in prefixes:
        found += _pair_verdicts(
            {k: v for k, v in got.items() if k.startswith(prefix)},
            {k: v for k, v in want.items() if k.startswith(prefix)},
            prefix,
        )
    if "grad.0" in got:
        undefined = set(want["out.degenerate"].reshape(-1).nonzero().flatten().tolist())
        wrong = "" if warned == undefined else f"warned of {warned}, not {undefined}"
        found.append(Verdict("warnings of degenerate entries", 0.0, 0.0, wrong))
        if got["grad.0"].shape != want["grad.0"].shape:
            return [*found, Verdict("grad.0", 0.0, 0.0, "shape")]
        square = (-1, *want["grad.0"].shape[-2:])
        mine, theirs = got["grad.0"].reshape(square), want["grad.0"].reshape(square)
        gaps = want["out.gap"].reshape(-1).tolist()
        for i, gap in enumerate(gaps):
            if i in undefined:
                wrong = "" if bool(mine[i].isnan().all()) else "defined for a degenerate entry"
                found.append(Verdict(f"grad.0[{i}]", 0.0, 0.0, wrong))
                continue
            eps = torch.finfo(mine.dtype).eps
            budget = float(theirs[i].abs().max()) * (eps + 1e-8 / gap)
            finite = bool(theirs[i].isfinite().all() and mine[i].isfinite().all())
            verdict = _relative(f"grad.0[{i}]", mine[i], theirs[i], budget)
            found.append(verdict if finite else verdict._replace(wrong="not finite"))
    return found


def _not_finite(spec: OpSpec, call: Call, backend: str) -> list[Verdict] | None:
    """For planted values: the refusal that the reference gives must come from the backend too."""

    def refusal(name: str) -> str | None:
        try:
            spec.api(*call.args, **call.kwargs, backend=name)
        except ValueError as error:
            return str(error).partition(" ")[0] + str(error).partition(" at ")[2]
        return None

    tensors = [t.detach() for t in call.tensors() if t.is_floating_point()]
    if (
        all(bool(torch.isfinite(t).all()) for t in tensors)
        and spec.api is not foveate.ncut_affinity
    ):
        return None
    wanted, given = refusal("reference"), refusal(backend)
    if wanted is None and given is None:
        return None
    return [Verdict("refusal", 0.0, 0.0, "" if wanted == given else f"{given}, not {wanted}")]


def _check_masks(spec: OpSpec, call: Call, backend: str) -> list[Verdict]:
    """Masks, statuses, seeds and boxes are equal; reals have the accuracies of the family."""
    bad = _not_finite(spec, call, backend)
    if bad is not None:
        return bad
    got, want = evaluate(spec.api, call, backend), evaluate(spec.api, call, "reference")
    if got.keys() != want.keys():
        return [Verdict("outputs", 0.0, 0.0, f"{sorted(got)}, not {sorted(want)}")]
    found = []
    gap = want["out.gap"]
    clear = bool((gap > 1e-7).all() | (gap == 0).all()) and not bool(want["out.uncertain"].any())
    for name, value in got.items():
        short = name.removeprefix("out.")
        if not value.is_floating_point():
            # A token whose side is not certified may fall on either.
            if clear or short not in (
                "masks",
                "mask",
                "candidates",
                "foreground",
                "box",
                "seeds",
                "seed",
                "status",
                "uncertain",
                "degenerate",
            ):
                found.append(_relative(short, value, want[name], 0))
        elif short in ("eigenvalues", "eigenvalue") and clear:
            found.append(_relative(short, value, want[name], 1e-10))
        elif short == "residual":
            worst = float(value.max()) if value.numel() else 0.0
            found.append(Verdict(short, worst, 1e-9, "" if worst <= 1e-9 else "over tol"))
        elif short in ("eigenvectors", "eigenvector") and clear and value.numel():
            scale = float(want[name].abs().max())
            budget = 1e-8 * scale / float(gap.min())
            found.append(_relative(short, value, want[name], budget))
    return found


def _draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    n = integers(3, 75)
    return {
        "b": integers(0, 2),
        "n": n,
        "c": integers(0, 9),
        "k": integers(1, min(16, n - 2)),
        "zeros": integers(0, 2) * (n // 9),
        "masked": integers(0, 1) * (n // 3),
        "tau": (-0.3, 0.1, 0.45)[integers(0, 2)],
        "two_valued": bool(integers(0, 1)),
    }


def _draw_features(integers: Callable[[int, int], int]) -> dict[str, Any]:
    case = _draw(integers)
    del case["tau"]  # a cosine of random features may come near a given threshold
    case["c"] += 1
    return case


def _draw_grid(integers: Callable[[int, int], int]) -> dict[str, Any]:
    h, w = integers(2, 9), integers(2, 9)
    return {
        "b": integers(0, 2),
        "n": h * w,
        "c": integers(1, 9),
        "grid": (h, w),
        "zeros": integers(0, 2),
        "n_masks": integers(1, 4),
        "on_reject": ("retry", "stop", "skip")[integers(0, 2)],
        "corners": (None, 2, 3)[integers(0, 2)],
    }


def _draw_object(integers: Callable[[int, int], int]) -> dict[str, Any]:
    case = _draw_grid(integers)
    return {
        **{key: case[key] for key in ("b", "n", "c", "grid", "zeros")},
        "binary": bool(integers(0, 1)),
    }


_PAIR_CASES = Cases(
    {
        "empty": {"b": 0, "n": 5, "c": 3},
        "three tokens": {"b": 1, "n": 3, "c": 2},
        "one channel": {"b": 1, "n": 9, "c": 1},
        "31": {"b": 1, "n": 31, "c": 5, "k": 2},
        "32": {"b": 1, "n": 32, "c": 5, "k": 3},
        "dense limit, masked": {"b": 2, "n": 64, "c": 8, "masked": 20},
        "dense limit + 1": {"b": 1, "n": 65, "c": 8, "k": 2},
        "ragged": {"b": 1, "n": 67, "c": 6, "ragged": True},
        "three blocks, zero tokens": {"b": 1, "n": 70, "c": 40, "k": 5, "zeros": 9},
        "chunk of dots": {**{"b": 1, "n": 129, "c": 7, "k": 16, "noise": 1.5}, "emulated": False},
    },
    _draw_features,
)
_AFFINITY_CASES = Cases(
    {
        "empty": {"b": 0, "n": 5},
        "three tokens": {"b": 1, "n": 3, "grad": True},
        "nine, weighted": {"b": 1, "n": 9, "grad": True, "k": 2},
        "two values": {"b": 2, "n": 33, "two_valued": True, "k": 2, "grad": True},
        "two values, zero": {"b": 1, "n": 66, "two_valued": True, "low": 0.0625, "k": 2},
        "weighted": {"b": 1, "n": 67, "k": 2, "grad": True},
        "weighted, many": {"b": 1, "n": 100, "k": 8, "emulated": False},
        "nine copies, two values": {
            **{"b": 1, "n": 99, "two_valued": True, "copies": 9, "k": 16, "emulated": False},
        },
        "six chains": {"b": 1, "n": 144, "copies": 6, "chain": True, "k": 5, "emulated": False},
    },
    _draw,
)
_MASKCUT_CASES = Cases(
    {
        "empty": {"b": 0, "n": 6, "c": 3, "grid": (2, 3)},
        "5 x 6": {"b": 2, "n": 30, "c": 6, "grid": (5, 6), "n_masks": 2},
        "a line": {"b": 1, "n": 11, "c": 5, "grid": (1, 11), "n_masks": 2},
        "9 x 11, stop": {"b": 1, "n": 99, "c": 8, "grid": (9, 11), "on_reject": "stop"},
        "9 x 8, skip, upsampled": {
            **{"b": 1, "n": 72, "c": 8, "grid": (9, 8), "on_reject": "skip"},
            **{"size": (20, 30), "n_masks": 4},
        },
        "no corner rule": {
            **{"b": 1, "n": 90, "c": 8, "grid": (9, 10), "corners": None},
            "emulated": False,
        },
    },
    _draw_grid,
)
_TOKENCUT_CASES = Cases(
    {
        "empty": {"b": 0, "n": 6, "c": 3, "grid": (2, 3)},
        "6 x 7": {"b": 2, "n": 42, "c": 6, "grid": (6, 7)},
        "9 x 11": {"b": 1, "n": 99, "c": 8, "grid": (9, 11), "emulated": False},
        "6 x 11, weighted": {"b": 1, "n": 66, "c": 8, "grid": (6, 11), "binary": False},
    },
    _draw_object,
)


SPECS = (
    OpSpec(
        name="ncut",
        api=foveate.ncut,
        backends=("cpu", "triton", "cuda"),
        dtypes=_FLOATS,
        make_inputs=_ncut_inputs,
        cases=_PAIR_CASES,
        bench=ncut_bench.NCUT,
        cost=lambda call: ncut_bench.cost(call, 12),
        bad_inputs=ncut_bad_inputs.NCUT,
        check=_check_pairs,
    ),
    OpSpec(
        name="ncut_affinity",
        api=foveate.ncut_affinity,
        backends=("cpu", "triton", "cuda"),
        dtypes=_FLOATS,
        make_inputs=_affinity_inputs,
        cases=_AFFINITY_CASES,
        bench=ncut_bench.NCUT_AFFINITY,
        cost=ncut_bench.affinity_cost,
        bad_inputs=ncut_bad_inputs.NCUT_AFFINITY,
        check=_check_pairs,
    ),
    OpSpec(
        name="maskcut",
        api=foveate.maskcut,
        backends=("cpu", "triton", "cuda"),
        dtypes=_FLOATS,
        make_inputs=_grid_inputs,
        cases=_MASKCUT_CASES,
        bench=ncut_bench.MASKCUT,
        cost=lambda call: ncut_bench.cost(call, 36),
        bad_inputs=ncut_bad_inputs.MASKCUT,
        check=_check_masks,
    ),
    OpSpec(
        name="tokencut",
        api=foveate.tokencut,
        backends=("cpu", "triton", "cuda"),
        dtypes=_FLOATS,
        make_inputs=_grid_inputs,
        cases=_TOKENCUT_CASES,
        bench=ncut_bench.TOKENCUT,
        cost=lambda call: ncut_bench.cost(call, 12),
        bad_inputs=ncut_bad_inputs.TOKENCUT,
        check=_check_masks,
    ),
)
