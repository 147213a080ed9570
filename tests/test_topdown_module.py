"""nn.TopDownAttention: timm's keys, its result without a signal, the bias that counts twice."""

from __future__ import annotations

import pytest
import torch

import foveate

pytestmark = pytest.mark.usefixtures("one_thread")


def module(**options):
    torch.manual_seed(0)
    return foveate.nn.TopDownAttention(24, 3, **options).double()


def tokens(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 7, 24, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_without_a_signal_it_is_timms_attention(qkv_bias):
    layers = pytest.importorskip("timm.layers")
    ours = module(qkv_bias=qkv_bias)
    theirs = layers.Attention(24, num_heads=3, qkv_bias=qkv_bias).double()
    theirs.load_state_dict(ours.state_dict())
    x = tokens()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    mask = torch.rand(2, 1, 7, 7) < 0.8
    mask |= torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(
        ours(x, attn_mask=mask), theirs(x, attn_mask=mask), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        ours(x, is_causal=True), theirs(x, is_causal=True), rtol=1e-10, atol=1e-10
    )


def test_a_zero_signal_adds_the_projected_value_bias_once_more():
    twice, once = module(), module(td_bias="once")
    x, zero = tokens(), torch.zeros_like(tokens())
    more = twice.proj.weight @ twice.qkv.bias[48:]
    torch.testing.assert_close(twice(x, zero), twice(x) + more, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(once(x, zero), once(x), rtol=1e-10, atol=1e-10)
    assert more.abs().max() > 1e-3


def test_the_signal_moves_the_values_alone():
    layer, x, td = module(proj_bias=False), tokens(), tokens(2)
    swapped = layer(x, td) - layer(x, torch.zeros_like(td))
    torch.testing.assert_close(
        layer(x, 3 * td) - layer(x, torch.zeros_like(td)), 3 * swapped, rtol=1e-9, atol=1e-10
    )
    layer.requires_grad_(False)
    layer(x, td.requires_grad_()).sum().backward()
    assert td.grad.abs().max() > 0
    assert layer.qkv.weight.grad is None


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"num_heads": 5}, ValueError, "num_heads must divide dim = 24, got 5"),
        ({"num_heads": 0}, ValueError, "num_heads"),
        ({"num_heads": 2.0}, TypeError, "num_heads"),
        ({"num_heads": 3, "td_bias": "thrice"}, ValueError, "td_bias"),
    ],
)
def test_what_does_not_fit_is_named(options, error, match):
    with pytest.raises(error, match=match):
        foveate.nn.TopDownAttention(24, **options)
