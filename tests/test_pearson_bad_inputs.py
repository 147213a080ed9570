"""What PearsonAccumulator, mutual_nearest_neighbors and paired_correlation refuse."""

from __future__ import annotations

import pytest
import torch

from foveate import LayerSpec, PearsonAccumulator, mutual_nearest_neighbors, paired_correlation

X = torch.randn(16, 3, generator=torch.Generator().manual_seed(20))
TOKENS = torch.randn(16, 10, 3, generator=torch.Generator().manual_seed(21))


def updated(*args, first=(X, X), weight=None, **options):
    acc = PearsonAccumulator(**options)
    if first is not None:
        acc.update(*first)
    return acc.update(*args, weight=weight)


BAD = {
    "first sizes": (lambda: updated(X, X[:15]), ValueError, "a has n=16, b has n=15"),
    "integers": (lambda: updated(X.long(), X), TypeError, "layer '0' of a .*int64"),
    "complex": (lambda: updated(X, X.to(torch.complex64)), TypeError, "of b .*complex64"),
    "no tensor": (lambda: updated(3, X), TypeError, "a must be a tensor"),
    "no tensor in a list": (lambda: updated([[1.0]], X), TypeError, "layer '0' of a"),
    "1-D": (lambda: updated(X[:, 0], X), ValueError, r"\[s, c\].*got \(16,\)"),
    "crop": (
        lambda: updated(X, X, layers_a=LayerSpec(crop=(1, 0, 0, 0)), first=None),
        ValueError,
        "h, w >= 1 after crop",
    ),
    "tokens": (lambda: updated(TOKENS, X, first=None), ValueError, "t=10.*prefix.*grid_hw"),
    "prefix": (
        lambda: updated(TOKENS, X, layers_a=LayerSpec(prefix_tokens=10), first=None),
        ValueError,
        "more tokens than prefix_tokens",
    ),
    "grid_hw": (
        lambda: updated(TOKENS, X, layers_a=LayerSpec(grid_hw=(3, 3)), first=None),
        ValueError,
        "grid_hw must hold",
    ),
    "native": (
        lambda: updated(TOKENS[:, :9], X, grid="native", first=None),
        ValueError,
        r"\(3, 3\) and \(1, 1\).*grid=",
    ),
    "mode": (lambda: PearsonAccumulator(mode="x"), ValueError, "mode must be one of 'pearson'"),
    "grid": (lambda: PearsonAccumulator(grid="x"), ValueError, "grid must be one of"),
    "resample": (lambda: PearsonAccumulator(resample="x"), ValueError, "resample must be one of"),
    "precision": (lambda: PearsonAccumulator(precision="x"), ValueError, "precision must be one"),
    "store": (lambda: PearsonAccumulator(store="x"), ValueError, "store must be one of 'products'"),
    "policy": (lambda: PearsonAccumulator(nan_policy="x"), ValueError, "nan_policy must be one"),
    "constant": (lambda: PearsonAccumulator(constant="x"), ValueError, "constant must be one of"),
    "layout": (lambda: LayerSpec(layout="x"), ValueError, "layout must be one of"),
    "side": (lambda: updated(X, X).topk(1, side="c"), ValueError, "side must be one of 'a', 'b'"),
    "by": (lambda: updated(X, X).topk(1, by="x"), ValueError, "by must be one of 'signed'"),
    "layer set": (lambda: updated({"x": X}, X), ValueError, r"layers of a must stay \['0'\]"),
    "channels": (lambda: updated(X[:, :2], X), ValueError, r"'0' of a .*\(3, \(1, 1\)\), got \(2"),
    "float64 later": (lambda: updated(X.double(), X), TypeError, "'0' of a .*float32.*float64"),
    "device": (lambda: updated(X.to("meta"), X), ValueError, "must be on cpu, got meta"),
    "weight shape": (lambda: updated(X, X, weight=X), ValueError, r"weight must be \[n\]"),
    "weight sign": (lambda: updated(X, X, weight=-X[:, 0].abs()), ValueError, "not negative"),
    "weight nan": (lambda: updated(X, X, weight=X[:, 0] / 0), ValueError, "finite"),
    "iccv weight": (
        lambda: updated(X, X, mode="iccv2023", means=(X[0], X[0]), weight=X[:, 0]),
        ValueError,
        "weight must be None",
    ),
    "no means": (lambda: PearsonAccumulator(mode="iccv2023"), ValueError, "means"),
    "iccv policy": (
        lambda: PearsonAccumulator(mode="iccv2023", means=(X[0], X[0]), constant="zero"),
        ValueError,
        "means",
    ),
    "means size": (
        lambda: updated(X, X, mode="iccv2023", means=(X[0, :2], X[0])),
        ValueError,
        r"means of a must be \[c\]",
    ),
    "k bool": (lambda: updated(X, X).topk(True), TypeError, "k must be an int"),
    "k float": (lambda: updated(X, X).topk(1.5), TypeError, "k must be an int"),
    "k 0": (lambda: updated(X, X).topk(0), ValueError, "at least 1, got 0"),
    "k large": (lambda: updated(X, X).topk(4), ValueError, "k=4, size 3"),
    "compute of nothing": (lambda: PearsonAccumulator().compute(), RuntimeError, "at least one"),
    "topk of nothing": (lambda: PearsonAccumulator().topk(1), RuntimeError, "at least one"),
    "summary of nothing": (lambda: PearsonAccumulator().summary(), RuntimeError, "at least one"),
    "memory": (lambda: updated(X, X, memory_limit=10), RuntimeError, "72 bytes, .* 10.*topk"),
    "merge": (
        lambda: updated(X, X).merge_(PearsonAccumulator(grid="a")),
        ValueError,
        "grid must be 'pair-max' .*got 'a'",
    ),
    "merge layout": (
        lambda: updated(X, X).merge_(PearsonAccumulator().update(X[:, :2], X)),
        ValueError,
        "layout_a",
    ),
    "load": (
        lambda: PearsonAccumulator(store="samples").load_state_dict(updated(X, X).state_dict()),
        ValueError,
        "store must be 'samples' .*got 'products'",
    ),
    "pairs shape": (lambda: paired_correlation(X, X, torch.zeros(3)), ValueError, r"\[p, 2\]"),
    "pairs dtype": (lambda: paired_correlation(X, X, torch.zeros(1, 2)), TypeError, "float32"),
    "pairs range": (lambda: paired_correlation(X, X, [[0, 3]]), ValueError, r"0\.\.2, got 3"),
    "corr 1-D": (lambda: mutual_nearest_neighbors(X[0]), ValueError, r"\[c1, c2\], got \(3,\)"),
    "corr k": (lambda: mutual_nearest_neighbors(X, 4), ValueError, "k=4, size 3"),
    "corr list": (lambda: mutual_nearest_neighbors([[1.0]]), TypeError, "corr must be"),
    "top-k of rows": (
        lambda: mutual_nearest_neighbors(updated(X, X).topk(1, rows=(0, 2))),
        ValueError,
        "all units, got one read with rows= or cols=",
    ),
    "top-k of columns": (
        lambda: mutual_nearest_neighbors(updated(X, X).topk(1, cols=(1, 3))),
        ValueError,
        "all units, got one read with rows= or cols=",
    ),
    "backend": (lambda: PearsonAccumulator(backend="gpu"), ValueError, "backend must be one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
