"""The shims of Pix2Seq-D and bit_diffusion against NumPy ports of the published formulas."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from foveate.compat import bit_diffusion as lucid
from foveate.compat import pix2seq


def _ids(shape, high, seed=0, dtype=torch.int32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=generator).to(dtype)


def test_signatures_are_the_originals():
    def names(function):
        return str(inspect.signature(function)).split(" ->")[0]

    parameters = {
        pix2seq.int2bits: ["x", "n", "out_dtype"],
        pix2seq.bits2int: ["x", "out_dtype"],
        pix2seq.integer_map_to_bits: ["integer_map", "n_bits_label", "b_scale", "num_channels"],
        pix2seq.bits_to_panoptic_map: [
            "bits", "n_bits_label", "num_classes", "max_instances_per_image",
        ],
        pix2seq.get_normalized_weight: ["id_map", "total_num_ids", "p"],
        pix2seq.majority_vote_postprocess: [
            "semantic_map", "identity_map", "min_pixels", "max_instances_per_image", "max_classes",
        ],
        pix2seq.cosine_schedule_simple: ["t", "ns", "ds"],
        pix2seq.cosine_schedule: ["t", "start", "end", "tau", "clip_min"],
        pix2seq.sigmoid_schedule: ["t", "start", "end", "tau", "clip_min"],
        pix2seq.log_schedule: ["t", "start", "end", "reverse"],
        pix2seq.simple_linear_schedule: ["t", "clip_min"],
        lucid.decimal_to_bits: ["x", "bits"],
        lucid.bits_to_decimal: ["x", "bits"],
        lucid.alpha_cosine_log_snr: ["t", "s"],
        lucid.BitDiffusion.ddim_sample: ["self", "shape", "time_difference"],
        lucid.BitDiffusion.ddpm_sample: ["self", "shape", "time_difference"],
    }  # fmt: skip
    for function, want in parameters.items():
        assert list(inspect.signature(function).parameters) == want, names(function)
    assert lucid.BITS == 8


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.float64, torch.int64])
def test_int2bits_shifts_and_masks(dtype, out_dtype):
    x = _ids((2, 3, 5), 100, dtype=dtype)
    got = pix2seq.int2bits(x, 7, out_dtype)
    want = (x.numpy().astype(np.int64)[..., None] >> np.arange(7)) & 1
    assert got.dtype == (dtype if out_dtype is None else out_dtype)
    np.testing.assert_array_equal(got.numpy(), want)
    for bits in (got, got.bool(), got.float()):
        back = pix2seq.bits2int(bits, torch.int32)
        assert back.dtype == torch.int32
        np.testing.assert_array_equal(back.numpy(), x.numpy())
    assert pix2seq.bits2int(got, torch.float32).dtype == torch.float32


def test_conventions_by_hand_on_one_pixel_of_two_channels():
    ids = torch.tensor([[[[1, 6]]]])  # [1, 1, 1, 2], channels last
    bits = pix2seq.integer_map_to_bits(ids, 6, 0.1)
    want = np.float32(0.1) * np.array([1, -1, -1, -1, 1, 1], np.float32)
    np.testing.assert_array_equal(bits.numpy().ravel(), want)
    image = torch.tensor([1.0, 6.0]).view(1, 2, 1, 1) / 255 + 1e-4  # [1, 2, 1, 1], channels first
    bits = lucid.decimal_to_bits(image)
    want = [-1] * 7 + [1] + [-1] * 5 + [1, 1, -1]
    assert bits.flatten().tolist() == want
    assert bits.shape == (1, 16, 1, 1)


@pytest.mark.parametrize(("channels", "total"), [(2, 16), (1, 5), (3, 12)])
def test_integer_maps_become_analog_bits_and_panoptic_maps(channels, total):
    n = total // channels
    ids = _ids((2, 4, 3, 3), 2**n)
    got = pix2seq.integer_map_to_bits(ids, total, 0.1, channels)
    bits = (ids.numpy()[..., :channels, None] >> np.arange(n)) & 1
    want = ((2.0 * bits - 1) * 0.1).reshape(2, 4, 3, total)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), want.astype(np.float32))
    if channels == 2:
        noisy = got + 0.09 * (2 * torch.rand(got.shape) - 1)
        back = pix2seq.bits_to_panoptic_map(noisy, total, 133, 100)
        assert back.dtype == torch.int32
        limits = np.minimum(ids.numpy()[..., :2], np.array([132, 99]))
        np.testing.assert_array_equal(back.numpy(), limits)


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_normalised_weights_are_the_one_hot_sums(p):
    ids = _ids((3, 6, 7), 9)
    ids[0, 0, 0] = 40  # outside: its row of the one-hot is 0
    one_hot = (ids.numpy()[..., None] == np.arange(10)).astype(np.float64)
    inverse = (1 / (one_hot.sum((1, 2)) + 1)) ** p
    table = np.einsum("bhwk,bk->bhw", one_hot, inverse)
    if p == 0.0:
        table[0, 0, 0] = 1.0  # 0^0
    want = table / table.sum((1, 2), keepdims=True) * 42
    got = pix2seq.get_normalized_weight(ids, 10, p)
    np.testing.assert_allclose(got.numpy(), want, rtol=2e-6)


def test_the_majority_vote_takes_and_gives_arrays():
    rng = np.random.default_rng(0)
    semantic, identity = rng.integers(0, 4, (2, 9, 9)), rng.integers(0, 5, (2, 9, 9))
    got = pix2seq.majority_vote_postprocess(semantic, identity, 15, 6, 10)
    classes, owners = np.zeros_like(semantic), identity.copy()
    for b in range(2):
        for i in range(6):
            own = identity[b] == i
            if own.sum() >= 15:
                classes[b][own] = np.bincount(semantic[b][own]).argmax()
    owners[classes == 0] = 0
    np.testing.assert_array_equal(got[0], classes)
    np.testing.assert_array_equal(got[1], owners)


def _ends(curve, t):
    return (curve(t) - curve(1.0)) / (curve(0.0) - curve(1.0))


SCHEDULES = {
    "cosine_schedule_simple": lambda t: np.cos((t + 2e-4) / 1.00025 * np.pi / 2) ** 2,
    "cosine_schedule": lambda t: np.clip(
        _ends(lambda u: np.cos(u * 0.5 * np.pi / 2) ** 2, t), 1e-9, 1
    ),
    "sigmoid_schedule": lambda t: np.clip(
        _ends(lambda u: 1 / (1 + np.exp(-(u * 6 - 3))), t), 1e-9, 1
    ),
    "log_schedule": lambda t: np.clip(_ends(lambda u: np.log(u * 99 + 1), t), 0, 1),
    "simple_linear_schedule": lambda t: np.clip(1 - t, 1e-9, 1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_float32_and_the_published_curves(name):
    t = np.linspace(0, 1, 33)
    schedule = getattr(pix2seq, name)
    got = schedule(torch.from_numpy(t).float())
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), SCHEDULES[name](t), rtol=1e-5, atol=2e-7)
    assert schedule(0.25).dtype == torch.float32
    np.testing.assert_allclose(schedule(0.25).item(), SCHEDULES[name](0.25), rtol=1e-6)


def test_schedules_take_their_parameters():
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    u = t.numpy()
    got = pix2seq.cosine_schedule(t, 0.2, 1.0, 2.0, 1e-3).numpy()
    want = np.clip(_ends(lambda v: np.cos((v * 0.8 + 0.2) * np.pi / 2) ** 4, u), 1e-3, 1)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    got = pix2seq.log_schedule(t, 1.0, 50.0, True).numpy()
    np.testing.assert_allclose(got, _ends(lambda v: np.log(50 - 49 * v), u), atol=1e-12)
    assert pix2seq.simple_linear_schedule(t, 0.1).min() == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_become_bits_and_back(dtype):
    image = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    image[0, 0, 0] = torch.tensor([0.0, 1.0, -0.5, 1.5, 254.999 / 255])
    got = lucid.decimal_to_bits(image)
    ids = np.clip((image.numpy() * image.numpy().dtype.type(255)).astype(np.int64), 0, 255)
    bits = (ids[:, :, None] >> np.arange(7, -1, -1)[:, None, None]) & 1  # [b, c, 8, h, w]
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), (2 * bits - 1).reshape(2, 24, 4, 5))
    back = lucid.bits_to_decimal(got * 0.1)
    assert back.dtype == torch.float32
    np.testing.assert_array_equal(back.numpy(), ids.astype(np.float32) / np.float32(255))


def test_log_snr_curves_and_their_roots():
    t = torch.linspace(0, 1, 17, dtype=torch.float64)
    u = t.numpy()
    np.testing.assert_allclose(
        lucid.beta_linear_log_snr(t).numpy(), -np.log(np.expm1(1e-4 + 10 * u**2)), rtol=1e-10
    )
    cosine = -np.log(np.maximum(np.cos((u + 0.008) / 1.008 * np.pi / 2) ** -2 - 1, 1e-5))
    np.testing.assert_allclose(lucid.alpha_cosine_log_snr(t).numpy(), cosine, rtol=1e-10)
    one = lucid.alpha_cosine_log_snr(torch.ones(1))
    assert one.item() == pytest.approx(-33.89, abs=0.05)
    alpha, sigma = lucid.log_snr_to_alpha_sigma(t * 6 - 3)
    np.testing.assert_allclose(alpha.numpy(), (1 / (1 + np.exp(3 - 6 * u))) ** 0.5, rtol=1e-12)
    np.testing.assert_allclose(sigma.numpy(), (1 / (1 + np.exp(6 * u - 3))) ** 0.5, rtol=1e-12)


class _Unet(nn.Module):
    channels = 16

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.7))
        self.calls, self.outputs = [], []

    def forward(self, x, log_snr, self_cond):
        self.calls.append((x.clone(), log_snr.clone(), self_cond))
        result = self.factor * (x if self_cond is None else 0.7 * x + 0.3 * self_cond)
        self.outputs.append((result, result.detach().clone()))
        return result


def _original_sampler(x, steps, log_snr, earlier, scale, draw):
    """Sampling by the published forms, float64: the posterior in log snr, or DDIM."""
    x, x0 = x.astype(np.float64), None
    for s in range(steps):
        t, t_next = 1 - s / steps, max(1 - (s + 1) / steps - earlier, 0)
        now, then = log_snr(t), log_snr(t_next)
        alpha, sigma = (1 / (1 + np.exp(-now))) ** 0.5, (1 / (1 + np.exp(now))) ** 0.5
        alpha_next, sigma_next = (1 / (1 + np.exp(-then))) ** 0.5, (1 / (1 + np.exp(then))) ** 0.5
        x0 = np.clip(1.7 * (x if x0 is None else 0.7 * x + 0.3 * x0), -scale, scale)
        if draw is None:
            noise = (x - alpha * x0) / max(sigma, 1e-8)
            x = alpha_next * x0 + sigma_next * noise
        else:
            c = -np.expm1(now - then)
            mean = alpha_next * (x * (1 - c) / alpha + c * x0)
            noise = draw()
            x = mean + (sigma_next**2 * c) ** 0.5 * (noise if t_next > 0 else 0)
    return x


@pytest.mark.parametrize("use_ddim", [True, False])
@pytest.mark.parametrize(("schedule", "earlier"), [("linear", 0.0), ("linear", 0.2)])
def test_samples_follow_the_published_chain(use_ddim, schedule, earlier):
    model = lucid.BitDiffusion(
        _Unet(), image_size=3, timesteps=6, use_ddim=use_ddim, noise_schedule=schedule,
        time_difference=earlier, bit_scale=0.5,
    )  # fmt: skip
    torch.manual_seed(5)
    got = model.sample(batch_size=2)
    torch.manual_seed(5)
    first = torch.randn(2, 16, 3, 3).numpy()
    want = _original_sampler(
        first, 6, lambda t: -np.log(np.expm1(1e-4 + 10 * t * t)), earlier, 0.5,
        None if use_ddim else lambda: torch.randn(2, 16, 3, 3).numpy(),
    )  # fmt: skip
    assert np.abs(want).min() > 1e-4  # no bit hangs on rounding
    bits = (want > 0).reshape(2, 2, 8, 3, 3)
    values = (bits * 2 ** np.arange(7, -1, -1)[:, None, None]).sum(2)
    np.testing.assert_array_equal(got.numpy(), values.astype(np.float32) / np.float32(255))
    calls = model.model.calls
    assert len(calls) == 6
    assert calls[0][2] is None
    assert calls[0][1].shape == (2,)
    assert all(call[2].abs().max() <= 0.5 for call in calls[1:])
    for kept, copy in model.model.outputs:
        assert torch.equal(kept, copy)  # not clamped in place
    shape = (2, 16, 3, 3)
    draw = model.ddim_sample if use_ddim else model.ddpm_sample
    torch.manual_seed(5)
    assert torch.equal(draw(shape, time_difference=earlier), got)
    torch.manual_seed(5)
    draw(shape, time_difference=0.5)
    assert len(calls) == 18


def test_training_gives_all_samples_an_estimate_or_none():
    torch.manual_seed(0)
    model = lucid.BitDiffusion(_Unet(), image_size=4, bit_scale=0.5)
    image = torch.rand(3, 2, 4, 4)
    target = 0.5 * lucid.decimal_to_bits(image)
    with_estimate = 0
    for _ in range(30):
        model.model.calls.clear()
        loss = model(image)
        x, log_snr, self_cond = model.model.calls[-1]
        assert torch.equal(x, model.model.calls[0][0])
        assert log_snr.shape == (3,)
        if len(model.model.calls) == 2:
            with_estimate += 1
            assert torch.equal(self_cond, 1.7 * x)  # unclipped
            assert not self_cond.requires_grad
        pred = 1.7 * (x if self_cond is None else 0.7 * x + 0.3 * self_cond)
        torch.testing.assert_close(loss, ((pred - target) ** 2).mean(), rtol=1e-5, atol=1e-6)
        alpha, sigma = (v.view(3, 1, 1, 1) for v in lucid.log_snr_to_alpha_sigma(log_snr))
        noise = (x - alpha * target) / sigma
        assert 0.8 < noise.std() < 1.2
    assert 5 < with_estimate < 25
    loss.backward()
    assert model.model.factor.grad is not None
    assert set(model.state_dict()) == {"model.factor"}


def test_arguments_are_attributes():
    model = lucid.BitDiffusion(_Unet(), image_size=4, use_ddim=True, time_difference=0.1)
    assert (model.image_size, model.timesteps, model.use_ddim) == (4, 1000, True)
    assert (model.time_difference, model.bit_scale, model.channels) == (0.1, 1.0, 16)
    assert model.log_snr is lucid.alpha_cosine_log_snr
    # The cosine's log snr at t = 1 is -33.9 in float32: a step from there stays finite.
    images = lucid.BitDiffusion(_Unet(), image_size=4, timesteps=2, use_ddim=True).sample(1)
    assert images.shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: lucid.decimal_to_bits(torch.rand(1, 3, 2, 2), 4), ValueError, "bits must be 8"),
        (lambda: lucid.bits_to_decimal(torch.rand(1, 8, 2, 2), bits=255), ValueError, "255"),
        (lambda: lucid.decimal_to_bits(torch.full((1, 3, 2, 2), np.nan)), ValueError, "NaN"),
        (lambda: lucid.decimal_to_bits(_ids((1, 3, 2, 2), 9)), TypeError, "int32"),
        (lambda: lucid.bits_to_decimal(_ids((1, 8, 2, 2), 2)), TypeError, "int32"),
        (lambda: lucid.bits_to_decimal(torch.rand(1, 12, 2, 2)), ValueError, r"c \* 8"),
        (
            lambda: lucid.BitDiffusion(_Unet(), image_size=4)(torch.rand(1, 2, 4, 5)),
            ValueError,
            r"img must be \[b, c, 4, 4\]",
        ),
        (
            lambda: lucid.BitDiffusion(_Unet(), image_size=4)(_ids((1, 2, 4, 4), 9)),
            TypeError,
            "int32",
        ),
        (
            lambda: lucid.BitDiffusion(_Unet(), image_size=4)(torch.full((1, 2, 4, 4), np.nan)),
            ValueError,
            "NaN",
        ),
        (
            lambda: lucid.BitDiffusion(_Unet(), image_size=4, noise_schedule="sigmoid"),
            ValueError,
            "noise_schedule must be one of 'cosine', 'linear'",
        ),
        (
            lambda: pix2seq.integer_map_to_bits(_ids((1, 2, 2, 2), 2), 15, 0.1),
            ValueError,
            "num_channels=2 must divide n_bits_label, got 15",
        ),
        (
            lambda: pix2seq.bits_to_panoptic_map(torch.rand(1, 2, 2, 15), 15, 3, 3),
            ValueError,
            "n_bits_label",
        ),
        (lambda: pix2seq.int2bits(torch.rand(3), 4), TypeError, "integer ids"),
        (lambda: pix2seq.int2bits(torch.tensor([16]), 4), ValueError, r"\[0, 16\)"),
        (
            lambda: pix2seq.get_normalized_weight(torch.rand(1, 2, 2), 4),
            TypeError,
            "integer ids",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
