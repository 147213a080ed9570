"""Properties of the losses over all pairs, beyond the generated tests."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

import foveate
from foveate.ops.pairwise_loss import cpu, engine

_LOSSES = [foveate.sigmoid_loss, foveate.info_nce_loss]


def _pair(n, d=8, m=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = (F.normalize(torch.randn(k, d, generator=generator)) for k in (n, m or n))
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def _gradients(loss, x, y, *scalars, **options):
    value = loss(x, y, *scalars, **options)
    leaves = [t for t in (x, y, *scalars) if isinstance(t, torch.Tensor) and t.requires_grad]
    return value.detach(), torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("bias", [-10.0, -17.0, -30.0])
def test_the_loss_of_far_negatives_keeps_its_digits(bias):
    zero = torch.zeros(70, 3)
    got = foveate.sigmoid_loss(zero, zero, 1.0, bias, positives=None, backend="cpu")
    assert math.isclose(got.item(), 70 * math.log1p(math.exp(bias)), rel_tol=1e-6)


@pytest.mark.parametrize("z", [10.0, 15.0, 30.0])
def test_a_sure_positive_keeps_its_gradient(z):
    x = torch.ones(1, 1, requires_grad=True)
    foveate.sigmoid_loss(x, torch.ones(1, 1), z, backend="cpu").backward()
    assert math.isclose(x.grad.item(), -z / (1 + math.exp(z)), rel_tol=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 3.7])
@pytest.mark.parametrize("positives", ["diagonal", None])
def test_the_focal_loss_is_right_to_float32_at_every_logit(gamma, positives):
    for z in torch.linspace(-30, 40, 29).tolist():
        x = torch.ones(1, 1, requires_grad=True)
        value = foveate.sigmoid_loss(
            x, torch.ones(1, 1), z, positives=positives, focal_gamma=gamma, backend="cpu"
        )
        value.backward()
        wide = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
        exact = foveate.sigmoid_loss(
            wide,
            torch.ones(1, 1, dtype=torch.float64),
            z,
            positives=positives,
            focal_gamma=gamma,
            backend="reference",
        )
        exact.backward()
        assert math.isclose(value.item(), exact.item(), rel_tol=2e-5, abs_tol=1e-37)
        assert math.isclose(x.grad.item(), wide.grad.item(), rel_tol=2e-5, abs_tol=1e-36)


def test_focal_gamma_0_and_a_plain_call_have_the_same_bits():
    x, y = _pair(40)
    plain = _gradients(foveate.sigmoid_loss, x, y, 10.0, -3.0, backend="cpu")
    focal = _gradients(foveate.sigmoid_loss, x, y, 10.0, -3.0, focal_gamma=0.0, backend="cpu")
    assert torch.equal(plain[0], focal[0])
    for left, right in zip(plain[1], focal[1], strict=True):
        assert torch.equal(left, right)


def test_huge_logits_stay_finite_and_nan_spreads():
    x = torch.tensor([[100.0], [-100.0]], requires_grad=True)
    for loss in _LOSSES:
        value, (gradient,) = _gradients(loss, x, x.detach(), 1.0, backend="cpu")
        assert value.isfinite()
        assert gradient.isfinite().all()
        bad = torch.tensor([[float("nan")], [1.0]])
        assert loss(bad, bad, 1.0, backend="cpu").isnan()


@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_small_ragged_tiles_give_the_references_answer(monkeypatch, loss, mode):
    monkeypatch.setitem(engine.TILE, "cpu", (5, 7))
    options = {} if loss is foveate.info_nce_loss else {"grad_mode": mode, "logit_bias": -2.0}
    if loss is foveate.info_nce_loss and mode == "backward":
        monkeypatch.setitem(engine.RESIDENT, "cpu", 0)
    x, y = _pair(23)
    value, got = _gradients(loss, x, y, 5.0, backend="cpu", **options)
    wide = [t.detach().double().requires_grad_() for t in (x, y)]
    exact, want = _gradients(loss, *wide, 5.0, backend="reference", **options)
    assert abs(value - exact) <= 4 * torch.finfo(torch.float32).eps * exact
    for left, right in zip(got, want, strict=True):
        # x and y are within eps / 2, and a sum has 23 terms.
        assert (left - right).abs().max() <= 23 * torch.finfo(torch.float32).eps * right.abs().max()


@pytest.mark.parametrize("loss", _LOSSES)
def test_float64_differs_from_the_definition_by_the_order_of_sums_alone(loss):
    n, d, scale = 65, 12, 6.0
    x, y = _pair(n, d, dtype=torch.float64)
    value, got = _gradients(loss, x, y, scale, backend="cpu")
    exact, want = _gradients(loss, x, y, scale, backend="reference")
    eps = torch.finfo(torch.float64).eps
    # A sum of k terms in any order is within k eps of the sum of their magnitudes; the products
    # have d terms, the exponent takes scale times that, and |g| sums to at most 2 in a row.
    bound = (n + scale * d) * eps
    assert value.dtype == torch.float64
    assert abs(value - exact) <= bound * max(1.0, exact.item())
    for left, right in zip(got, want, strict=True):
        assert (left - right).abs().max() <= bound * 2 * scale


@pytest.mark.parametrize("loss", _LOSSES)
def test_every_subset_of_gradients_is_computed_alone(monkeypatch, loss):
    products = []
    sweep = engine.sweep

    def counting(x, y, tile, needs, epilogue):
        products.append(1 + sum(needs[:2]))
        return sweep(x, y, tile, needs, epilogue)

    monkeypatch.setattr(cpu, "sweep", counting)
    x, y = _pair(9)
    s = torch.tensor(4.0, requires_grad=True)
    whole = _gradients(loss, x, y, s, backend="cpu")[1]
    for frozen in range(8):
        args = [
            t.detach() if frozen >> i & 1 else t.detach().requires_grad_()
            for i, t in enumerate((x, y, s))
        ]
        if frozen == 7:
            assert not loss(*args, backend="cpu").requires_grad
            continue
        products.clear()
        got = _gradients(loss, *args, backend="cpu")[1]
        assert products == [1 + sum(t.requires_grad for t in args[:2])]
        expected = [g for i, g in enumerate(whole) if not frozen >> i & 1]
        for left, right in zip(got, expected, strict=True):
            assert torch.equal(left, right)


def test_the_forms_of_positives_agree():
    x, y = _pair(33, m=33)
    ids, eye = torch.arange(33), torch.eye(33)
    plain = _gradients(foveate.sigmoid_loss, x, y, 8.0, -2.0, backend="cpu")
    for form in (ids, (ids, ids), eye, eye.bool(), eye.to_sparse_coo()):
        got = _gradients(foveate.sigmoid_loss, x, y, 8.0, -2.0, positives=form, backend="cpu")
        torch.testing.assert_close(got[0], plain[0], rtol=1e-6, atol=0)
        for left, right in zip(got[1], plain[1], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-7)


def test_permuting_the_pairs_keeps_the_loss_and_swapping_them_swaps_the_gradients():
    x, y = _pair(30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    for loss in _LOSSES:
        value, (dx, dy) = _gradients(loss, x, y, 5.0, backend="cpu")
        moved = loss(x[order], y[order], 5.0, backend="cpu")
        torch.testing.assert_close(moved.detach(), value, rtol=1e-6, atol=0)
        swapped, (left, right) = _gradients(loss, y, x, 5.0, backend="cpu")
        torch.testing.assert_close(swapped, value, rtol=1e-6, atol=0)
        torch.testing.assert_close(left, dy, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(right, dx, rtol=1e-5, atol=1e-7)


def test_one_more_negative_never_lowers_the_loss():
    x, y = _pair(8, m=12)
    values = [
        foveate.sigmoid_loss(x, y[:m], 5.0, positives=torch.arange(8), backend="cpu").item()
        for m in range(8, 13)
    ]
    assert values == sorted(values)


def test_info_nce_is_cross_entropy_and_nt_xent():
    x, y = _pair(20, dtype=torch.float64)
    z = 7.0 * x @ y.T
    labels = torch.arange(20)
    want = (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
    torch.testing.assert_close(foveate.info_nce_loss(x, y, 7.0, backend="cpu"), want)
    partner = torch.arange(20).roll(10)
    z = (7.0 * x @ x.T).masked_fill(torch.eye(20, dtype=torch.bool), -math.inf)
    got = foveate.info_nce_loss(
        x, x, 7.0, positives=partner, ignore=(labels, labels), symmetric=False, backend="cpu"
    )
    torch.testing.assert_close(got, F.cross_entropy(z, partner))


def test_far_logits_do_not_cost_info_nce_its_digits():
    x, y = _pair(24, dtype=torch.float64)
    near = foveate.info_nce_loss(x.float(), y.float(), 3000.0, backend="cpu")
    exact = foveate.info_nce_loss(x, y, 3000.0, backend="reference")
    # Logits of 3000 have a spacing of 2.4e-4.
    assert abs(near - exact) < 1e-3


@pytest.mark.parametrize("loss", _LOSSES)
@pytest.mark.parametrize("upstream", [0.0, -2.5, 65536.0])
def test_the_upstream_gradient_scales_and_a_second_backward_has_the_same_bits(loss, upstream):
    x, y = _pair(10)
    _, one = _gradients(loss, x, y, 5.0, backend="cpu")
    value = loss(x, y, 5.0, backend="cpu")
    first = torch.autograd.grad(value * upstream, (x, y), retain_graph=True)
    second = torch.autograd.grad(value * upstream, (x, y))
    for a, b, unit in zip(first, second, one, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, unit * upstream, rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", _LOSSES)
def test_the_kernels_refuse_a_second_derivative_and_func_grad_works(loss):
    x, y = _pair(6)
    (gradient,) = torch.autograd.grad(loss(x, y, 5.0, backend="cpu"), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once|second|again"):
        gradient.square().sum().backward()
    functional = torch.func.grad(lambda t: loss(t, y.detach(), 5.0, backend="cpu"))(x.detach())
    torch.testing.assert_close(functional, gradient.detach())


@pytest.mark.parametrize("loss", _LOSSES)
def test_autocast_casts_the_features_and_keeps_float32_logits(loss):
    x, y = _pair(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        value, (gradient, _) = _gradients(loss, x, y, 10.0, backend="cpu")
    assert value.dtype == gradient.dtype == torch.float32
    same = loss(x.bfloat16().double(), y.bfloat16().double(), 10.0, backend="reference")
    assert abs(value - same) <= 4e-7 * same


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scale_and_bias_keep_their_shape_and_dtype(shape, dtype):
    x, y = _pair(7)
    scalars = [torch.full(shape, v, dtype=dtype, requires_grad=True) for v in (4.0, -2.0)]
    foveate.sigmoid_loss(x, y, *scalars, backend="cpu").backward()
    for scalar in scalars:
        assert scalar.grad.shape == shape
        assert scalar.grad.dtype == dtype


@pytest.mark.parametrize("n", [50, 100, 200])
def test_what_is_held_until_backward_grows_with_n_alone(n):
    d = 8
    saved = []

    def note(tensor):
        saved.append(tensor)
        return tensor

    x, y = _pair(n, d)
    for loss, states in ((foveate.sigmoid_loss, 0), (foveate.info_nce_loss, 0)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            loss(x, y, 5.0, backend="cpu")
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        assert sum(held.values()) <= 4 * (2 * n) * d + states + 64
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.no_grad():
            loss(x, y, 5.0, backend="cpu")
        assert not saved


def test_statistics_count_ties_as_hits_and_leave_the_loss_alone():
    x = torch.ones(4, 2)
    ids = torch.tensor([0, 0, 1, -1])
    plain = foveate.sigmoid_loss(x, x, 1.0, positives=(ids, ids), backend="cpu")
    value, stats = foveate.sigmoid_loss(
        x, x, 1.0, positives=(ids, ids), ignore=(ids, ids), return_stats=True, backend="cpu"
    )
    assert torch.equal(value, plain)
    assert (int(stats.pos_count), int(stats.neg_count)) == (5, 11)
    assert stats.row_top1 == stats.col_top1 == 1
    assert stats.pos_min == stats.neg_max == 2
    _, none = foveate.sigmoid_loss(x, x, 1.0, positives=None, return_stats=True, backend="cpu")
    assert none.pos_mean.isnan()
    assert (none.pos_min, none.pos_max) == (math.inf, -math.inf)


def test_positive_shares_weigh_a_row_as_one():
    x, y = _pair(6, m=9)
    ids = torch.zeros(6, dtype=torch.long), torch.zeros(9, dtype=torch.long)
    options = {"reduction": "none", "neg_weight": 0.0, "backend": "cpu"}
    each = foveate.sigmoid_loss(x, y, 3.0, positives=ids, **options)
    row = foveate.sigmoid_loss(x, y, 3.0, positives=ids, positive_share="row", **options)
    both = foveate.sigmoid_loss(x, y, 3.0, positives=ids, positive_share="both", **options)
    torch.testing.assert_close(row, each / 9)
    torch.testing.assert_close(both, each * (1 / 9 + 1 / 6) / 2)


def test_numpy_arrays_come_back_as_arrays():
    x, y = (t.detach().numpy() for t in _pair(5))
    value = foveate.sigmoid_loss(x, y, 3.0)
    assert type(value).__module__ == "numpy"
    assert math.isclose(float(value), foveate.sigmoid_loss(*_pair(5), 3.0).item(), rel_tol=1e-6)


def test_two_linear_towers_follow_the_dense_curve():
    def curve(backend):
        torch.manual_seed(0)
        images, texts = torch.randn(48, 6), torch.randn(48, 6)
        towers = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
        scale, bias = torch.tensor(2.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
        parameters = [*towers[0].parameters(), *towers[1].parameters(), scale, bias]
        optimizer = torch.optim.Adam(parameters, 1e-2)
        found = []
        for _ in range(100):
            x, y = (F.normalize(t(v)) for t, v in zip(towers, (images, texts), strict=True))
            loss = foveate.sigmoid_loss(x, y, scale.exp(), bias, backend=backend)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return torch.tensor(found)

    torch.testing.assert_close(curve("cpu"), curve("reference"), rtol=1e-4, atol=0)
