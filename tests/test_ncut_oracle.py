"""Eigenpairs of token graphs against LAPACK's dense generalised solver, and their certificate."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

import foveate
from foveate.ops.ncut import cpu as ncut_cpu

EPS = 1e-5


def tokens(n: int, c: int, seed: int, noise: float = 0.8, groups: int = 4) -> torch.Tensor:
    """`[n, c]` float64 in soft groups along the row."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(groups, c))
    place = np.arange(n) * groups // n
    return torch.from_numpy(centres[place] + noise * rng.normal(size=(n, c)))


def unit_rows(features: torch.Tensor) -> torch.Tensor:
    features = features.double()
    return features / features.norm(dim=1, keepdim=True).clamp_min(1e-12)


def middle_tau(features: torch.Tensor, share: float) -> float:
    """A threshold midway in a clear interval between cosines; about `share` of them exceed it."""
    unit = unit_rows(features)
    s = (unit @ unit.T)[torch.ones(len(unit), len(unit)).triu(1).bool()]
    s = torch.cat([s, torch.tensor([-1.0, 1.0], dtype=s.dtype)]).sort().values
    wide = (s[1:] - s[:-1]) > 1e-5
    middle = ((s[1:] + s[:-1]) / 2)[wide]
    return float(middle[(middle - s[int((1 - share) * (len(s) - 1))]).abs().argmin()])


def dense(features: torch.Tensor, tau: float, masked: torch.Tensor | None = None) -> np.ndarray:
    """W of the spec's formula, a zero or masked token having cosine 0 with all, itself too."""
    unit = unit_rows(features)
    if masked is not None:
        unit = unit * ~masked.unsqueeze(1)
    s = unit @ unit.T
    s[range(len(s)), range(len(s))] = (unit != 0).any(1).double()
    return np.where((s > tau).numpy(), 1.0, EPS)


def lapack(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of (D - W) x = lam D x but the trivial one; vectors in rows, x^T D x = 1.

    The trivial pair is moved to lam = 10 first: LAPACK mixes it with lam = 0 + rounding.
    """
    d = w.sum(1)
    lifted = np.diag(d) - w + 10 * np.outer(d, d) / d.sum()
    values, vectors = scipy.linalg.eigh((lifted + lifted.T) / 2, np.diag(d))
    return values[:-1], vectors.T[:-1]


def assert_pairs(result: foveate.NCutResult, w: np.ndarray, exact: Any, k: int) -> None:
    """Eigenvalues to 1e-10; vectors to 1e-9 / gap, as clusters where eigenvalues are close."""
    values, vectors = exact
    d = w.sum(1)
    x = result.eigenvectors.numpy()
    np.testing.assert_allclose(result.eigenvalues, values[:k], rtol=0, atol=1e-10)
    assert bool(result.converged)
    assert float(result.residual.max()) <= 1e-9
    np.testing.assert_allclose((x * d) @ x.T, np.eye(k), atol=1e-10)
    np.testing.assert_allclose(x @ d / math.sqrt(d.sum()), 0, atol=1e-10)
    for row in x:
        tied = np.flatnonzero(np.abs(row) >= np.abs(row).max() * (1 - 1e-9))
        assert row[tied[0]] > 0
    first = 0
    while first < k:  # a cluster ends where the next eigenvalue is at least 1e-6 away
        last = first
        while last + 1 < len(values) and values[last + 1] - values[last] < 1e-6:
            last += 1
        below = values[first] - values[first - 1] if first else math.inf
        above = values[last + 1] - values[last] if last + 1 < len(values) else math.inf
        basis = vectors[first : last + 1] * np.sqrt(d)
        mine = x[first : min(last + 1, k)] * np.sqrt(d)
        outside = mine - (mine @ basis.T) @ basis
        assert np.linalg.norm(outside, 2) <= 1e-9 / min(below, above, 1)
        first = last + 1
    gaps = np.diff(values[: k + 1])
    assert abs(float(result.gap) - gaps.min()) <= 0.1 * gaps.min() + 2e-10


@pytest.mark.parametrize(
    ("n", "c", "ks", "masked", "share"),
    [
        (3, 1, (1,), 0, 0.5),
        (3, 3, (1,), 0, 0.5),
        (9, 1, (1, 2, 5, 7), 0, 0.4),
        (9, 3, (1, 2, 5, 7), 2, 0.4),
        (64, 3, (1, 5, 16), 0, 0.3),
        (64, 64, (1, 2, 16), 20, 0.2),
        (97, 384, (1, 5, 16), 0, 0.1),
        (397, 64, (1, 5, 16), 0, 0.2),
        (397, 384, (1, 2, 5), 150, 0.1),
        (900, 64, (1, 16), 100, 0.2),
    ],
)
def test_pairs_are_those_of_lapack(n, c, ks, masked, share):
    features = tokens(n, c, seed=n + c)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=torch.Generator().manual_seed(n))[:masked]] = True
    tau = middle_tau(features, share)
    w = dense(features, tau, mask)
    exact = lapack(w)
    for k in ks:
        result = foveate.ncut(features, tau=tau, k=k, mask=mask, backend="cpu")
        assert_pairs(result, w, exact, k)


@pytest.mark.parametrize("tau", [-0.3, -0.05])
@pytest.mark.parametrize("n", [40, 130])
def test_below_zero_tau_joins_masked_and_zero_tokens_to_all(tau, n):
    features = tokens(n, 12, seed=3)
    features[5] = 0
    mask = torch.arange(n) % 4 == 1
    for given in (None, mask):
        result = foveate.ncut(features, tau=tau, k=3, mask=given, backend="cpu")
        w = dense(features, tau, given)
        assert_pairs(result, w, lapack(w), 3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_masked_tokens_all_hold_the_mean_over_mu(backend):
    features = tokens(150, 24, seed=5)
    mask = torch.arange(150) % 3 == 0
    r = foveate.ncut(features, tau=middle_tau(features, 0.2), k=4, mask=mask, backend=backend)
    x, mu = r.eigenvectors, 1 - r.eigenvalues
    expected = (x.mean(1) / mu).unsqueeze(1).expand(-1, int(mask.sum()))
    torch.testing.assert_close(x[:, mask], expected, rtol=0, atol=1e-8)


def test_the_reported_residual_is_that_of_the_returned_vector_at_10000_tokens():
    features = tokens(10000, 8, seed=11, noise=0.5).float()
    r = foveate.ncut(features, tau=0.3, backend="cpu")
    bits, _ = ncut_cpu.affinity_pack(features, 0.3, None)
    x = r.eigenvectors[0]
    product = torch.empty_like(x)
    degree = torch.empty_like(x)
    for q in range(bits.shape[0]):  # 32 rows of B
        rows = ((bits[q] >> torch.arange(32, dtype=torch.int32).unsqueeze(1)) & 1).double()
        rows = rows[: 10000 - 32 * q]
        product[32 * q : 32 * q + len(rows)] = rows @ x
        degree[32 * q : 32 * q + len(rows)] = rows.sum(1)
    degree = EPS * 10000 + (1 - EPS) * degree
    left = EPS * x.sum() + (1 - EPS) * product  # W x
    residual = (left / degree.sqrt() - (1 - r.eigenvalues[0]) * degree.sqrt() * x).norm()
    assert bool(r.converged)
    assert float(residual) <= 1e-9
    assert abs(float(residual) - float(r.residual[0])) <= 0.05 * float(residual) + 4e-15
    assert abs(float((x * degree) @ x) - 1) <= 1e-12
    assert abs(float(degree @ x)) <= 1e-9 * float(degree @ x.abs())


def islands(sizes: list[int]) -> torch.Tensor:
    """Tokens along different axes: complete graphs of the given sizes, joined by eps alone."""
    return torch.eye(len(sizes), dtype=torch.float64).repeat_interleave(torch.tensor(sizes), 0)


@pytest.mark.parametrize(
    "sizes",
    [[300, 299, 301], [600, 200, 100], [896, 2, 1, 1], [60, 1], [60, 1, 1], [200] + [1] * 30],
    ids=str,
)
def test_islands_and_isolated_tokens_are_exact(sizes):
    features = islands(sizes)
    n = len(features)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    w = dense(features[order], 0.2)
    exact = lapack(w)
    values, _ = exact
    for k in {1, min(4, n - 2)}:
        result = foveate.ncut(features[order], tau=0.2, k=k, backend="cpu")
        if float(result.gap) > 1e-9:
            assert_pairs(result, w, exact, k)
        np.testing.assert_allclose(result.eigenvalues, values[:k], rtol=0, atol=1e-10)
    first = foveate.ncut(features[order], tau=0.2, backend="cpu")
    if values[1] - values[0] > 1e-9:
        assert not bool(first.degenerate)
        # The vector is constant on each island, so that the split must not cut one.
        side = first.eigenvectors[0] > first.eigenvectors[0].mean()
        for axis in features.unique(dim=0):
            assert len(side[(features[order] == axis).all(1)].unique()) == 1
    else:
        assert bool(first.degenerate)
        assert int(first.uncertain) == n


@pytest.mark.parametrize(("blocks", "size"), [(3, 20), (4, 30), (9, 12), (18, 8)])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_equal_blocks_have_a_multiple_eigenvalue(blocks, size, backend):
    features = islands([size] * blocks)
    n = blocks * size
    k = min(16, blocks + 1)
    result = foveate.ncut(features, tau=0.2, k=k, backend=backend)
    lam = 1 - (1 - EPS) * size / (EPS * n + (1 - EPS) * size)
    expected = [lam] * min(blocks - 1, k) + [1.0] * (k - blocks + 1)
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=0, atol=1e-10)
    assert bool(result.degenerate)
    assert int(result.uncertain) == n
    d = dense(features, 0.2).sum(1)
    x = result.eigenvectors.numpy()
    np.testing.assert_allclose((x * d) @ x.T, np.eye(k), atol=1e-9)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["all ones", "all eps", "half zero"])
def test_graphs_without_structure_are_degenerate(kind, backend):
    n = 90
    features = torch.ones(n, 5) if kind == "all ones" else torch.eye(n)
    if kind == "half zero":
        features[: n // 2] = 0
        features[n // 2 :] = torch.eye(n)[0]
    w = dense(features, 0.2)
    values, _ = lapack(w)
    result = foveate.ncut(features, tau=0.2, k=3, backend=backend)
    np.testing.assert_allclose(result.eigenvalues, values[:3], rtol=0, atol=1e-10)
    assert bool(result.degenerate)
    if kind != "half zero":
        assert int(result.uncertain) == n
        cut = foveate.maskcut(features, (9, 10), tau=0.2, backend=backend)
        assert cut.status.tolist() == [int(foveate.MaskStatus.DEGENERATE)] * 3
        assert not bool(cut.masks.any() | cut.candidates.any())
        assert cut.seeds.tolist() == [-1] * 3
        found = foveate.tokencut(features, (9, 10), tau=0.2, backend=backend)
        assert not bool(found.mask.any() | found.foreground.any())
        assert found.box.tolist() == [0] * 4
        assert int(found.seed) == -1


def test_stopping_early_counts_at_least_the_tokens_on_the_wrong_side():
    wrong_total = 0
    for seed in range(3):
        features = tokens(300, 32, seed=seed, noise=1.6)
        tau = middle_tau(features, 0.08)
        exact = lapack(dense(features, tau))[1][0]
        true = exact > exact.mean()
        degrees = dense(features, tau).sum(1)
        for passes, k in itertools.product((1, 2, 3, 4, 6), (1, 3, 16)):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                r = foveate.ncut(features, tau=tau, k=k, max_iter=passes, backend="cpu")
            told = [w for w in caught if w.category is RuntimeWarning]
            assert bool(told) == (not bool(r.converged))
            assert int(r.iterations) <= passes
            assert (r.eigenvalues.diff() >= 0).all()
            gram = r.eigenvectors.numpy() * degrees @ r.eigenvectors.numpy().T
            np.testing.assert_allclose(gram, np.eye(k), rtol=0, atol=1e-12)
            x = r.eigenvectors[0].numpy()
            side = x > x.mean()
            wrong = min((side != true).sum(), (side == true).sum())
            assert int(r.uncertain) >= wrong
            wrong_total += wrong
    assert wrong_total > 0  # the stops were early enough to matter


def test_a_well_gapped_graph_has_no_uncertain_token():
    features = tokens(600, 48, seed=1, noise=0.3)
    r = foveate.ncut(features, tau=middle_tau(features, 0.25), backend="cpu")
    assert int(r.uncertain) == 0
    assert bool(r.converged)
    assert not bool(r.degenerate)


def test_what_did_not_converge_is_named_with_its_passes_and_residual():
    easy, hard = tokens(300, 32, 0, noise=0.05), tokens(300, 32, 1, noise=2.0)
    features = torch.stack([easy, hard])
    message = r"residual of 1e-09 for batch entries \[.*1\] within \d+ passes.*worst residual"
    with pytest.warns(RuntimeWarning, match=message):
        r = foveate.ncut(features, tau=0.1, max_iter=1, backend="cpu")
    assert not bool(r.converged[1])
    assert bool(r.eigenvectors.isfinite().all())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foveate.ncut(features, tau=0.1, max_iter=1, check=False, backend="cpu")
    with pytest.warns(RuntimeWarning, match="did not reach"):
        foveate.maskcut(features, (15, 20), tau=0.1, max_iter=1, backend="cpu")
    with pytest.warns(RuntimeWarning, match="did not reach"):
        foveate.tokencut(features, (15, 20), tau=0.1, max_iter=1, backend="cpu")
