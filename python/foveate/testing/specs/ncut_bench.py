"""ncut: benchmark rows on tokens of photographs, their oracle and their cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from foveate.ops.ncut import partition, reference
from foveate.ops.ncut.results import NCutResult
from foveate.testing import inputs
from foveate.testing.check import Verdict
from foveate.testing.spec import Bench, Call, Cost, OpSpec
from foveate.testing.specs import ncut_peers as peers


def cost(call: Call, passes: int) -> Cost:
    """One product of cosines and `passes` reads of the bits; half an addition for each."""
    features = call.args[0]
    images = features if isinstance(features, list) else list(features)
    flops = traffic = 0.0
    for image in images:
        n, c = image.shape
        flops += n * n * c + passes * n * n / 2
        traffic += n * c * image.element_size() + n * n / 8 * (passes + 1)
    return Cost(flops, traffic)


def affinity_cost(call: Call) -> Cost:
    """Twelve products with four vectors; the weights once."""
    affinity = call.args[0]
    b, n, _ = affinity.shape
    return Cost(b * 12 * 8 * n * n, b * n * n * affinity.element_size())


def _tokens(batch: int, grid: int, channels: int, **options: Any) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        features = inputs.tokens(batch, grid, channels, patch=480 // grid)
        return Call((features.to(device),), options)

    return make


def _gridded(batch: int, grid: int, channels: int, **options: Any) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        features = inputs.tokens(batch, grid, channels, patch=480 // grid)
        return Call((features.to(device), (grid, grid)), options)

    return make


def _ragged(batch: int, channels: int) -> Callable[[str], Call]:
    """Images of 24 x 32 patches and less, as those of VOC at patches of 16."""

    def make(device: str) -> Call:
        features = inputs.tokens(batch, 32, channels, patch=16).to(device)
        return Call(([features[i, : 32 * (24 - i % 4)] for i in range(batch)],))

    return make


def _affinity(grid: int, channels: int, *, two_valued: bool) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        image = inputs.tokens(1, grid, channels, patch=480 // grid)[0]
        s = reference.cosines(image)
        w = torch.where(s > 0.2, 1.0, 1e-5) if two_valued else s.clamp_min(1e-5)
        return Call((w.unsqueeze(0).to(device),))

    return make


def _edges(image: torch.Tensor, tau: float) -> torch.Tensor:
    """The float64 W of an image."""
    s = reference.cosines(image)
    return torch.where(s > torch.tensor(tau, dtype=s.dtype), 1.0, 1e-5).double()


def _true_pair(w: torch.Tensor) -> NCutResult:
    lam, x = peers.eigsh(w, 2)
    vector = partition.with_sign(x[0]).unsqueeze(0)
    gap = lam[1] - lam[0]
    none = torch.zeros((), dtype=torch.int64)
    return NCutResult(lam[:1], vector, lam[:1] * 0, gap, none, gap > 0, gap <= 1e-9, none)


def _pair_verdicts(w: torch.Tensor, result: NCutResult) -> list[Verdict]:
    """Against ARPACK in float64: eigenvalue, residual, and tokens on the wrong side."""
    true = _true_pair(w)
    lam = float((result.eigenvalues[0] - true.eigenvalues[0]).abs())
    x, y = result.eigenvectors[0], true.eigenvectors[0]
    wrong = int(((x > x.mean()) != (y > y.mean())).sum()) - int(result.uncertain)
    residual = float(result.residual.max())
    found = (
        ("eigenvalue", lam, 1e-10),
        ("residual", residual, 1e-9),
        ("wrong tokens", float(max(wrong, 0)), 0.0),
    )
    return [Verdict(n, e, budget, "" if e <= budget else "over budget") for n, e, budget in found]


def _by_arpack(spec: OpSpec, call: Call, backend: str) -> list[Verdict]:
    """ncut or ncut_affinity of one image, k = 1, where a dense reference takes many seconds."""
    result = spec.api(*call.args, **call.kwargs, backend=backend)
    given = call.args[0][0].cpu()
    w = given.double() if spec.name == "ncut_affinity" else _edges(given, 0.2)
    single = NCutResult(*(field[0].cpu() for field in result))
    return _pair_verdicts(w, single)


def _stages_by_arpack(spec: OpSpec, call: Call, backend: str) -> list[Verdict]:
    """maskcut of one image: masks and statuses are those of ARPACK's vectors."""
    result = spec.api(*call.args, **call.kwargs, backend=backend)
    whole = _edges(call.args[0][0].cpu(), 0.15)

    def solve(painted: torch.Tensor) -> NCutResult:
        return _true_pair(whole.masked_fill(painted[:, None] | painted, 1e-5))

    true = partition.maskcut_stages(
        solve, call.args[1], 3, 0.5, 0.01, 3, "retry", torch.device("cpu"), peers.component
    )
    found = []
    for name in ("masks", "status", "seeds"):
        got = getattr(result, name)[0].cpu().flatten()
        different = int((got != getattr(true, name).flatten()).sum())
        found.append(Verdict(name, different, 0.0, "not equal" if different else ""))
    return found


_ARPACK = "ARPACK, float32 product"
_LAPACK = "scipy.linalg.eigh"
_CPU = ("cpu",)

NCUT = (
    Bench(
        "1 x 900 x 384, ViT-S/16 at 480",
        _tokens(1, 30, 384),
        {_ARPACK: peers.ncut(peers.eigsh), _LAPACK: peers.ncut(peers.eigh)},
        quick=True,
        devices=_CPU,
    ),
    Bench(
        "8 x 900 x 384",
        _tokens(8, 30, 384),
        {_ARPACK: peers.ncut(peers.eigsh), _LAPACK: peers.ncut(peers.eigh)},
        devices=_CPU,
    ),
    Bench(
        "1 x 900 x 384, k = 16",
        _tokens(1, 30, 384, k=16),
        {"ARPACK, float64, 1e-9": peers.ncut(peers.eigsh_to_1e9)},
        devices=_CPU,
    ),
    Bench(
        "list of 8, 672 to 768 tokens, c = 384",
        _ragged(8, 384),
        {_ARPACK: peers.ncut(peers.eigsh), _LAPACK: peers.ncut(peers.eigh)},
        devices=_CPU,
    ),
    Bench(
        "1 x 3600 x 384, ViT-S/8 at 480",
        _tokens(1, 60, 384),
        {_ARPACK: peers.ncut(peers.eigsh), _LAPACK: peers.ncut(peers.eigh)},
        devices=_CPU,
        oracle=_by_arpack,
    ),
    Bench(
        "1 x 3600 x 768, ViT-B/8 at 480",
        _tokens(1, 60, 768),
        {_ARPACK: peers.ncut(peers.eigsh)},
        devices=_CPU,
        oracle=_by_arpack,
    ),
    Bench("8 x 900 x 384 on a GPU", _tokens(8, 30, 384), {}, devices=("cuda",)),
    Bench(
        "64 x 3600 x 768 on a GPU",
        _tokens(64, 60, 768),
        {},
        devices=("cuda",),
        oracle=_by_arpack,
    ),
    Bench(
        "1 x 10000 x 768 on a GPU",
        _tokens(1, 100, 768),
        {},
        devices=("cuda",),
        oracle=_by_arpack,
    ),
)
NCUT_AFFINITY = (
    Bench(
        "900, weighted",
        _affinity(30, 384, two_valued=False),
        {_ARPACK: peers.ncut_affinity(peers.eigsh), _LAPACK: peers.ncut_affinity(peers.eigh)},
        quick=True,
        devices=_CPU,
    ),
    Bench(
        "900, two values",
        _affinity(30, 384, two_valued=True),
        {
            _ARPACK: peers.ncut_affinity(peers.eigsh),
            "torch.lobpcg": peers.ncut_affinity(peers.lobpcg),
            "scikit-learn spectral_embedding": peers.ncut_affinity(peers.spectral_embedding),
        },
        devices=_CPU,
    ),
    Bench(
        "3600, two values",
        _affinity(60, 384, two_valued=True),
        {_ARPACK: peers.ncut_affinity(peers.eigsh)},
        devices=_CPU,
        oracle=_by_arpack,
    ),
    Bench(
        "3600, weighted",
        _affinity(60, 384, two_valued=False),
        {_ARPACK: peers.ncut_affinity(peers.eigsh)},
        devices=_CPU,
        oracle=_by_arpack,
    ),
)
MASKCUT = (
    Bench(
        "1 x 900 x 384, 3 masks",
        _gridded(1, 30, 384),
        {_ARPACK: peers.maskcut(peers.eigsh)},
        quick=True,
        devices=_CPU,
    ),
    Bench(
        "8 x 900 x 384, 3 masks",
        _gridded(8, 30, 384),
        {_ARPACK: peers.maskcut(peers.eigsh), _LAPACK: peers.maskcut(peers.eigh)},
        devices=_CPU,
    ),
    Bench(
        "1 x 3600 x 384, 3 masks",
        _gridded(1, 60, 384),
        {_ARPACK: peers.maskcut(peers.eigsh)},
        devices=_CPU,
        oracle=_stages_by_arpack,
    ),
    Bench("8 x 900 x 384 on a GPU", _gridded(8, 30, 384), {}, devices=("cuda",)),
    Bench(
        "64 x 3600 x 768, 3 masks, on a GPU",
        _gridded(64, 60, 768),
        {},
        devices=("cuda",),
        oracle=_stages_by_arpack,
    ),
)
TOKENCUT = (
    Bench(
        "1 x 900 x 384, ViT-S/16 at 480",
        _gridded(1, 30, 384),
        {_ARPACK: peers.tokencut(peers.eigsh), _LAPACK: peers.tokencut(peers.eigh)},
        quick=True,
        devices=_CPU,
    ),
    Bench("8 x 900 x 384 on a GPU", _gridded(8, 30, 384), {}, devices=("cuda",)),
)
