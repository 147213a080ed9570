"""Properties of analog bits that one right answer or an identity decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.ops.analog_bits.reference.noise import philox

ZERO, ONES = (torch.tensor([value]) for value in (0, 0xFFFFFFFF))


@pytest.mark.parametrize("bit_order", ["lsb", "msb"])
@pytest.mark.parametrize("n_bits", range(1, 17))
def test_every_id_survives_encoding_and_decoding(n_bits, bit_order):
    ids = torch.arange(1 << n_bits)
    for scale in (1e-3, 0.1, 1.0):
        bits = foveate.bits_encode(ids, n_bits, scale=scale, bit_order=bit_order)
        assert torch.equal(foveate.bits_decode(bits, bit_order=bit_order), ids)
    weights = 2 ** torch.arange(n_bits)
    weights = weights if bit_order == "lsb" else weights.flip(0)
    assert torch.equal(((bits > 0) * weights).sum(-1), ids)


def test_noise_below_the_scale_decodes_to_the_same_ids():
    ids = torch.randint(0, 256, (50, 2), generator=torch.Generator().manual_seed(0))
    bits = foveate.bits_encode(ids, (8, 8), scale=0.1)
    noise = 0.0999 * (2 * torch.rand(bits.shape) - 1)
    assert torch.equal(foveate.bits_decode(bits + noise, n_bits=(8, 8)), ids)


def test_zeros_and_nan_read_as_clear_bits():
    bits = torch.tensor([0.0, -0.0, float("nan"), 1e-45, -1.0, float("inf")])
    assert int(foveate.bits_decode(bits)) == 0b101000


def test_out_may_be_a_strided_view_whose_neighbours_stay():
    ids = torch.arange(6).view(2, 3)
    for dim in (-1, 1):
        shape = list(foveate.bits_encode(ids, 4, dim=dim).shape)
        shape[dim] *= 2
        room = torch.full(shape, 7.0)
        half = room.narrow(dim, 4, 4)
        assert foveate.bits_encode(ids, 4, dim=dim, out=half) is half
        assert torch.equal(half, foveate.bits_encode(ids, 4, dim=dim))
        assert bool((room.narrow(dim, 0, 4) == 7).all())


@pytest.mark.parametrize("value", [-1, 1 << 31])
def test_32_bit_maps_check_the_sign_too(value):
    with pytest.raises(ValueError, match="ids must be in"):
        foveate.bits_encode(torch.tensor([value]), 31)
    with pytest.raises(ValueError, match="ids must be in"):
        foveate.bits_encode(torch.tensor([-1], dtype=torch.int32), 32)


def test_philox_gives_the_known_answers():
    zeros = philox(ZERO, ZERO, ZERO, ZERO, ZERO)
    assert [int(word) for word in zeros] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = philox(ONES, ONES, ONES, ONES, torch.tensor([-1]))
    assert [int(word) for word in ones] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_the_noise_is_within_1e_6_of_float64_box_muller():
    n, seed, offset = 4096, 987654321987654321, 17
    z = foveate.bits_noise((n, 4), seed, offset=offset).double().numpy()
    pixel = torch.arange(n)
    words = philox(
        pixel, torch.zeros_like(pixel), torch.zeros_like(pixel),
        torch.full_like(pixel, offset), torch.tensor([seed]),
    )  # fmt: skip
    fl32 = [word.numpy().astype(np.float32) for word in words]
    u = [np.float32(w * np.float32(2**-32) + np.float32(2**-33)).astype(np.float64) for w in fl32]
    r0, r2 = np.sqrt(-2 * np.log(u[0])), np.sqrt(-2 * np.log(u[2]))
    a0, a2 = 2 * np.pi * u[1], 2 * np.pi * u[3]
    want = np.stack([r0 * np.cos(a0), r0 * np.sin(a0), r2 * np.cos(a2), r2 * np.sin(a2)], -1)
    assert np.abs(z - want).max() <= 1e-6


def test_the_noise_is_standard_normal_and_uncorrelated_between_seeds_and_offsets():
    draws = [
        foveate.bits_noise((1 << 18, 8), seed, offset=o) for seed, o in ((1, 0), (2, 0), (1, 1))
    ]
    for z in draws:
        n = z.numel()
        assert abs(float(z.double().mean())) < 5 / math.sqrt(n)
        assert abs(float(z.double().var()) - 1) < 5 * math.sqrt(2 / n)
        assert abs(float((z.double() ** 4).mean()) - 3) < 5 * math.sqrt(96 / n)
        ranks = torch.special.ndtr(z.flatten().double()).sort().values
        grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        assert float((ranks - grid).abs().max()) < 1.95 / math.sqrt(n)  # KS at 0.1 %
    for other in draws[1:]:
        assert abs(float((draws[0] * other).double().mean())) < 5 / math.sqrt(other.numel())


def test_the_stream_is_equal_for_layouts_threads_and_ways_to_give_the_seed():
    last = foveate.bits_noise((3, 500, 40, 6), 5, offset=3)
    first = foveate.bits_noise((3, 6, 500, 40), 5, offset=3, dim=1)
    assert torch.equal(first.movedim(1, -1), last)
    assert torch.equal(foveate.bits_noise((3, 500, 40, 6), torch.tensor([5]), offset=3), last)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(foveate.bits_noise((3, 500, 40, 6), 5, offset=3), last)
    torch.set_num_threads(threads)
    assert torch.equal(foveate.bits_noise((3, 500, 40, 6), 5, offset=3, dtype=torch.bfloat16),
                       last.bfloat16())  # fmt: skip


def test_seeds_are_drawn_from_torchs_generators():
    ids = torch.arange(16)
    torch.manual_seed(3)
    first = foveate.bits_q_sample(ids, 4, 0.5)
    torch.manual_seed(3)
    assert torch.equal(foveate.bits_q_sample(ids, 4, 0.5), first)
    assert not torch.equal(foveate.bits_q_sample(ids, 4, 0.5), first)
    generator = torch.Generator().manual_seed(1)
    drawn = [foveate.bits_q_sample(ids, 4, 0.5, generator=generator) for _ in range(2)]
    assert not torch.equal(*drawn)
    generator.manual_seed(1)
    assert torch.equal(foveate.bits_q_sample(ids, 4, 0.5, generator=generator), drawn[0])


def test_returned_noise_is_what_was_added():
    ids = torch.randint(0, 16, (2, 37), generator=torch.Generator().manual_seed(0))
    x, e = foveate.bits_q_sample(ids, 4, 0.3, seed=8, return_noise=True, dtype=torch.float64)
    signal = foveate.bits_encode(ids, 4, dtype=torch.float64)
    torch.testing.assert_close(x, math.sqrt(0.3) * signal + math.sqrt(0.7) * e, rtol=0, atol=1e-15)
    again = foveate.bits_q_sample(ids, 4, 0.3, noise=e, dtype=torch.float64)
    assert torch.equal(again, x)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_a_regenerated_noise_gives_the_loss_of_the_given_one(kind):
    ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(0))
    pred = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1))
    gamma = torch.tensor([0.2, 0.9])
    _, e = foveate.bits_q_sample(ids, 8, gamma, seed=4, offset=2, return_noise=True)
    given = foveate.bits_loss(pred, ids, 8, kind=kind, gamma=gamma, noise=e)
    assert torch.equal(
        foveate.bits_loss(pred, ids, 8, kind=kind, gamma=gamma, seed=4, offset=2), given
    )


def _losses():
    ids = torch.randint(0, 16, (3, 40), generator=torch.Generator().manual_seed(0))
    pred = torch.randn(3, 40, 4, generator=torch.Generator().manual_seed(1))
    logits = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(2))
    yield "bits_loss", pred, lambda p: foveate.bits_loss(p, ids, 4, scale=0.1)
    yield "cross_entropy", logits, lambda p: foveate.bits_softmax_cross_entropy(p, ids, 4)


@pytest.mark.parametrize(("name", "pred", "loss"), list(_losses()))
@pytest.mark.parametrize("factor", [1.0, 0.5, 65536.0])
def test_backward_twice_gives_the_same_gradient_scaled_by_the_factor(name, pred, loss, factor):
    leaf = pred.clone().requires_grad_()
    value = loss(leaf) * factor
    value.backward(retain_graph=True)
    once = leaf.grad.clone()
    leaf.grad = None
    value.backward()
    assert torch.equal(leaf.grad, once), name
    inner = pred.clone().requires_grad_()
    (loss(2 * inner) * factor).backward()  # not a leaf
    other = (2 * pred).requires_grad_()
    (loss(other) * factor).backward()
    torch.testing.assert_close(inner.grad, 2 * other.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "pred", "loss"), list(_losses()))
def test_half_precision_gradients_survive_a_loss_scale(name, pred, loss):
    half = pred.half().requires_grad_()
    (loss(half) * 65536.0).backward()
    exact = pred.half().double().requires_grad_()
    (loss(exact) * 65536.0).backward()
    error = (half.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert float(error) <= 2e-3, name


@pytest.mark.parametrize(("name", "pred", "loss"), list(_losses()))
def test_a_second_derivative_is_refused_and_not_zero(name, pred, loss):
    leaf = pred.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf) * leaf.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(gradient.sum(), leaf)


def test_the_sigmoid_loss_is_exact_where_a_sigmoid_saturates():
    ids = torch.tensor([1])
    subnormal = 2.0**-149  # the spacing of float32 about softplus(-100) = 3.7e-44
    for z in (-100.0, -30.0, 0.0, 30.0, 100.0):
        loss = foveate.bits_loss(torch.tensor([[z]]), ids, 1, kind="sigmoid")
        want = F.softplus(-torch.tensor(z, dtype=torch.float64))
        torch.testing.assert_close(loss.double(), want, rtol=3e-7, atol=subnormal)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("groups", [1, 2, 16])
def test_cross_entropy_equals_torchs_on_the_groups_integers(groups, dim):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 1 << 16, (2, 5), generator=generator)
    m = 16 // groups
    if m == 16:
        ids = ids[:1, :2]
    logits = torch.randn((*ids.shape, groups, 1 << m), generator=generator)
    targets = (ids.unsqueeze(-1) >> (m * torch.arange(groups))) & ((1 << m) - 1)
    want = F.cross_entropy(logits.double().flatten(0, -2), targets.flatten())
    given = logits if dim == -1 else logits.movedim((-2, -1), (1, 2))
    loss = foveate.bits_softmax_cross_entropy(given, ids, 16, groups=groups, dim=dim)
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)


def test_a_certain_class_is_expected_as_its_own_code_word():
    for bit_order in ("lsb", "msb"):
        ids = torch.arange(256)
        logits = 40.0 * F.one_hot(ids, 256).float()
        bits = foveate.bits_softmax_expectation(logits, 8, groups=1, scale=0.1, bit_order=bit_order)
        want = foveate.bits_encode(ids, 8, scale=0.1, bit_order=bit_order)
        torch.testing.assert_close(bits, want, rtol=1e-6, atol=0)


def test_unchecked_ids_use_their_low_bits():
    ids = torch.tensor([1, 2, 9 + 64])
    bits = foveate.bits_encode(ids, 4, check=False)
    assert torch.equal(foveate.bits_decode(bits), ids & 15)
