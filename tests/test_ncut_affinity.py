"""Given affinities, gradients, invariances and limits of the normalized-cut functions."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import foveate
from foveate.ops.ncut import cpu as ncut_cpu


def features(n: int, c: int, seed: int, noise: float = 0.8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(4, c, generator=generator)
    return groups[torch.arange(n) * 4 // n] + noise * torch.randn(n, c, generator=generator)


def affinity(n: int, seed: int, *, two_valued: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(n, n, generator=generator, dtype=torch.float64)
    w = (w + w.T) / 2
    return torch.where(w > 0.5, 2.0, 0.25).double() if two_valued else w + 0.05


def distinct(result: foveate.NCutResult) -> bool:
    return float(result.gap) > 1e-3


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("two_valued", [False, True])
def test_gradients_are_those_of_differences(backend, two_valued):
    """A step leaves a two-valued affinity weighted, so that its gradient is over all weights."""
    w = affinity(12, 3, two_valued=two_valued).requires_grad_()
    assert distinct(foveate.ncut_affinity(w, k=3, backend=backend))

    def squares(a):
        symmetric = (a + a.T) / 2
        result = foveate.ncut_affinity(symmetric, k=3, backend=backend)
        return result.eigenvalues, result.eigenvectors**2

    assert torch.autograd.gradcheck(squares, (w,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("n", [20, 80])
@pytest.mark.parametrize("two_valued", [False, True])
def test_gradients_are_those_of_a_dense_solve(n, two_valued):
    """First-order perturbation theory in the full eigenbasis, entry by entry."""
    w = affinity(n, n, two_valued=two_valued).requires_grad_()
    k = 3
    result = foveate.ncut_affinity(w, k=k, backend="cpu")
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(k, n, generator=generator, dtype=torch.float64)
    h = torch.randn(k, generator=generator, dtype=torch.float64)
    ((result.eigenvectors * g).sum() + (result.eigenvalues * h).sum()).backward()

    weights = w.detach().numpy()
    d = weights.sum(1)
    m = weights / np.sqrt(np.outer(d, d))
    mu, y = np.linalg.eigh(m)
    expected = np.zeros((n, n))
    x = result.eigenvectors.detach().numpy()
    for j in range(k):
        at = n - 2 - j
        own = y[:, at] * np.sign(y[:, at] @ (x[j] * np.sqrt(d)))
        right = g[j].numpy() / np.sqrt(d)  # dL/dy
        # dy = sum over others of y_l (y_l . dM y) / (mu - mu_l);  dmu = y . dM y
        others = [i for i in range(n) if i != at]
        z = sum(y[:, i] * (y[:, i] @ right) / (mu[at] - mu[i]) for i in others)
        d_m = np.outer(z, own) - h[j].item() * np.outer(own, own)
        # x = y / sqrt(d): its direct dependence on the degrees
        d_degree = -0.5 * g[j].numpy() * own / d**1.5
        # M_ab = W_ab / sqrt(d_a d_b)
        expected += d_m / np.sqrt(np.outer(d, d))
        d_degree -= 0.5 * ((d_m * m).sum(1) + (d_m * m).sum(0)) / d
        expected += d_degree[:, None]
    expected = (expected + expected.T) / 2
    scale = np.abs(expected).max()
    np.testing.assert_allclose(w.grad, expected, rtol=0, atol=1e-8 * scale)
    assert torch.equal(w.grad, w.grad.T)


def test_eigenvalues_alone_have_a_gradient_and_the_rest_has_none():
    w = affinity(30, 1).requires_grad_()
    result = foveate.ncut_affinity(w, k=2, backend="cpu")
    for name in ("residual", "gap", "iterations", "converged", "degenerate", "uncertain"):
        assert not getattr(result, name).requires_grad
    (only,) = torch.autograd.grad(result.eigenvalues.sum(), w, retain_graph=True)
    zero = (result.eigenvectors * 0).sum() + result.eigenvalues.sum()
    (both,) = torch.autograd.grad(zero, w)
    torch.testing.assert_close(only, both, rtol=0, atol=1e-14)
    single = affinity(30, 1).float().requires_grad_()
    foveate.ncut_affinity(single, backend="cpu").eigenvalues.sum().backward()
    assert single.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_degenerate_entries_have_nan_gradients_and_say_so(backend):
    blocks = torch.block_diag(*[torch.ones(6, 6)] * 3).double() + 0.01
    w = torch.stack([affinity(18, 4), blocks]).requires_grad_()
    result = foveate.ncut_affinity(w, backend=backend)
    assert result.degenerate.tolist() == [False, True]
    with pytest.warns(UserWarning, match="batch entry 1 is degenerate"):
        result.eigenvectors.square().sum().backward()
    assert bool(w.grad[0].isfinite().all())
    assert bool(w.grad[1].isnan().all())


def test_two_values_are_solved_as_any_weights_are():
    w = affinity(90, 7, two_valued=True)
    nudged = w.clone()
    nudged[3, 5] = nudged[5, 3] = w[3, 5] * (1 + 1e-13)  # three values: dense weights
    bits = foveate.ncut_affinity(w, k=4, backend="cpu")
    dense = foveate.ncut_affinity(nudged, k=4, backend="cpu")
    torch.testing.assert_close(bits.eigenvalues, dense.eigenvalues, rtol=0, atol=1e-10)
    torch.testing.assert_close(bits.eigenvectors, dense.eigenvectors, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_precision_is_read_as_its_float64_value_and_scale_does_not_matter(dtype):
    w = affinity(70, 2).to(dtype)
    exact = foveate.ncut_affinity(w.double(), k=2, backend="cpu")
    given = foveate.ncut_affinity(w, k=2, backend="cpu")
    torch.testing.assert_close(given.eigenvalues, exact.eigenvalues, rtol=0, atol=1e-10)
    for factor in (2.0**-40, 2.0**40):
        scaled = foveate.ncut_affinity(w.double() * factor, k=2, backend="cpu")
        torch.testing.assert_close(scaled.eigenvalues, exact.eigenvalues, rtol=0, atol=1e-10)
        torch.testing.assert_close(
            scaled.eigenvectors * factor**0.5, exact.eigenvectors, rtol=1e-7, atol=1e-9
        )


def test_the_upper_triangle_defines_the_affinity():
    w = affinity(70, 9)
    skew = w + torch.tril(torch.full_like(w, 5e-7), -1)
    a, b = (foveate.ncut_affinity(m, k=2, backend="cpu") for m in (w, skew))
    assert torch.equal(a.eigenvalues, b.eigenvalues)
    assert torch.equal(a.eigenvectors, b.eigenvectors)


def assert_same_bits(a: tuple, b: tuple) -> None:
    for name, left, right in zip(a._fields, a, b, strict=True):
        assert torch.equal(left, right), name


def test_batch_single_and_ragged_results_are_equal_to_the_bit():
    images = [features(n, 20, seed) for seed, n in enumerate((150, 150, 150))]
    masks = [torch.rand(150, generator=torch.Generator().manual_seed(i)) > 0.8 for i in range(3)]
    batch = foveate.ncut(torch.stack(images), k=2, mask=torch.stack(masks), backend="cpu")
    odd = [*images, features(97, 20, 9)]
    ragged = foveate.ncut(odd, k=2, mask=[*masks, torch.zeros(97, dtype=torch.bool)], backend="cpu")
    before = torch.get_num_threads()
    for i, image in enumerate(images):
        single = foveate.ncut(image, k=2, mask=masks[i], backend="cpu")
        assert_same_bits(single, type(batch)(*(field[i] for field in batch)))
        assert_same_bits(single, ragged[i])
        try:
            torch.set_num_threads(1)
            assert_same_bits(single, foveate.ncut(image, k=2, mask=masks[i], backend="cpu"))
        finally:
            torch.set_num_threads(before)
    cuts = foveate.maskcut(torch.stack(images), (10, 15), backend="cpu")
    listed = foveate.maskcut(odd, [(10, 15)] * 3 + [(97, 1)], backend="cpu")
    objects = foveate.tokencut(torch.stack(images), (10, 15), backend="cpu")
    for i, image in enumerate(images):
        single = foveate.maskcut(image, (10, 15), backend="cpu")
        assert_same_bits(single, type(cuts)(*(field[i] for field in cuts)))
        assert_same_bits(single, listed[i])
        one = foveate.tokencut(image, (10, 15), backend="cpu")
        assert_same_bits(one, type(objects)(*(field[i] for field in objects)))


def test_scaling_tokens_by_powers_of_two_changes_no_bit():
    image = features(130, 24, 3)
    plain = foveate.ncut(image, k=2, backend="cpu")
    powers = 2.0 ** torch.randint(-30, 60, (130, 1), generator=torch.Generator().manual_seed(0))
    assert_same_bits(plain, foveate.ncut(image * powers, k=2, backend="cpu"))
    large = image / image.norm(dim=1, keepdim=True) * 1e30
    scaled = foveate.ncut(large, k=2, backend="cpu")
    torch.testing.assert_close(scaled.eigenvalues, plain.eigenvalues, rtol=0, atol=1e-10)


def test_norms_far_below_the_floor_of_1e_12_leave_no_edge_but_to_oneself():
    image = features(130, 24, 3)
    image[:100] *= 1e-30
    bits, bad = ncut_cpu.affinity_pack(image, 0.2, None)
    assert bad == -1
    b = unpacked(bits, 130)
    assert torch.equal(b[:100], torch.eye(130, dtype=torch.bool)[:100])
    plain, _ = ncut_cpu.affinity_pack(features(130, 24, 3), 0.2, None)
    assert torch.equal(b[100:, 100:], unpacked(plain, 130)[100:, 100:])


def test_a_permutation_of_tokens_permutes_the_vector():
    image = features(230, 24, 5, 0.6).double()
    order = torch.randperm(230, generator=torch.Generator().manual_seed(1))
    plain = foveate.ncut(image, k=3, backend="cpu")
    moved = foveate.ncut(image[order], k=3, backend="cpu")
    torch.testing.assert_close(moved.eigenvalues, plain.eigenvalues, rtol=0, atol=1e-10)
    budget = 1e-8 / float(plain.gap)
    torch.testing.assert_close(
        moved.eigenvectors, plain.eigenvectors[:, order], rtol=0, atol=budget
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_their_float32_values(dtype):
    image = features(100, 16, 6).to(dtype)
    assert_same_bits(
        foveate.ncut(image, k=2, backend="cpu"), foveate.ncut(image.float(), k=2, backend="cpu")
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [40, 200])
def test_exact_ties_with_tau_are_no_edges(n, dtype):
    """Rows of +-1 with 16 channels: cosines are multiples of 1/8, exact in binary."""
    generator = torch.Generator().manual_seed(n)
    signs = torch.randint(0, 2, (n, 16), generator=generator).to(dtype) * 2 - 1
    exact = signs @ signs.T
    assert bool((exact == 4).any())
    bits, _ = ncut_cpu.affinity_pack(signs, 0.25, None)
    assert torch.equal(unpacked(bits, n), exact > 4)
    axes = torch.eye(8, dtype=dtype)[torch.arange(n) % 8] * 3
    bits, _ = ncut_cpu.affinity_pack(axes, 0.0, None)
    assert torch.equal(unpacked(bits, n), axes @ axes.T > 0)


def test_of_tied_seeds_the_first_wins():
    """Two identical islands before a background: equal entries, the lower index is the seed."""
    kinds = torch.zeros(6, 9, dtype=torch.int64)
    kinds[1:3, 1:3] = 1
    kinds[3:5, 6:8] = 2
    image = torch.eye(3)[kinds.flatten()]
    found = foveate.tokencut(image.double(), (6, 9), tau=0.2, backend="cpu")
    x = found.eigenvector
    tied = (x >= x.max() * (1 - 1e-9)).nonzero().flatten()
    if not bool(found.degenerate):
        assert int(found.seed) == int(tied[0])
    chain = torch.eye(12).double() + torch.diag(torch.ones(11), 1) + torch.diag(torch.ones(11), -1)
    vector = foveate.ncut_affinity(chain, backend="cpu").eigenvectors[0]
    torch.testing.assert_close(vector, -vector.flip(0), rtol=0, atol=1e-10)
    assert float(vector[0]) > 0  # both ends are largest: the first is positive


def unpacked(bits: torch.Tensor, n: int) -> torch.Tensor:
    shift = torch.arange(32, dtype=torch.int32).view(1, 32, 1)
    rows = ((bits.unsqueeze(1) >> shift) & 1).reshape(-1, n)
    assert not bool(rows[n:].any())  # tail bits are zero
    return rows[:n].bool()


@pytest.mark.parametrize(("n", "c"), [(3, 1), (31, 5), (32, 5), (33, 64), (257, 17), (1230, 40)])
@pytest.mark.parametrize("tau", [0.15, -0.2])
def test_bits_are_symmetric_and_their_degrees_and_products_those_of_the_matrix(n, c, tau):
    image = features(n, c, n)
    image[n // 2] = 0
    bits, bad = ncut_cpu.affinity_pack(image, tau, None)
    assert bad == -1
    b = unpacked(bits, n)
    assert torch.equal(b, b.T)
    unit = image.double() / image.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    s = unit @ unit.T
    clear = (s - tau).abs() > 2e-6
    s.fill_diagonal_(1)
    s[n // 2, n // 2] = 0
    assert torch.equal(b[clear], (s > tau)[clear])
    w = torch.where(b, 1.0, 1e-5).double()
    result = foveate.ncut(image, tau=tau, backend="cpu")
    x = result.eigenvectors[0]
    left = w @ x - (1 - result.eigenvalues[0]) * w.sum(1) * x
    assert float((left / w.sum(1).sqrt()).norm()) <= 1.1e-9


def test_precision_settings_of_torch_do_not_move_bits():
    image = features(300, 64, 2)
    plain, _ = ncut_cpu.affinity_pack(image, 0.1, None)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        again, _ = ncut_cpu.affinity_pack(image, 0.1, None)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(plain, again)


def test_features_that_require_grad_are_detached_with_a_warning():
    image = features(30, 4, 0).requires_grad_()
    for call in (
        lambda: foveate.ncut(image, backend="cpu").eigenvectors,
        lambda: foveate.ncut([image], backend="cpu")[0].eigenvectors,
        lambda: foveate.maskcut(image, (5, 6), backend="cpu").eigenvectors,
        lambda: foveate.tokencut(image, (5, 6), backend="cpu").eigenvector,
    ):
        with pytest.warns(UserWarning, match="threshold has no gradient"):
            result = call()
        assert not result.requires_grad


def test_tau_below_every_cosine_warns():
    with pytest.warns(UserWarning, match="every pair"):
        result = foveate.ncut(features(20, 4, 0), tau=-1.5, backend="cpu")
    assert bool(result.degenerate)


def test_nothing_gives_nothing():
    assert foveate.ncut([], backend="cpu") == []
    assert foveate.maskcut([], [], backend="cpu") == []
    assert foveate.tokencut([], [], backend="cpu") == []
    none = foveate.ncut(torch.zeros(0, 12, 3), k=2, backend="cpu")
    assert none.eigenvectors.shape == (0, 2, 12)
    assert none.gap.shape == (0,)
    assert foveate.maskcut(torch.zeros(0, 12, 3), (3, 4), n_masks=2, size=(6, 8)).masks.shape == (
        *(0, 2),
        *(6, 8),
    )
    assert foveate.tokencut(torch.zeros(0, 12, 3), (3, 4)).box.shape == (0, 4)


def test_numpy_in_numpy_out_and_views_are_read():
    image = features(72, 6, 4)
    plain = foveate.maskcut(image, (8, 9), backend="cpu")
    array = image.numpy()
    for given in (array, np.asfortranarray(array), array[::-1].copy()[::-1]):
        result = foveate.maskcut(given, (8, 9), backend="cpu")
        assert all(isinstance(field, np.ndarray) for field in result)
        np.testing.assert_array_equal(result.masks, plain.masks)
        np.testing.assert_array_equal(result.eigenvectors, plain.eigenvectors)
    array.flags.writeable = False
    np.testing.assert_array_equal(foveate.ncut(array, backend="cpu").eigenvalues.shape, (1,))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_says_why(backend):
    image = features(12, 4, 0)
    for call in (
        lambda: foveate.ncut(image, backend=backend),
        lambda: foveate.ncut([image], backend=backend),
        lambda: foveate.ncut_affinity(affinity(12, 0), backend=backend),
        lambda: foveate.maskcut(image, (3, 4), backend=backend),
        lambda: foveate.tokencut(image, (3, 4), backend=backend),
    ):
        with pytest.raises(NotImplementedError, match=f"{backend}.*cpu tensors"):
            call()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_third_value_just_beside_makes_an_affinity_weighted(backend):
    """Two values to rounding are two values; one more is not rounded away."""
    w = affinity(80, 5, two_valued=True)
    exact = foveate.ncut_affinity(w, k=2, backend=backend)
    w[0, 1] = w[1, 0] = 1.0
    d = w.sum(1)
    changed = foveate.ncut_affinity(w, k=2, backend=backend)
    x = changed.eigenvectors
    left = x @ w - (1 - changed.eigenvalues).unsqueeze(1) * x * d
    assert float((left / d.sqrt()).norm(dim=1).max()) <= 1.1e-9
    assert not torch.equal(changed.eigenvalues, exact.eigenvalues)


@pytest.mark.parametrize("n", [20, 80])
@pytest.mark.parametrize("zeroed", [slice(None), slice(3, 4)], ids=["all", "one row"])
def test_an_unchecked_row_without_weight_leaves_the_spectrum_undefined(n, zeroed):
    w = affinity(n, 0)
    w[zeroed] = w[:, zeroed] = 0
    result = foveate.ncut_affinity(w, k=2, check=False, backend="cpu")
    assert not bool(result.converged)
    assert int(result.uncertain) == n
    for name in ("eigenvalues", "eigenvectors", "residual", "gap"):
        assert bool(getattr(result, name).isnan().all()), name


def test_what_is_below_the_diagonal_changes_no_bit():
    for n in (50, 333, 1029):
        w = affinity(n, n)
        other = w.clone()
        other.tril_(-1).mul_(1 + 1e-7).add_(w.triu())
        exact = foveate.ncut_affinity(w, k=2, backend="cpu")
        assert_same_bits(foveate.ncut_affinity(other, k=2, backend="cpu"), exact)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_over_threads_change_no_bit(weighted):
    """Sizes from which the solver shares the rows of one image."""
    n = 2300 if weighted else 6200
    image = features(n, 4, 0)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            if weighted:
                unit = torch.nn.functional.normalize(image)
                w = (unit @ unit.T).clamp_min(0) + 0.01
                results.append(foveate.ncut_affinity(w.triu() + w.triu(1).T, backend="cpu"))
            else:
                results.append(foveate.ncut(image, tau=0.5, max_iter=6, check=False, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_unchecked_values_are_not_scanned():
    image = features(40, 4, 0)
    image[7, 1] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        foveate.ncut(image, backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foveate.ncut(features(40, 4, 0), check=False, backend="cpu")


_PEAK = """
import resource, torch, foveate
image = torch.randn(6000, 64, generator=torch.Generator().manual_seed(0))
foveate.ncut(image[:500], tau=0.2, backend="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
foveate.ncut(image, tau=0.2, max_iter=8, check=False, backend="cpu")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_6000_tokens_need_less_than_48_mb():
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) <= 48 * 1000  # KiB; a dense float64 matrix alone has 281000
