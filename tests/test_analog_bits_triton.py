"""What Triton kernels of analog bits promise beyond the error budget."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.testing import Call, evaluate
from foveate.testing.check import compare

pytestmark = pytest.mark.gpu


def _values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_drawn_step_adds_the_stream_of_bits_noise():
    x_t = torch.zeros(2, 3, 5, device="cuda")
    for dim in (0, 2):
        drawn = foveate.ddpm_step(x_t, x_t, 0.25, 0.5, seed=3, offset=1, dim=dim, backend="triton")
        z = foveate.bits_noise((2, 3, 5), 3, offset=1, dim=dim, device="cuda", backend="reference")
        spread = torch.full_like(z, 0.5, dtype=torch.float64).sqrt().float()
        assert torch.equal(drawn[0], spread * z)


def test_halves_of_a_buffer_are_written_and_x_prev_may_be_x_t():
    x_t, pred = _values(2, 4, 6).cuda(), _values(2, 4, 6, seed=1).cuda()
    want = foveate.ddim_step(x_t, pred, 0.4, 0.6, clip=1.0, backend="reference")
    room = torch.full((2, 8, 6), 7.0, device="cuda")
    halves = room[:, :4], room[:, 4:]
    halves[0].copy_(x_t)
    foveate.ddim_step(halves[0], pred, 0.4, 0.6, clip=1.0, out=halves, backend="triton")
    torch.testing.assert_close(halves[0], want[0])
    torch.testing.assert_close(halves[1], want[1])


@pytest.mark.parametrize("form", ["loss", "softmax"])
def test_a_second_backward_pass_finds_the_same_gradient(form):
    ids = torch.tensor([[0, 3], [2, 1]], device="cuda")
    pred = _values(2, 2, 2 if form == "loss" else 4).cuda().requires_grad_()
    f = foveate.bits_loss if form == "loss" else foveate.bits_softmax_cross_entropy
    want = torch.autograd.grad(f(pred, ids, 2, backend="reference"), pred)[0]
    loss = f(pred, ids, 2, backend="triton")
    passes = [
        torch.autograd.grad(loss, pred, torch.tensor(factor, device="cuda"), retain_graph=True)[0]
        for factor in (0.5, 1.0, 65536.0)
    ]
    for factor, found in zip((0.5, 1.0, 65536.0), passes, strict=True):
        torch.testing.assert_close(found, factor * want)


def test_arguments_that_triton_would_specialise_are_read_as_values():
    ids = torch.arange(16, device="cuda")
    bits = foveate.bits_encode(ids, 4, low=0.0, backend="triton")
    assert torch.equal(bits, foveate.bits_encode(ids, 4, low=0.0, backend="reference"))
    for seed, offset in ((1, 1), (16, 16), (0, 2**32 - 1)):
        noise = foveate.bits_noise((4, 5), seed, offset=offset, device="cuda", backend="triton")
        want = foveate.bits_noise((4, 5), seed, offset=offset, device="cuda", backend="reference")
        assert torch.equal(noise, want)


@pytest.mark.parametrize(("dim", "bit_order"), [(-1, "lsb"), (0, "msb")])
def test_groups_wider_than_a_chunk_equal_the_reference(dim, bit_order):
    bits = 13 if dim == -1 else 9
    logits = _values(2, 1 << bits) if dim == -1 else _values(1 << bits, 2)
    logits[..., :5] += 3
    logits = logits.cuda().requires_grad_()
    ids = torch.tensor([(1 << bits) - 2, 77], device="cuda")
    shared = {"dim": dim, "bit_order": bit_order}
    loss = Call((logits, ids, bits), shared)
    expectation = Call((logits, bits), {**shared, "groups": 1})
    for api, call in (
        (foveate.bits_softmax_cross_entropy, loss),
        (foveate.bits_softmax_expectation, expectation),
    ):
        got, same = (evaluate(api, call, name) for name in ("triton", "reference"))
        exact = evaluate(api, call.to(torch.float64), "reference")
        for name, value in got.items():
            verdict = compare(name, value, same[name], exact[name])
            assert verdict.ok, verdict


def test_weights_of_many_ids_and_of_ids_outside():
    ids = torch.tensor([[0, 1, 1, 2999, 1500, 1], [-1, 5, 3000, 5, 7, 7]], device="cuda")
    for power in (0.0, 0.2, 1.0):
        call = Call((ids, 3000), {"power": power, "check": False})
        got, want = (evaluate(foveate.instance_weights, call, b) for b in ("triton", "reference"))
        torch.testing.assert_close(got["out"], want["out"], rtol=1e-6, atol=0)
