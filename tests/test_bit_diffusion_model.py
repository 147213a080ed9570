"""The module that trains a denoiser on analog bits and draws ids from it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import foveate
from foveate.methods.bit_diffusion import (
    BitDiffusion,
    gamma_schedule,
    log_snr_schedule,
    past_frames,
)


def _ids(shape, high, seed=0):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


class _Recorder(nn.Module):
    """Answers with a fixed multiple of its input and keeps what it was given."""

    def __init__(self, channels, dim=1, factor=0.5):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.channels, self.dim, self.calls = channels, dim, []

    def forward(self, x, cond, *estimate, **kwargs):
        self.calls.append((x.clone(), cond.clone(), *(e.clone() for e in estimate), kwargs))
        narrow = x.narrow(self.dim, 0, self.channels)
        return self.factor * narrow


@pytest.mark.parametrize("objective", ["x", "eps", "v", "sigmoid"])
@pytest.mark.parametrize(("order", "dim"), [("lsb", 1), ("msb", -1)])
def test_the_loss_is_that_of_the_noisy_bits_at_the_times(objective, order, dim):
    x = _ids((3, 4, 5), 16)
    times = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    noise = torch.randn(*((3, 4, 4, 5) if dim == 1 else (3, 4, 5, 4)))
    weight = torch.rand(3, 4, 5)
    model = BitDiffusion(
        _Recorder(4, dim), 4, scale=0.5, bit_order=order, dim=dim, objective=objective
    )
    got = model(x, weight=weight, times=times, noise=noise)
    gamma = gamma_schedule(times)
    bits = foveate.bits_encode(x, 4, scale=0.5, bit_order=order, dim=dim, dtype=torch.float64)
    level = gamma.view(3, 1, 1, 1)
    x_t = level.sqrt() * bits + (1 - level).sqrt() * noise
    seen, cond, kwargs = model.denoiser.calls[0]
    torch.testing.assert_close(seen.double(), x_t, rtol=1e-6, atol=1e-6)
    assert torch.equal(cond, gamma.float())
    assert kwargs == {}
    pred = 0.5 * x_t
    v = level.sqrt() * noise - (1 - level).sqrt() * bits
    z = torch.where(bits > 0, pred, -pred)
    terms = {
        "x": (pred - bits) ** 2, "eps": (pred - noise) ** 2, "v": (pred - v) ** 2,
        "sigmoid": F.softplus(-z),
    }[objective]  # fmt: skip
    want = (terms * weight.double().unsqueeze(dim)).mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)
    got.backward()
    assert model.denoiser.factor.grad is not None


@pytest.mark.parametrize("shape", [(3, 16, 5), (3, 2, 8, 5)])
def test_the_softmax_objective_is_the_cross_entropy_of_groups(shape):
    x = _ids((3, 2, 5), 8)
    logits = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
    model = BitDiffusion(lambda x, cond: logits, (3, 3), objective="softmax")
    got = model(x, seed=1)
    want = F.cross_entropy(logits.reshape(3, 2, 8, 5).movedim(2, 1), x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    sure = 40 * F.one_hot(x, 8).movedim(-1, 2).float().reshape(shape)
    model = BitDiffusion(lambda x, cond: sure, (3, 3), objective="softmax")
    assert torch.equal(model.sample((3, 5), iterations=2, seed=0), x)


def test_a_seed_keys_noise_and_times_and_times_are_uniform():
    x = torch.zeros(4000, 1, dtype=torch.int64)
    model = BitDiffusion(_Recorder(2), 2, condition="time")
    a, b = model(x, seed=7), model(x, seed=torch.tensor([7]))
    assert torch.equal(a, b)
    times = model.denoiser.calls[0][1].sort().values
    grid = torch.arange(1, 4001) / 4000
    assert (times - grid).abs().max() < 1.63 / 4000**0.5  # Kolmogorov-Smirnov at 1 %
    assert not torch.equal(model(x, seed=8), a)
    first = model(x, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, model(x, generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    assert torch.equal(first, model(x))
    x_t = foveate.bits_q_sample(x, 2, gamma_schedule(torch.full((4000,), 0.5)), seed=7, dim=1)
    model(x, seed=7, times=torch.full((4000,), 0.5))
    torch.testing.assert_close(model.denoiser.calls[-1][0], x_t, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", ["x", "eps", "v", "sigmoid", "softmax"])
def test_the_first_half_of_a_batch_trains_with_an_estimate(objective):
    x = _ids((5, 6), 2)
    recorder = _Recorder(1, factor=3.0)
    network = recorder if objective != "softmax" else lambda *a, **k: torch.cat(
        [torch.zeros(len(a[0]), 1, 6), recorder(*a, **k)], 1
    )  # fmt: skip
    model = BitDiffusion(
        network, 1, scale=0.5, objective=objective, self_cond="argument", self_cond_rate=0.5
    )
    extra = torch.arange(5.0)
    times = torch.full((5,), 0.4, dtype=torch.float64)
    model(x, seed=0, times=times, extra=extra, other="name", table=torch.zeros(4))
    first, second = recorder.calls
    assert len(first[0]) == 2
    assert len(second[0]) == 5
    assert torch.equal(first[2], torch.zeros(2, 1, 6))
    assert torch.equal(first[3]["extra"], extra[:2])
    assert torch.equal(second[3]["extra"], extra)
    assert first[3]["other"] == "name"
    assert len(first[3]["table"]) == 4
    assert torch.equal(second[2][2:], torch.zeros(3, 1, 6))
    x_t, g = first[0].double(), gamma_schedule(0.4).item()
    f = 3.0 * x_t
    want = {
        "x": f,
        "eps": (x_t - (1 - g) ** 0.5 * f) / g**0.5,
        "v": g**0.5 * x_t - (1 - g) ** 0.5 * f,
        "sigmoid": 0.5 * (2 * f.sigmoid() - 1),
        "softmax": 0.5 * (2 * f.sigmoid() - 1),
    }[objective].clamp(-0.5, 0.5)
    torch.testing.assert_close(second[2][:2].double(), want, rtol=1e-5, atol=1e-6)
    assert not second[2].requires_grad


def test_a_coin_gives_all_or_none_an_estimate():
    x = _ids((3, 6), 4)
    model = BitDiffusion(_Recorder(2, factor=3.0), 2, self_cond="concat", self_cond_by="coin")
    passes = []
    for seed in range(40):
        model.denoiser.calls.clear()
        model(x, seed=seed)
        passes.append(len(model.denoiser.calls))
        estimate = model.denoiser.calls[-1][0][:, 2:]
        assert bool((estimate != 0).flatten(1).any(1).all()) == (passes[-1] == 2)
        assert len(model.denoiser.calls[0][0]) == 3
    assert set(passes) == {1, 2}
    assert 8 < passes.count(2) < 32
    never = BitDiffusion(_Recorder(2), 2, self_cond="concat", self_cond_by="coin", self_cond_rate=0)
    never(x, seed=0)
    assert len(never.denoiser.calls) == 1


def test_conditions_and_normalised_inputs_reach_the_denoiser():
    x, times = _ids((2, 6), 4), torch.tensor([0.3, 0.6], dtype=torch.float64)
    for condition, want in (
        ("gamma", gamma_schedule(times)), ("log_snr", log_snr_schedule(times)), ("time", times)
    ):  # fmt: skip
        model = BitDiffusion(_Recorder(2), 2, condition=condition)
        model(x, times=times, seed=0)
        assert torch.equal(model.denoiser.calls[0][1], want.float())
    x_t = foveate.bits_q_sample(x, 2, gamma_schedule(times), scale=0.1, seed=0, dim=1).double()
    spreads = {
        "std": x_t.flatten(1).std(1, correction=0),
        "variance": ((0.01 - 1) * gamma_schedule(times) + 1).sqrt(),
    }
    for name, spread in spreads.items():
        model = BitDiffusion(_Recorder(2), 2, scale=0.1, normalize_input=name)
        model(x, times=times, seed=0)
        got = model.denoiser.calls[0][0].double()
        torch.testing.assert_close(got, x_t / spread.view(2, 1, 1), rtol=1e-6, atol=1e-6)


def test_samples_are_ids_within_their_limits():
    model = BitDiffusion(_Recorder(7, factor=1.0), (4, 3), scale=0.5)
    ids, bits = model.sample(
        (2, 5), iterations=3, method="ddpm", seed=3, return_bits=True, max_value=(9, 5)
    )
    assert ids.shape == (2, 2, 5)
    assert bits.shape == (2, 7, 5)
    assert ids.dtype == torch.int64
    whole = foveate.bits_decode(bits, n_bits=(4, 3), dim=1)
    assert torch.equal(ids, torch.minimum(whole, torch.tensor([9, 5]).view(1, 2, 1)))
    assert model.sample((2, 5), iterations=1, dtype=torch.uint8).dtype == torch.uint8
    seen = []
    model.sample((2, 5), iterations=2, schedule="linear", callback=lambda *a: seen.append(a))
    assert len(seen) == 2
    assert model.denoiser.calls[-1][1][0] == 0.5
    assert not ids.requires_grad


@pytest.mark.parametrize(("order", "n_bits", "dim"), [("lsb", (3, 2), 1), ("msb", 3, -1)])
def test_a_video_conditions_each_frame_on_the_decoded_ones(order, n_bits, dim):
    model = BitDiffusion(
        _Recorder(5 if dim == 1 else 3, dim, 1.0), n_bits, scale=0.5, bit_order=order, dim=dim
    )
    frames = [{"label": f} for f in range(3)]
    got = model.sample_video(
        frames, (2, 4), iterations=3, iterations_rest=2, offsets=(-2, -1), max_value=2, seed=11
    )
    assert got.shape == ((2, 3, 2, 4) if dim == 1 else (2, 3, 4))
    assert got.max() <= 2
    calls = model.denoiser.calls
    assert [call[-1]["label"] for call in calls] == [0, 0, 0, 1, 1, 2, 2]
    history = list(got.unbind(1))
    channels = 5 if dim == 1 else 3
    for frame, call in ((0, calls[0]), (1, calls[3]), (2, calls[6])):
        past = call[-1]["cond_map"]
        for i, offset in enumerate((-2, -1)):
            part = past.narrow(dim, i * channels, channels)
            if frame + offset < 0:
                assert torch.equal(part, torch.full_like(part, -0.5))
            else:
                want = foveate.bits_encode(
                    history[frame + offset], n_bits, scale=0.5, bit_order=order, dim=dim
                )
                assert torch.equal(part, want)
        if order == "lsb":
            same = past_frames(history[:frame], (2, 4), n_bits=n_bits, scale=0.5, dim=dim)
            assert torch.equal(past, same)
    alone = model.sample((2, 4), iterations=3, max_value=2, seed=11, cond_map=None)
    assert torch.equal(got[:, 0], alone)
    again = model.sample_video(
        frames, (2, 4), iterations=3, iterations_rest=2, max_value=2, seed=torch.tensor([11])
    )
    assert torch.equal(got, again)
    with pytest.raises(ValueError, match="frames must not hold 'cond_map'"):
        model.sample_video([{"cond_map": None}], (2, 4))
    with pytest.raises(ValueError, match="offsets"):
        model.sample_video(frames, (2, 4), offsets=(0,))
    with pytest.raises(ValueError, match="at least one frame"):
        model.sample_video([], (2, 4))


def test_the_state_is_the_denoisers():
    inner = nn.Conv1d(2, 2, 1)
    model = BitDiffusion(inner, 2)
    assert set(model.state_dict()) == {"denoiser.weight", "denoiser.bias"}
    assert model.denoiser is inner
    other = BitDiffusion(nn.Conv1d(2, 2, 1), 2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.denoiser.weight, inner.weight)


class _Small(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2 * channels + 1, 24, 3, padding=1), nn.SiLU(), nn.Conv2d(24, out, 1)
        )

    def forward(self, x, cond):
        level = cond.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
        return self.net(torch.cat([x, level], 1))


@pytest.mark.parametrize(("objective", "out"), [("x", 4), ("softmax", 16)])
def test_the_loss_falls_on_digits(objective, out):
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    stroke = torch.from_numpy(digits.images[:256] > 7).long()
    ids = stroke * (torch.from_numpy(digits.target[:256]).view(-1, 1, 1) + 1)
    torch.manual_seed(0)
    model = BitDiffusion(_Small(4, out), 4, objective=objective, self_cond="concat")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        batch = ids[(step % 8) * 32 :][:32]
        loss = model(batch, seed=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"objective": "score"}, ValueError, "objective must be one of 'x'.*got 'score'"),
        ({"condition": "snr"}, ValueError, "condition"),
        ({"self_cond": "both"}, ValueError, "self_cond must"),
        ({"self_cond_by": "dice"}, ValueError, "self_cond_by"),
        ({"self_cond_rate": 1.5}, ValueError, "self_cond_rate"),
        ({"normalize_input": True}, ValueError, "normalize_input"),
        ({"bit_order": "le"}, ValueError, "bit_order"),
        ({"dim": 0}, ValueError, "dim must not be 0"),
        ({"dim": 1.0}, TypeError, "dim"),
        ({"n_bits": 2.0}, TypeError, "n_bits"),
        ({"n_bits": 64}, ValueError, "n_bits must be in 1..63"),
        ({"denoiser": 3}, TypeError, "denoiser must be callable"),
        ({"objective": "softmax", "n_bits": (3, 2)}, ValueError, "groups"),
        ({"objective": "softmax", "n_bits": 6, "groups": 4}, ValueError, "groups=4.*N=6"),
        ({"objective": "softmax", "n_bits": 17}, ValueError, "at most 16 bits"),
    ],
)
def test_modules_that_make_no_diffusion_are_refused(change, error, match):
    with pytest.raises(error, match=match):
        BitDiffusion(**{"denoiser": nn.Identity(), "n_bits": 4, **change})


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.rand(2, 6)}, TypeError, "integer ids"),
        ({"x": torch.full((2, 6), 4)}, ValueError, r"\[0, 4\), got min 4, max 4"),
        ({"times": torch.rand(3)}, ValueError, r"times must be \[b\] = \(2,\)"),
        ({"times": torch.tensor([0, 1])}, TypeError, "times"),
        ({"times": torch.tensor([0.5, 1.5])}, ValueError, r"times must be in \[0, 1\]"),
        ({"times": torch.tensor([0.5, float("nan")])}, ValueError, "times"),
        ({"noise": torch.zeros(2, 3, 6)}, ValueError, "noise must have shape"),
        ({"noise": torch.zeros(2, 2, 6), "seed": 1}, ValueError, "exclude each other"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "exclude each other"),
        ({"seed": -1}, ValueError, "seed"),
        ({"weight": torch.ones(3, 6)}, ValueError, "weight"),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, error, match):
    model = BitDiffusion(_Recorder(2), 2)
    with pytest.raises(error, match=match):
        model(**{"x": torch.zeros(2, 6, dtype=torch.int64), **change})
