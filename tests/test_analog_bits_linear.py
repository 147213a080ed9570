"""The linear forms equal their two steps, in far less memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import foveate
from foveate.nn import BitsSoftmaxHead


def _head(d=5, logits=2 << 4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*size, generator=generator) for size in ((2, d, 3, 4), (logits, d), (logits,))
    ]


@pytest.mark.parametrize("chunk", [None, 1, 5, 12, 13, 1000])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_loss_and_gradients_equal_a_linear_layer_and_the_loss(chunk, factor):
    ids = torch.arange(48).view(2, 2, 3, 4) % 16
    weight = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(1))
    ours = [t.clone().requires_grad_() for t in _head()]
    loss = foveate.bits_linear_softmax_cross_entropy(
        *ours, ids, (4, 4), weight=weight, dim=1, chunk=chunk
    )
    theirs = [t.double().requires_grad_() for t in _head()]
    h, proj, bias = theirs
    logits = F.linear(h.movedim(1, -1), proj, bias).unflatten(-1, (2, 16))  # [2, 3, 4, 2, 16]
    nll = logits.logsumexp(-1) - logits.gather(-1, ids.movedim(1, -1).unsqueeze(-1)).squeeze(-1)
    want = (nll * weight.double().unsqueeze(-1)).mean()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    (factor * loss).backward(retain_graph=True)
    first = [t.grad.clone() for t in ours]
    (factor * loss).backward()  # again: the saved gradients were not scaled in place
    (factor * want).backward()
    for t, once, reference in zip(ours, first, theirs, strict=True):
        torch.testing.assert_close(t.grad, 2 * once, rtol=0, atol=0)
        torch.testing.assert_close(once.double(), reference.grad, rtol=1e-4, atol=1e-7)


def test_half_precision_gradients_take_the_loss_scale_first():
    h, proj, bias = (t.half().requires_grad_() for t in _head())
    ids = torch.arange(48).view(2, 2, 3, 4) % 16
    loss = foveate.bits_linear_softmax_cross_entropy(h, proj, bias, ids, (4, 4), dim=1)
    (65536 * loss).backward()
    wide = [t.detach().double().requires_grad_() for t in (h, proj, bias)]
    want = foveate.bits_linear_softmax_cross_entropy(*wide, ids, (4, 4), dim=1)
    (65536 * want).backward()
    for got, exact in zip((h, proj, bias), wide, strict=True):
        torch.testing.assert_close(got.grad.double(), exact.grad, rtol=2e-3, atol=0.5)


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_the_head_gives_expected_bits_and_with_ids_the_loss(channel_dim):
    head = BitsSoftmaxHead(5, (4, 4), scale=0.1, bit_order="msb", channel_dim=channel_dim)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "weight": (32, 5),
        "bias": (32,),
    }
    h = _head()[0].movedim(1, channel_dim)
    logits = F.linear(h.movedim(channel_dim, -1), head.weight, head.bias).movedim(-1, channel_dim)
    bits = head(h)
    want = foveate.bits_softmax_expectation(
        logits, 4, groups=2, scale=0.1, bit_order="msb", dim=channel_dim
    )
    torch.testing.assert_close(bits, want)
    ids = foveate.bits_decode(bits, n_bits=(4, 4), bit_order="msb", dim=channel_dim)
    loss = foveate.bits_softmax_cross_entropy(logits, ids, (4, 4), bit_order="msb", dim=channel_dim)
    torch.testing.assert_close(head(h, ids), loss)
    head(h, ids).backward()
    assert head.weight.grad.abs().max() > 0


def test_the_head_refuses_maps_of_unequal_widths_without_groups():
    with pytest.raises(ValueError, match="groups must be given"):
        BitsSoftmaxHead(5, (4, 3))


_PEAK = """
import resource, torch, foveate
torch.set_num_threads(1)
h = torch.randn(65536, 16, requires_grad=True)
proj = torch.randn(512, 16, requires_grad=True)
ids = torch.zeros(65536, 2, dtype=torch.int32)
foveate.bits_linear_softmax_cross_entropy(h[:64], proj, None, ids[:64], (8, 8)).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
foveate.bits_linear_softmax_cross_entropy(h, proj, None, ids, (8, 8)).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_the_peak_is_below_a_tenth_of_the_logits_beside_the_gradients():
    result = subprocess.run(
        [sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True
    )
    logits, gradients = 65536 * 512 * 4, 2 * 65536 * 16 * 4  # h's, as saved and accumulated
    assert int(result.stdout) * 1024 < logits / 10 + gradients
