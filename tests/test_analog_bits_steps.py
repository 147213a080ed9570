"""Sampler steps and instance weights against the published forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import foveate

KINDS = ("x", "eps", "v", "sigmoid")


def _normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _x0(x, f, g, kind, scale):
    return {
        "x": f,
        "eps": (x - math.sqrt(1 - g) * f) / math.sqrt(g),
        "v": math.sqrt(g) * x - math.sqrt(1 - g) * f,
        "sigmoid": scale * (2 / (1 + np.exp(-f)) - 1),
    }[kind]


def _published_ddim(x, f, g, h, kind, clip, scale):
    """The noise is derived from the clipped x0, then both are mixed at the next level."""
    x0 = np.clip(_x0(x, f, g, kind, scale), -clip, clip)
    noise = (x - math.sqrt(g) * x0) / math.sqrt(1 - g)
    return math.sqrt(h) * x0 + math.sqrt(1 - h) * noise, x0


def _published_ddpm(x, f, g, h, z, kind, clip, scale, variance):
    """Mean and variance of the posterior in the alphas of DDPM, eq. 6 and 7."""
    x0 = np.clip(_x0(x, f, g, kind, scale), -clip, clip)
    alpha = g / h
    beta = 1 - alpha
    mean = math.sqrt(h) * beta / (1 - g) * x0 + math.sqrt(alpha) * (1 - h) / (1 - g) * x
    squared = {"large": beta, "small": (1 - h) / (1 - g) * beta, "zero": 0.0}[variance]
    return mean + math.sqrt(squared) * z


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_composed_ddim_steps_follow_the_published_chain(kind):
    x = _normal(2, 6, 5, dtype=torch.float64)
    ours, theirs = x.clone(), x.numpy()
    levels = np.linspace(0.01, 0.99, 21)
    for step, (g, h) in enumerate(itertools.pairwise(levels)):
        f = _normal(2, 6, 5, seed=step, dtype=torch.float64)
        ours, x0 = foveate.ddim_step(
            ours, f, float(g), float(h), pred_type=kind, clip=1.0, scale=0.5
        )
        theirs, x0_theirs = _published_ddim(theirs, f.numpy(), g, h, kind, 1.0, 0.5)
        np.testing.assert_allclose(x0.numpy(), x0_theirs, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", ["large", "small", "zero"])
def test_the_ancestral_step_is_the_published_posterior(kind, variance):
    x, f = _normal(2, 9, dtype=torch.float64), _normal(2, 9, seed=1, dtype=torch.float64)
    z = foveate.bits_noise((2, 9), 5, offset=3, dtype=torch.float64)
    got, _ = foveate.ddpm_step(
        x, f, 0.3, 0.45, variance=variance, seed=5, offset=3, pred_type=kind, clip=0.7, scale=0.5
    )
    want = _published_ddpm(x.numpy(), f.numpy(), 0.3, 0.45, z.numpy(), kind, 0.7, 0.5, variance)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-13)


def test_a_learned_variance_of_plus_and_minus_one_are_the_two_fixed_ones():
    x, f = _normal(2, 9), _normal(2, 9, seed=1)
    for value, name in ((1.0, "large"), (-1.0, "small")):
        v = torch.full_like(x, value)
        got, _ = foveate.ddpm_step(x, f, 0.3, 0.45, variance=v, seed=5)
        want, _ = foveate.ddpm_step(x, f, 0.3, 0.45, variance=name, seed=5)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6)
    last, x0 = foveate.ddpm_step(x, f, 0.3, 1.0, variance=torch.zeros_like(x), seed=5)
    assert torch.equal(last, x0)  # no noise, and the clean prediction, at g' = 1


def test_ddim_at_the_last_level_returns_x0():
    x, f = _normal(3, 8), _normal(3, 8, seed=1)
    x_prev, x0 = foveate.ddim_step(x, f, 0.25, 1.0, clip=0.5)
    assert torch.equal(x_prev, x0)
    assert torch.equal(x0, f.clamp(-0.5, 0.5))


def test_guidance_extrapolates_from_the_unconditional_prediction():
    x, f, u = _normal(2, 8), _normal(2, 8, seed=1), _normal(2, 8, seed=2)
    _, x0 = foveate.ddim_step(x, f, 0.4, 0.5, pred_uncond=u, guidance=2.0)
    torch.testing.assert_close(x0, 3 * f - 2 * u, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dim", [1, -1])
def test_the_halves_of_a_concat_buffer_are_written_and_x_t_may_be_one(dim):
    shape = (2, 4, 5, 4)
    x, f = _normal(*shape), _normal(*shape, seed=1)
    want_prev, want_x0 = foveate.ddim_step(x, f, 0.4, 0.5, clip=1.0)
    buffer = torch.cat([x, torch.zeros_like(x)], dim)
    x_half, x0_half = buffer.chunk(2, dim)
    prev, x0 = foveate.ddim_step(x_half, f, 0.4, 0.5, clip=1.0, out=(x_half, x0_half))
    assert prev is x_half
    assert x0 is x0_half
    assert torch.equal(buffer, torch.cat([want_prev, want_x0], dim))


def test_levels_per_sample_are_those_of_single_calls():
    x, f = _normal(3, 7), _normal(3, 7, seed=1)
    g, h = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.6, 1.0])
    together = foveate.ddim_step(x, f, g, h, pred_type="v", return_x0=False)
    for i in range(3):
        alone = foveate.ddim_step(
            x[i : i + 1], f[i : i + 1], g[i : i + 1], h[i : i + 1], pred_type="v", return_x0=False
        )
        assert torch.equal(together[i : i + 1], alone)


def test_numpy_comes_back_as_numpy():
    x = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)
    x_prev, x0 = foveate.ddim_step(x, x, 0.4, 0.5)
    assert isinstance(x_prev, np.ndarray)
    assert isinstance(x0, np.ndarray)


@pytest.mark.parametrize("power", [0.0, 0.2, 1.0])
def test_instance_weights_are_those_of_the_one_hot_form_and_have_mean_one(power):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (3, 17, 13), generator=generator).square() // 9
    one_hot = torch.nn.functional.one_hot(ids, 8).double()
    u = (1 / (one_hot.sum((1, 2), keepdim=True) + 1)) ** power
    want = (one_hot * u).sum(-1)
    want = want / want.mean((1, 2), keepdim=True)
    got = foveate.instance_weights(ids.transpose(1, 2), 8, power=power)
    torch.testing.assert_close(got.double(), want.transpose(1, 2), rtol=2e-7, atol=0)
    torch.testing.assert_close(
        got.double().mean((1, 2)), torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_unchecked_ids_outside_weigh_zero_to_the_power():
    ids = torch.tensor([[0, 0, 1, 7, -3]])
    weight = foveate.instance_weights(ids, 2, check=False)
    assert torch.equal(weight[0, 3:], torch.zeros(2))
    torch.testing.assert_close(weight.mean(), torch.tensor(1.0))
    everything = foveate.instance_weights(ids, 2, power=0.0, check=False)
    torch.testing.assert_close(everything, torch.ones(1, 5))
