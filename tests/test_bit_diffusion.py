"""Bit Diffusion: schedules, panoptic maps, the sampler's loop, and the module that trains."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

import foveate
from foveate.methods.bit_diffusion import (
    BitDiffusion,
    gamma_schedule,
    log_snr_schedule,
    panoptic_decode,
    panoptic_encode,
    panoptic_merge,
    past_frames,
    sample,
    time_pairs,
)


def _ids(shape, high, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def _squash(z):
    return 1 / (1 + np.exp(-z))


def _between(t, curve, least=1e-9):
    """A curve between its ends, so that time 0 is 1 and time 1 is 0."""
    return np.clip((curve(t) - curve(1.0)) / (curve(0.0) - curve(1.0)), least, 1.0)


PUBLISHED = {
    "cosine": lambda t: np.cos((t + 2e-4) / (1 + 2.5e-4) * np.pi / 2) ** 2,
    "cosine@0.2,0.9,1.5": lambda t: _between(t, lambda u: np.cos((u * 0.7 + 0.2) * np.pi / 2) ** 3),
    "sigmoid@-3,3,0.9": lambda t: _between(t, lambda u: _squash((u * 6 - 3) / 0.9)),
    "log@1,100,f": lambda t: np.clip(
        (np.log(100) - np.log(t * 99 + 1)) / (np.log(100) - np.log(1)), 0, 1
    ),
    "log@1,100,t": lambda t: np.clip(
        (np.log(1) - np.log(t * -99 + 100)) / (np.log(1) - np.log(100)), 0, 1
    ),
    "linear": lambda t: np.clip(1 - t, 1e-9, 1),
    "simple_linear": lambda t: np.clip(1 - t, 1e-9, 1),
    "logsnr_cosine": lambda t: _squash(
        -np.log(np.maximum(np.cos((t + 0.008) / 1.008 * np.pi / 2) ** -2 - 1, 1e-5))
    ),
    "logsnr_linear": lambda t: _squash(-np.log(np.expm1(1e-4 + 10 * t**2))),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_schedules_are_the_published_curves(name):
    t = torch.linspace(0, 1, 41, dtype=torch.float64)
    want = PUBLISHED[name](t.numpy())
    np.testing.assert_allclose(gamma_schedule(t, name).numpy(), want, rtol=1e-9, atol=1e-14)
    inside = (want > 1e-8) & (want < 1 - 1e-8)
    log_snr = log_snr_schedule(t, name).numpy()[inside]
    want = want[inside]
    np.testing.assert_allclose(log_snr, np.log(want / (1 - want)), rtol=1e-6, atol=1e-6)


def test_a_schedule_keeps_the_dtype_of_its_times_and_takes_callables():
    for dtype in (torch.float32, torch.float64):
        assert gamma_schedule(torch.rand(3, dtype=dtype), "sigmoid@-3,3,1").dtype == dtype
        assert log_snr_schedule(torch.rand(3, dtype=dtype)).dtype == dtype
    t = torch.rand(5, dtype=torch.float64)
    assert torch.equal(gamma_schedule(t, lambda u: u * u), t * t)
    assert gamma_schedule(0.5, "linear").item() == 0.5
    swapped = gamma_schedule(t, "log@100,1,f")
    assert torch.equal(gamma_schedule(t, "log@1,100,true"), swapped)


def test_the_log_snr_of_the_cosine_has_all_its_digits_in_float64():
    one = torch.ones(1, dtype=torch.float64)
    assert log_snr_schedule(one, "logsnr_cosine").item() == pytest.approx(-74.7, abs=0.05)
    assert log_snr_schedule(one.float(), "logsnr_cosine").item() == pytest.approx(-33.89, abs=0.05)


@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        ("cos", ValueError),
        ("cosine@0,1", ValueError),
        ("cosine@0,1,one", ValueError),
        ("cosine@0.5,0.5,1", ValueError),
        ("sigmoid@-3,3,0", ValueError),
        ("sigmoid@-3,3,nan", ValueError),
        ("log@0,100,f", ValueError),
        ("linear@0,1,1", ValueError),
        (3, TypeError),
        (None, TypeError),
    ],
)
def test_unknown_schedules_are_refused(schedule, error):
    with pytest.raises(error, match="schedule"):
        gamma_schedule(torch.rand(2), schedule)
    with pytest.raises(error, match="schedule"):
        BitDiffusion(nn.Identity(), 4, schedule=schedule)
    if schedule is not None:
        with pytest.raises(error, match="schedule"):
            sample(lambda x, cond: x, (1, 4), schedule=schedule, iterations=1)


def test_the_choices_of_schedules_are_named():
    with pytest.raises(ValueError, match=r"'cosine'.*got 'cosin'"):
        gamma_schedule(torch.rand(2), "cosin")
    with pytest.raises(TypeError, match="t must be"):
        gamma_schedule(torch.arange(3))


def test_time_pairs_follow_the_asymmetric_grid():
    assert time_pairs(4) == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]
    assert time_pairs(4, 1.0) == [(1.0, 0.5), (0.75, 0.25), (0.5, 0.0), (0.25, 0.0)]
    for arguments, error in (((0,), ValueError), ((2.0,), TypeError), ((2, -1.0), ValueError)):
        with pytest.raises(error, match=r"iterations|td"):
            time_pairs(*arguments)
    with pytest.raises(ValueError, match="td"):
        time_pairs(2, math.nan)


@pytest.mark.parametrize("dim", [-1, 1])
def test_panoptic_maps_survive_their_bits_and_are_clamped(dim):
    panoptic = _ids((2, 3, 5, 2), 200).movedim(-1, dim)
    bits = panoptic_encode(panoptic, scale=0.1, dim=dim)
    assert bits.shape[dim] == 16
    assert set(bits.unique().tolist()) == {-np.float32(0.1).item(), np.float32(0.1).item()}
    back = panoptic_decode(bits, n_classes=133, n_instances=100, dim=dim)
    assert back.dtype == torch.int32
    classes, instances = panoptic.unbind(dim)
    want = torch.stack([classes.clamp(max=132), instances.clamp(max=99)], dim)
    assert torch.equal(back.long(), want)


def test_panoptic_widths_are_two():
    for call in (
        lambda n: panoptic_encode(_ids((1, 2, 2, 2), 2), n_bits=n),
        lambda n: panoptic_decode(torch.rand(1, 2, 8), n_classes=2, n_instances=2, n_bits=n),
    ):
        for n_bits in (8, (8,), (2, 3, 3)):
            with pytest.raises(ValueError, match="n_bits must be two"):
                call(n_bits)
    with pytest.raises(ValueError, match="n_classes"):
        panoptic_decode(torch.rand(1, 2, 16), n_classes=0, n_instances=2)


def _merged(semantic, instance, n_instances, min_pixels):
    """By its definition, one instance after the other."""
    classes, owners = np.zeros_like(semantic), instance.copy()
    for i in range(n_instances):
        own = instance == i
        if own.sum() >= min_pixels and own.any():
            values, counts = np.unique(semantic[own], return_counts=True)
            classes[own] = values[counts.argmax()]  # unique is ascending, argmax takes the first
    owners[classes == 0] = 0
    return classes, owners


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_the_majority_names_each_instance(dtype):
    semantic, instance = _ids((3, 9, 11), 4).to(dtype), _ids((3, 9, 11), 6, seed=1).to(dtype)
    got = panoptic_merge(semantic, instance, n_instances=7, min_pixels=14, n_classes=5)
    for i in range(3):
        want = _merged(semantic[i].numpy(), instance[i].numpy(), 7, 14)
        alone = panoptic_merge(
            semantic[i].numpy(), instance[i].numpy(), n_instances=7, min_pixels=14, n_classes=5
        )
        for ours, single, theirs in zip(got, alone, want, strict=True):
            assert ours.dtype == dtype
            assert isinstance(single, np.ndarray)
            np.testing.assert_array_equal(ours[i].numpy(), theirs)
            np.testing.assert_array_equal(single, theirs)


def test_ties_take_the_smallest_class_and_small_instances_none():
    semantic = torch.tensor([[3, 2, 2, 3, 1, 1]])
    instance = torch.tensor([[1, 1, 1, 1, 2, 2]])
    got = panoptic_merge(semantic, instance, n_instances=3, min_pixels=3, n_classes=4)
    assert got[0].tolist() == [[2, 2, 2, 2, 0, 0]]
    assert got[1].tolist() == [[1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"semantic": torch.zeros(2, 3)}, TypeError, "semantic"),
        ({"instance": torch.zeros(3, 2, dtype=torch.int64)}, ValueError, "one shape"),
        ({"semantic": torch.full((2, 3), 9)}, ValueError, r"\[0, 5\), got min 9, max 9"),
        ({"instance": torch.full((2, 3), -1)}, ValueError, r"\[0, 4\), got min -1, max -1"),
        ({"n_instances": 0}, ValueError, "n_instances"),
        ({"min_pixels": 1.5}, TypeError, "min_pixels"),
    ],
)
def test_maps_that_cannot_be_merged_are_refused(change, error, match):
    maps = {"semantic": torch.zeros(2, 3, dtype=torch.int64)}
    maps["instance"] = maps["semantic"].clone()
    with pytest.raises(error, match=match):
        panoptic_merge(**{**maps, "n_instances": 4, "n_classes": 5, **change})


@pytest.mark.parametrize("dim", [-1, 1, 0])
def test_past_frames_are_encoded_in_the_order_of_their_offsets(dim):
    history = [_ids((2, 3, 4, 2), 8, seed=i).movedim(-1, dim) for i in range(3)]
    got = past_frames(history, (2, 3, 4), offsets=(-4, -1, -3), n_bits=(4, 3), scale=0.5, dim=dim)
    first, latest, oldest = got.split(7, dim)
    assert torch.equal(first, torch.full_like(first, -0.5))
    for part, ids in ((latest, history[2]), (oldest, history[0])):
        assert torch.equal(part, foveate.bits_encode(ids, (4, 3), scale=0.5, dim=dim))
    single = past_frames([history[0].select(dim, 0)], (2, 3, 4), n_bits=4, dim=dim)
    assert single.shape[dim] == 8
    assert torch.all(single.narrow(dim, 0, 4) == single.min())


def test_dropped_frames_read_as_id_0():
    history = [torch.full((64, 2, 2), 3)]
    options = {"offsets": (-1,), "n_bits": 2, "scale": 1.0}
    got = past_frames(
        history, (64, 2, 2), dropout=0.5, generator=torch.Generator().manual_seed(0), **options
    )
    per_sample = got.flatten(1).amax(1)
    assert torch.equal(per_sample, got.flatten(1).amin(1))  # a sample drops its whole frame
    assert 16 < int((per_sample < 0).sum()) < 48
    gone = past_frames(history, (64, 2, 2), dropout=1.0, **options)
    assert torch.equal(gone, -torch.ones_like(gone))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"offsets": (0,)}, ValueError, "offsets.*got 0"),
        ({"offsets": (-1, 2)}, ValueError, "offsets.*got 2"),
        ({"offsets": ()}, ValueError, "offsets"),
        ({"offsets": (-1.0,)}, TypeError, "offsets"),
        ({"history": [torch.zeros(2, 3, 5, 2, dtype=torch.int64)]}, ValueError, r"\(2, 3, 5, 2\)"),
        ({"history": [torch.zeros(2, 3, 4, dtype=torch.int64)]}, ValueError, "history"),
        ({"history": [torch.zeros(2, 3, 4, 2)]}, TypeError, "integer"),
        ({"history": [torch.full((2, 3, 4, 2), 256)]}, ValueError, r"\[0, 256\)"),
        ({"dropout": 1.5}, ValueError, "dropout"),
        ({"n_bits": 64}, ValueError, "n_bits"),
    ],
)
def test_past_frames_that_do_not_fit_are_refused(change, error, match):
    given = {"history": [torch.zeros(2, 3, 4, 2, dtype=torch.int64)], "shape": (2, 3, 4)}
    with pytest.raises(error, match=match):
        past_frames(**{**given, **change})


def _posterior_mean(words, scale):
    """E[x0 | x_t] for data that is one of a few code words `[k, n]` at every pixel."""

    def denoise(x, gamma):  # x [b, n, *], gamma [b]
        codes = scale * (2.0 * words - 1)  # [k, n]
        level = gamma.double().view(-1, *(1,) * (x.ndim - 1))
        pixels = x.double().movedim(1, -1).unsqueeze(-2)  # [b, *, 1, n]
        level = level.movedim(1, -1).unsqueeze(-2)
        distance = (pixels - level.sqrt() * codes).square().sum(-1)  # [b, *, k]
        share = (-distance / (2 * (1 - level[..., 0]))).softmax(-1)
        return (share @ codes.double()).movedim(-1, 1).float()

    return denoise


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
@pytest.mark.parametrize("td", [0.0, 1.0])
def test_the_exact_posterior_mean_leads_to_code_words(method, td):
    words = torch.tensor([[0, 0, 1, 0, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 1]]).double()
    bits = sample(
        _posterior_mean(words, 0.5), (4, 5, 6, 3), iterations=30, method=method, td=td,
        scale=0.5, schedule="cosine", seed=3,
    )  # fmt: skip
    ids = foveate.bits_decode(bits, dim=1)
    codes = foveate.bits_decode(words.float() - 0.5)
    assert torch.isin(ids, codes).all()
    assert len(ids.unique()) == 3
    assert (bits.abs() - 0.5).abs().max() < 1e-3


def test_layouts_draw_the_same_sample():
    words = torch.tensor([[0, 0, 1], [1, 1, 0]]).double()
    first = _posterior_mean(words, 1.0)
    got = sample(first, (2, 3, 7), iterations=5, method="ddpm", seed=1)
    last = sample(
        lambda x, c: first(x.movedim(-1, 1), c).movedim(1, -1), (2, 7, 3), iterations=5,
        method="ddpm", seed=1, dim=-1,
    )  # fmt: skip
    assert torch.equal(got, last.movedim(-1, 1))


class _Recorder:
    def __init__(self, answer):
        self.calls, self.answer = [], answer

    def __call__(self, *inputs):
        self.calls.append(tuple(value.clone() for value in inputs))
        return self.answer(*inputs)


@pytest.mark.parametrize("self_cond", ["none", "argument", "concat"])
def test_the_denoiser_sees_noise_condition_and_estimate(self_cond):
    answers = [torch.full((2, 3, 4), v) for v in (0.25, -2.0, 0.5)]
    remaining = iter(answers)
    recorder = _Recorder(lambda *_: next(remaining))
    seen = []
    got = sample(
        recorder, (2, 3, 4), iterations=3, condition="time", self_cond=self_cond,
        self_cond_decay=0.5, seed=9, callback=lambda s, x, x0: seen.append((s, x, x0)),
    )  # fmt: skip
    assert [s for s, _, _ in seen] == [0, 1, 2]
    states = [foveate.bits_noise((2, 3, 4), 9, dim=1), seen[0][1], seen[1][1]]
    clipped = [value.clamp(-1, 1) for value in answers]
    estimates = [torch.zeros(2, 3, 4), 0.5 * clipped[0], 0.25 * clipped[0] + 0.5 * clipped[1]]
    for call, state, estimate, t in zip(
        recorder.calls, states, estimates, (1.0, 2 / 3, 1 / 3), strict=True
    ):
        want = torch.cat([state, estimate], 1) if self_cond == "concat" else state
        assert torch.equal(call[0], want)
        assert call[1].dtype == torch.float32
        torch.testing.assert_close(call[1], torch.full((2,), t), rtol=1e-7, atol=0)
        assert len(call) == (3 if self_cond == "argument" else 2)
        if self_cond == "argument":
            assert torch.equal(call[2], estimate)
    assert torch.equal(got, clipped[2])
    assert torch.equal(seen[2][2], got)


@pytest.mark.parametrize("condition", ["gamma", "log_snr"])
@pytest.mark.parametrize("schedule", ["cosine", "logsnr_linear"])
def test_conditions_come_from_float64_times(condition, schedule):
    recorder = _Recorder(lambda x, cond: 0 * x)
    sample(recorder, (2, 3), iterations=4, condition=condition, schedule=schedule, seed=0)
    times = torch.tensor([t for t, _ in time_pairs(4)], dtype=torch.float64)
    curve = gamma_schedule if condition == "gamma" else log_snr_schedule
    for call, level in zip(recorder.calls, curve(times, schedule).float(), strict=True):
        assert torch.equal(call[1], level.expand(2))


def test_inputs_are_normalised_in_the_stated_ways():
    for name, scale in (("std", 1.0), ("variance", 0.1)):
        recorder = _Recorder(lambda x, cond: torch.full_like(x, 0.05))
        states = []
        sample(
            recorder, (2, 3, 5), iterations=3, normalize_input=name, scale=scale, seed=0,
            callback=lambda s, x, x0, states=states: states.append(x),
        )  # fmt: skip
        x, t = states[0].double(), torch.tensor(2 / 3, dtype=torch.float64)
        if name == "std":
            want = x / x.flatten(1).std(1, correction=0).view(2, 1, 1)
        else:
            want = x / ((scale**2 - 1) * gamma_schedule(t) + 1).sqrt()
        torch.testing.assert_close(recorder.calls[1][0].double(), want, rtol=1e-6, atol=1e-6)


def test_ddpm_draws_each_step_at_its_own_offset_and_the_last_for_x_alone():
    states = []
    options = {"iterations": 3, "method": "ddpm", "seed": 4, "schedule": "sigmoid@-3,3,1"}

    def answer(x, cond):
        return 0.3 * x

    x0 = sample(answer, (2, 3, 4), callback=lambda s, x, x0: states.append(x), **options)
    x = foveate.bits_noise((2, 3, 4), 4, dim=1)
    times = time_pairs(3)
    for step, (t, t_prev) in enumerate(times):
        g, g_prev = (float(gamma_schedule(u, "sigmoid@-3,3,1")) for u in (t, t_prev))
        last = step == 2
        noisy, estimate = foveate.ddpm_step(
            x,
            answer(x, None),
            g,
            g_prev,
            variance="large",
            seed=4,
            offset=step + 1,
            dim=1,
            clip=1.0,
        )
        silent, _ = foveate.ddpm_step(x, answer(x, None), g, g_prev, variance="zero", clip=1.0)
        x = noisy
        assert torch.equal(states[step], silent if last else noisy)
    assert torch.equal(x0, estimate)
    assert torch.equal(sample(answer, (2, 3, 4), final="x", **options), noisy)


def test_guidance_mixes_the_unconditional_prediction():
    got = sample(
        lambda x, c: 0.2 * x, (1, 3, 4), iterations=1, guidance=2.0, uncond=lambda x, c: -0.1 * x,
        clip=None, seed=0,
    )  # fmt: skip
    x = foveate.bits_noise((1, 3, 4), 0, dim=1)
    torch.testing.assert_close(got, 3 * 0.2 * x + 2 * 0.1 * x)


def test_seeds_and_generators_reproduce():
    def draw(**source):
        return sample(lambda x, c: 0.5 * x, (2, 3), iterations=2, method="ddpm", **source)

    assert torch.equal(draw(seed=5), draw(seed=torch.tensor([5])))
    assert not torch.equal(draw(seed=5), draw(seed=6))
    generator = torch.Generator().manual_seed(1)
    a, b = draw(generator=generator), draw(generator=generator)
    assert not torch.equal(a, b)
    assert torch.equal(a, draw(generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(2)
    a = draw()
    torch.manual_seed(2)
    assert torch.equal(a, draw())
    assert draw(seed=1).dtype == torch.float32
    assert sample(lambda x, c: x, (0, 3), iterations=2, seed=1).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "euler"}, "method must be one of 'ddim', 'ddpm', got 'euler'"),
        ({"condition": "snr"}, "condition must be one of"),
        ({"pred_type": "softmax"}, "pred_type must be one of"),
        ({"self_cond": True}, "self_cond must be one of"),
        ({"variance": "huge"}, "variance must be one of"),
        ({"normalize_input": "mean"}, "normalize_input must be one of"),
        ({"final": "eps"}, "final must be one of"),
        ({"clip": "none"}, "clip must be"),
        ({"clip": -1.0}, "clip must be"),
        ({"guidance": 1.0}, "needs uncond"),
        ({"dim": 0}, "dim must not be 0"),
        ({"dim": 3}, "dim must be in"),
        ({"td": -1.0}, "td"),
        ({"iterations": 0}, "iterations"),
        ({"self_cond_decay": 2.0}, "self_cond_decay"),
        ({"seed": -1}, "seed"),
        ({"seed": 1, "generator": torch.Generator()}, "exclude each other"),
        ({"denoise": lambda x, c: x[:, :2]}, "pred must have x_t's shape"),
    ],
)
def test_arguments_that_make_no_sampler_are_refused(change, match):
    given = {"denoise": lambda x, c: x, "shape": (2, 3, 4), "iterations": 2}
    with pytest.raises(ValueError, match=match):
        sample(**{**given, **change})
