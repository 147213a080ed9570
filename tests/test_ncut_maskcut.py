"""MaskCut and TokenCut against a NumPy writing of their pages, with every sign LAPACK may give."""

from __future__ import annotations

import itertools
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch

import foveate
from foveate import MaskStatus

EPS = 1e-5


def scene(h: int, w: int, seed: int, noise: float, c: int = 24) -> np.ndarray:
    """Tokens `[h w, c]` of a background and three rectangles."""
    rng = np.random.default_rng(seed)
    kinds = np.zeros((h, w), dtype=int)
    for kind in (1, 2, 3):
        y, x = rng.integers(0, h - 3), rng.integers(0, w - 3)
        kinds[y : y + rng.integers(2, h // 2 + 1), x : x + rng.integers(2, w // 2 + 1)] = kind
    directions = rng.normal(size=(4, c))
    return directions[kinds.ravel()] + noise * rng.normal(size=(h * w, c))


def ringed(h: int, w: int, seed: int) -> np.ndarray:
    """A small object in one direction, and around it a border nearer to the extreme."""
    rng = np.random.default_rng(seed)
    y, x = np.divmod(np.arange(h * w), w)
    border = (y == 0) | (y == h - 1) | (x == 0) | (x == w - 1)
    features = rng.normal(size=(2, 24))[border.astype(int)]
    return features + 0.4 * rng.normal(size=(h * w, 24))


def clear_tau(features: np.ndarray, wanted: float) -> float:
    """Near `wanted`, midway in an interval between cosines."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    s = np.sort(np.append((unit @ unit.T)[np.triu_indices(len(unit), 1)], [-1.0, 1.0]))
    wide = np.diff(s) > 1e-5
    middle = ((s[1:] + s[:-1]) / 2)[wide]
    return float(middle[np.abs(middle - wanted).argmin()])


def second_vector(features: np.ndarray, tau: float) -> tuple[np.ndarray, float]:
    """x of lam_2 with the canonical sign, and lam_3 - lam_2."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    s = unit @ unit.T
    np.fill_diagonal(s, (unit != 0).any(1))
    w = np.where(s > tau, 1.0, EPS)
    d = w.sum(1)
    values, vectors = scipy.linalg.eigh(np.diag(d) - w, np.diag(d), subset_by_index=[0, 2])
    x = vectors[:, 1]
    top = np.abs(x).max()
    return x * np.sign(x[np.flatnonzero(np.abs(x) >= top * (1 - 1e-9))[0]]), values[2] - values[1]


class Path(NamedTuple):
    """One way through the stages."""

    masks: list[np.ndarray]
    candidates: list[np.ndarray]
    statuses: list[int]
    seeds: list[int]


def component(side: np.ndarray, seed: int, grid: tuple[int, int]) -> np.ndarray:
    labels, _ = scipy.ndimage.label(side.reshape(grid))
    return (labels == labels.flat[seed]).ravel()


def candidate_of(x: np.ndarray, grid: tuple[int, int], corners: int | None) -> tuple:
    side = x > x.mean()
    seed = int(np.flatnonzero(np.abs(x) >= np.abs(x).max() * (1 - 1e-9))[0])
    plane = side.reshape(grid)
    held = sum(map(int, (plane[0, 0], plane[0, -1], plane[-1, 0], plane[-1, -1])))
    if corners is not None and held >= corners:
        side, seed = ~side, int(np.flatnonzero(-x >= (-x).max() * (1 - 1e-9))[0])
    return component(side, seed, grid), seed


def maskcut_path(
    features: np.ndarray,
    grid: tuple[int, int],
    signs: tuple[int, ...],
    *,
    tau: float,
    on_reject: str,
    corners: int | None = 3,
    iou_threshold: float = 0.5,
    min_area: float = 0.01,
) -> Path:
    """The stages with `signs[i]` in front of the canonical vector of stage i.

    The original reverses a partition at three corners, else if its seed is outside; of a vector
    whose extreme entry is negative it therefore always keeps the seed's side.
    """
    n = len(features)
    nothing = np.zeros(n, dtype=bool)
    painted, previous, used = nothing, nothing, nothing
    path = Path([], [], [], [])
    stopped = False
    for stage, sign in enumerate(signs):
        candidate, seed, mask = nothing, -1, nothing
        if stopped:
            status = MaskStatus.STOPPED
        else:
            x, gap = second_vector(features * ~painted[:, None], tau)
            status = MaskStatus.OK
            if gap <= 1e-9:
                status = MaskStatus.DEGENERATE
            else:
                candidate, seed = candidate_of(x, grid, corners if sign > 0 else None)
            union = (previous | candidate).sum()
            if status == MaskStatus.OK and stage > 0:
                if union and (previous & candidate).sum() / union > iou_threshold:
                    status = MaskStatus.OVERLAP
                elif candidate.sum() / n <= min_area:
                    status = MaskStatus.SMALL
            if status == MaskStatus.OK:
                mask = candidate & ~used
                if not mask.any():
                    status = MaskStatus.COVERED
                used, painted, previous = used | candidate, painted | candidate, candidate
            elif on_reject == "retry":
                previous = nothing
            elif on_reject == "skip":
                painted, previous = painted | candidate, candidate
            else:
                stopped = True
        path.masks.append(mask)
        path.candidates.append(candidate)
        path.statuses.append(int(status))
        path.seeds.append(seed)
    return path


def same(result: foveate.MaskCutResult, path: Path) -> bool:
    n_masks = len(path.masks)
    return (
        result.status.tolist() == path.statuses
        and result.seeds.tolist() == path.seeds
        and np.array_equal(result.masks.reshape(n_masks, -1).numpy(), path.masks)
        and np.array_equal(result.candidates.reshape(n_masks, -1).numpy(), path.candidates)
    )


CASES = [
    ((9, 11), 0, 0.3, 0.2, {}),
    ((9, 11), 1, 0.9, 0.15, {}),
    ((12, 8), 2, 0.6, 0.3, {"corners": None}),
    ((12, 8), 3, 0.9, 0.15, {"corners": 1}),
    ((10, 13), 4, 0.8, 0.25, {"min_area": 0.3}),
    ((10, 13), 5, 0.7, 0.2, {"iou_threshold": 0.05}),
    ((8, 9), 6, 0.5, 0.0, {"corners": 2, "min_area": 0.0}),
]


@pytest.mark.parametrize("on_reject", ["retry", "stop", "skip"])
@pytest.mark.parametrize(("grid", "seed", "noise", "wanted", "options"), CASES)
def test_stages_are_the_canonical_path(grid, seed, noise, wanted, options, on_reject):
    features = scene(*grid, seed, noise)
    tau = clear_tau(features, wanted)
    path = maskcut_path(features, grid, (1, 1, 1), tau=tau, on_reject=on_reject, **options)
    result = foveate.maskcut(
        torch.from_numpy(features),
        grid,
        n_masks=3,
        tau=tau,
        on_reject=on_reject,
        backend="cpu",
        **options,
    )
    assert same(result, path)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_canonical_masks_are_among_those_of_the_sign_paths(seed):
    """What `eigh` of any build returns is one of 2^3 paths; ours is one, and they do differ."""
    grid = (8, 10)
    features = ringed(*grid, seed)
    tau = clear_tau(features, 0.2)
    result = foveate.maskcut(torch.from_numpy(features), grid, tau=tau, backend="cpu")
    paths = [
        maskcut_path(features, grid, signs, tau=tau, on_reject="retry")
        for signs in itertools.product((1, -1), repeat=3)
    ]
    assert any(same(result, path) for path in paths)
    assert len({np.packbits(path.masks).tobytes() for path in paths}) > 1


def test_every_status_is_reached_and_agrees():
    """Many scenes and thresholds: each status occurs and each stage equals the NumPy stages."""
    reached = set()
    for seed, on_reject in itertools.product(range(6), ("retry", "stop", "skip")):
        features = scene(7, 8, 40 + seed, 0.4)
        tau = clear_tau(features, 0.25)
        options = {"tau": tau, "on_reject": on_reject, "iou_threshold": 0.3}
        options["min_area"] = 0.3 if seed % 2 else 0.02
        path = maskcut_path(features, (7, 8), (1,) * 5, **options)
        result = foveate.maskcut(
            torch.from_numpy(features), (7, 8), n_masks=5, backend="cpu", **options
        )
        if MaskStatus.DEGENERATE not in path.statuses:
            assert same(result, path), (seed, on_reject)
        assert result.status.tolist() == path.statuses
        reached |= set(path.statuses)
    assert reached >= {
        MaskStatus.OK,
        MaskStatus.OVERLAP,
        MaskStatus.SMALL,
        MaskStatus.STOPPED,
    }


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_painted_majority_takes_over_and_its_stage_is_covered(backend):
    """When most tokens are painted, the next vector is the painted set itself."""
    grid = (10, 10)
    place = np.arange(100)
    features = np.where(place < 85, 1.0, 0.0)[:, None] * np.eye(3)[0]
    rest = np.random.default_rng(0).normal(size=(15, 3)) + np.array([0.0, 2.0, 2.0])
    features[85:] = rest
    tau = clear_tau(features, 0.3)
    for on_reject in ("retry", "skip", "stop"):
        options = {"tau": tau, "on_reject": on_reject, "corners": None}
        path = maskcut_path(features, grid, (1, 1, 1), **options)
        result = foveate.maskcut(
            torch.from_numpy(features), grid, n_masks=3, backend=backend, **options
        )
        assert result.status.tolist() == path.statuses
        assert same(result, path)
        taken = result.masks.reshape(3, -1).sum(0)
        assert int(taken.max()) <= 1  # disjoint


def test_a_covered_stage_has_an_empty_mask_and_a_candidate():
    found = 0
    for seed in range(40):
        features = scene(6, 7, 100 + seed, 0.2)
        tau = clear_tau(features, 0.3)
        result = foveate.maskcut(
            torch.from_numpy(features), (6, 7), n_masks=4, tau=tau, backend="cpu", min_area=0.0
        )
        covered = result.status == MaskStatus.COVERED
        found += int(covered.sum())
        assert not bool(result.masks[covered].any())
        assert bool(result.candidates[covered].flatten(1).any(1).all())
        ok = result.status == MaskStatus.OK
        assert bool(result.masks[ok].flatten(1).any(1).all())
    assert found > 0


def test_a_retried_stage_has_the_same_vector_bitwise():
    found = 0
    for seed in range(12):
        features = scene(9, 9, 200 + seed, 0.8)
        tau = clear_tau(features, 0.2)
        r = foveate.maskcut(
            torch.from_numpy(features), (9, 9), n_masks=4, tau=tau, iou_threshold=0.1, backend="cpu"
        )
        for i in range(3):
            if r.status[i] in (MaskStatus.OVERLAP, MaskStatus.SMALL):
                found += 1
                assert torch.equal(r.eigenvectors[i], r.eigenvectors[i + 1])
                assert torch.equal(r.candidates[i], r.candidates[i + 1])
                if r.status[i] == MaskStatus.OVERLAP:  # the very candidate is accepted
                    assert r.status[i + 1] in (MaskStatus.OK, MaskStatus.COVERED, MaskStatus.SMALL)
    assert found > 0


def test_a_search_whose_blocks_lose_rank_stops_at_the_residual_wanted():
    """Small graphs exhaust their space: columns of a block then depend on those before them."""
    for seed in range(30):
        features = scene(8, 10, seed, 0.7)
        tau = clear_tau(features, 0.2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            r = foveate.maskcut(torch.from_numpy(features), (8, 10), tau=tau, backend="cpu")
        assert bool(r.converged.all())
        assert float(r.residual.max()) <= 1e-9


def test_stopped_stages_hold_nothing():
    features = scene(9, 11, 1, 0.9)
    tau = clear_tau(features, 0.15)
    r = foveate.maskcut(
        torch.from_numpy(features),
        (9, 11),
        n_masks=4,
        tau=tau,
        on_reject="stop",
        min_area=1.0,
        iou_threshold=1.0,
        backend="cpu",
    )
    assert r.status.tolist() == [MaskStatus.OK, MaskStatus.SMALL] + 2 * [MaskStatus.STOPPED]
    for field in (r.masks, r.candidates, r.eigenvalues, r.gap, r.residual, r.eigenvectors):
        assert not bool(field[2:].any())
    assert r.seeds[2:].tolist() == [-1, -1]


def test_nine_of_900_tokens_at_a_hundredth_are_too_few():
    """`count / n` is compared in float64, not count with a rounded product."""
    h = w = 30
    kinds = torch.zeros(h, w, dtype=torch.int64)
    kinds[3:13, 3:13] = 1
    kinds[20:23, 20:23] = 2
    features = torch.eye(3)[kinds.flatten()]
    for area, status in ((0.01, MaskStatus.SMALL), (0.0099, MaskStatus.OK)):
        r = foveate.maskcut(features, (h, w), n_masks=2, tau=0.2, min_area=area, backend="cpu")
        assert r.candidates.flatten(1).sum(1).tolist() == [100, 9]
        assert r.status.tolist() == [MaskStatus.OK, status]


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize(("grid", "seed"), [((9, 11), 0), ((1, 30), 1), ((30, 1), 2), ((12, 7), 3)])
def test_tokencut_is_its_page(grid, seed, binary):
    h, w = grid
    rng = np.random.default_rng(seed)
    place = np.arange(h * w) * 3 // (h * w)
    features = rng.normal(size=(3, 16))[place] + 0.6 * rng.normal(size=(h * w, 16))
    tau = clear_tau(features, 0.25)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    s = unit @ unit.T
    weights = np.where(s > tau, 1.0, EPS) if binary else np.where(s < tau, EPS, s)
    d = weights.sum(1)
    values, vectors = scipy.linalg.eigh(np.diag(d) - weights, np.diag(d), subset_by_index=[0, 2])
    x = vectors[:, 1]
    seed_token = int(np.flatnonzero(np.abs(x) >= np.abs(x).max() * (1 - 1e-9))[0])
    x = x * np.sign(x[seed_token])
    side = x > x.mean()
    mask = component(side, seed_token, grid)
    r = foveate.tokencut(
        torch.from_numpy(features), grid, tau=tau, binary=binary, size=(2 * h, 3 * w), backend="cpu"
    )
    assert int(r.seed) == seed_token
    np.testing.assert_array_equal(r.foreground.flatten(), side)
    np.testing.assert_array_equal(r.mask, mask.reshape(grid).repeat(2, 0).repeat(3, 1))
    rows, columns = np.nonzero(mask.reshape(grid))
    assert r.box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(r.eigenvector, x, rtol=0, atol=1e-9 / min(1, values[2] - values[1]))
    assert abs(float(r.eigenvalue) - values[1]) <= 1e-10
    assert abs(float(r.gap) - (values[2] - values[1])) <= 0.1 * (values[2] - values[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_weights_equal_to_tau_stay(backend):
    """W = where(S < tau, eps, S): a cosine of exactly tau keeps its weight."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randint(0, 2, (40, 16), generator=generator).double() * 2 - 1
    s = (features @ features.T) / 16
    assert bool((s == 0.25).any())
    w = torch.where(s < 0.25, 1e-5, s)
    d = w.sum(1)
    values = scipy.linalg.eigh((d.diag() - w).numpy(), d.diag().numpy(), eigvals_only=True)
    r = foveate.tokencut(features, (5, 8), tau=0.25, binary=False, backend=backend)
    assert abs(float(r.eigenvalue) - values[1]) <= 1e-10


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (31, 17), (18, 22)])
def test_masks_are_upsampled_by_nearest(size):
    features = torch.from_numpy(scene(9, 11, 0, 0.3))
    small = foveate.maskcut(features, (9, 11), tau=0.2, backend="cpu")
    large = foveate.maskcut(features, (9, 11), tau=0.2, size=size, backend="cpu")
    rows = [y * 9 // size[0] for y in range(size[0])]
    columns = [x * 11 // size[1] for x in range(size[1])]
    assert torch.equal(large.masks, small.masks[:, rows][:, :, columns])
    assert torch.equal(large.candidates, small.candidates)
