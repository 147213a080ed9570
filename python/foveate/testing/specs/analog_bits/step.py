"""ddim_step, ddpm_step and instance_weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import foveate
from foveate.testing import inputs
from foveate.testing.spec import BadInput, Bench, Call, Cases, Cost, OpSpec
from foveate.testing.specs.analog_bits.codec import bad

_KINDS = ("x", "eps", "v", "sigmoid")


def _step_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    shape = case["shape"]

    def normal(kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind).to(device)

    level: Any = case.get(
        "gamma", torch.rand(shape[0], generator=generator).to(device) * 0.9 + 0.05
    )
    kwargs: dict[str, Any] = {
        "pred_type": case.get("pred_type", "x"),
        "clip": case.get("clip"),
        "scale": case.get("scale", 1.0),
        "return_x0": case.get("return_x0", True),
    }
    pred = normal(case.get("pred_dtype", dtype))
    if case.get("guidance"):
        kwargs |= {"guidance": case["guidance"], "pred_uncond": normal(pred.dtype)}
    above = 1 - (1 - level) * (1 - case.get("share", 0.3))
    return Call((normal(), pred, level, above), kwargs)


def _ancestral_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    call = _step_inputs(case, dtype, device, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    variance: Any = case.get("variance", "large")
    if variance == "learned":
        variance = torch.rand(case["shape"], generator=generator, dtype=torch.float64) * 2 - 1
        variance = variance.to(dtype).to(device)
    call.kwargs["variance"] = variance
    call.kwargs["dim"] = case.get("dim", -1)
    if case.get("noise"):
        noise = torch.randn(case["shape"], generator=generator, dtype=torch.float64)
        call.kwargs["noise"] = noise.to(dtype).to(device)
    else:
        call.kwargs.update(seed=5 * seed + 1, offset=2)
    return call


def _draw_step(integers: Callable[[int, int], int]) -> dict[str, Any]:
    kind = _KINDS[integers(0, 3)]
    return {
        "shape": tuple(integers(0 if i else 1, 9) for i in range(integers(1, 4))),
        "pred_type": kind,
        "clip": (None, 1.0, 0.1)[integers(0, 2)],
        "guidance": (0.0, 2.0)[integers(0, 1)],
        "return_x0": bool(integers(0, 1)),
        "variance": ("large", "small", "zero", "learned")[integers(0, 3)],
        "noise": bool(integers(0, 1)),
    }


_CASES: dict[str, dict[str, Any]] = {
    "empty": {"shape": (2, 0)},
    "one": {"shape": (1,)},
    "x, clipped": {"shape": (2, 5, 7), "clip": 1.0, "variance": "small"},
    "eps": {"shape": (3, 37), "pred_type": "eps", "clip": 1.0, "variance": "learned"},
    "eps, weak signal": {"shape": (2, 40), "pred_type": "eps", "gamma": 1e-6, "clip": 1.0},
    "v": {"shape": (2, 3, 4, 5), "pred_type": "v", "dim": 1, "noise": True},
    "sigmoid": {"shape": (2, 65), "pred_type": "sigmoid", "scale": 0.1, "variance": "zero"},
    "guided, half prediction": {
        "shape": (2, 33),
        "guidance": 3.0,
        "clip": 1.0,
        "pred_dtype": torch.bfloat16,
    },
    "last step": {"shape": (2, 19), "share": 1.0, "variance": "learned"},
    "a block + 1": {"shape": (1, 4097), "clip": 1.0, "return_x0": False},
}


def _original_ddim(
    x_t: torch.Tensor, pred: torch.Tensor, gamma: torch.Tensor, gamma_prev: torch.Tensor,
    *, clip: float, **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The published chain: clip, noise from the clipped x0, then both terms."""
    g, h = gamma.view(-1, 1, 1, 1), gamma_prev.view(-1, 1, 1, 1)
    x0 = pred.clamp(-clip, clip)
    noise = (x_t - g.sqrt() * x0) / (1 - g).sqrt()
    return h.sqrt() * x0 + (1 - h).sqrt() * noise, x0


def _addcmul_ddim(
    x_t: torch.Tensor, pred: torch.Tensor, gamma: torch.Tensor, gamma_prev: torch.Tensor,
    *, clip: float, **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The strongest plain form: clamp, one product, one addcmul with coefficients at hand."""
    g, h = gamma.view(-1, 1, 1, 1), gamma_prev.view(-1, 1, 1, 1)
    keep = (1 - h).sqrt() / (1 - g).sqrt()
    x0 = pred.clamp(-clip, clip)
    return torch.addcmul(x_t * keep, x0, h.sqrt() - keep * g.sqrt()), x0


def _noisy_maps(batch: int, size: int) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        ids = inputs.panoptic_maps(batch, size)
        gamma = torch.linspace(0.1, 0.8, batch)
        x_t = foveate.bits_q_sample(ids, (8, 8), gamma, scale=0.1, seed=1)
        pred = x_t + 0.05 * foveate.bits_noise(x_t.shape, 2)
        return Call(
            tuple(value.to(device) for value in (x_t, pred, gamma, gamma + 0.1)), {"clip": 0.1}
        )

    return make


def _step_cost(call: Call) -> Cost:
    x_t, pred = call.args[0], call.args[1]
    outputs = 2 if call.kwargs.get("return_x0", True) else 1
    moved = x_t.numel() * ((1 + outputs) * x_t.element_size() + pred.element_size())
    return Cost(6 * x_t.numel(), moved)


def _weights_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    del dtype  # the ids are integers, the weights float32
    n_ids = case.get("n_ids", 7)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, n_ids, case["shape"], generator=generator)
    ids = ids.to(case.get("ids", torch.int32)).to(device)
    return Call((ids, n_ids), {"power": case.get("power", 1.0), "check": case.get("check")})


def _draw_weights(integers: Callable[[int, int], int]) -> dict[str, Any]:
    return {
        "shape": tuple(integers(0, 9) for _ in range(integers(2, 4))),
        "n_ids": integers(1, 30),
        "ids": (torch.uint8, torch.int16, torch.int32, torch.int64)[integers(0, 3)],
        "power": (0.0, 0.2, 1.0, 2.0)[integers(0, 3)],
    }


def _one_hot_weights(ids: torch.Tensor, n_ids: int, **_: Any) -> torch.Tensor:
    """The published chain: a one-hot tensor summed over pixels."""
    one_hot = F.one_hot(ids.long(), n_ids).float()
    u = 1.0 / (one_hot.sum((1, 2), keepdim=True) + 1)
    weight = (one_hot * u).sum(-1)
    return weight / weight.mean((1, 2), keepdim=True)


def _bincount_weights(ids: torch.Tensor, n_ids: int, **_: Any) -> torch.Tensor:
    """The strongest plain form: bincount and a gather for each sample."""
    rows = []
    for sample in ids:
        flat = sample.flatten()
        u = 1.0 / (torch.bincount(flat, minlength=n_ids).float() + 1)
        weight = u[flat]
        rows.append((weight / weight.mean()).view(sample.shape))
    return torch.stack(rows)


def _instances(device: str) -> Call:
    return Call((inputs.panoptic_maps(2, 512)[..., 1].to(device), 101))


def _weights_cost(call: Call) -> Cost:
    ids = call.args[0]
    return Cost(2 * ids.numel(), ids.numel() * (2 * ids.element_size() + 4))


_X = torch.zeros(2, 3)


def _s(id: str, error: type[Exception], match: str, x_t: torch.Tensor = _X, pred: Any = _X,
       gamma: Any = 0.5, gamma_prev: Any = 0.7, **kwargs: Any) -> BadInput:  # fmt: skip
    return bad(id, error, match, x_t, pred, gamma, gamma_prev, **kwargs)


_SHARED_BAD = (
    _s("x_t half", TypeError, "x_t must be float32 or float64, got torch.float16", _X.half()),
    _s("x_t int", TypeError, "x_t must be float32 or float64", _X.int()),
    _s("pred int", TypeError, "pred must be float16", pred=_X.int()),
    _s("pred shape", ValueError, r"pred must have x_t's shape \(2, 3\), got \(3, 2\)", pred=_X.T),
    _s("gamma 1", ValueError, "gamma must be below 1", gamma=1.0),
    _s("gamma 1 in batch", ValueError, "gamma must be below 1", gamma=torch.tensor([0.5, 1.0])),
    _s("eps at 0", ValueError, "gamma must be above 0", gamma=0.0, pred_type="eps"),
    _s("gamma", ValueError, r"gamma must be in \[0, 1\], got -0.5", gamma=-0.5),
    _s("gamma_prev", ValueError, r"gamma_prev must be in \[0, 1\], got 1.5", gamma_prev=1.5),
    _s("gamma shape", ValueError, r"gamma must be a float or \[b\]", gamma=torch.ones(3) / 2),
    _s("gamma grad", ValueError, "gamma gets no gradient",
       gamma=torch.tensor([0.5, 0.5], requires_grad=True)),
    _s("pred_type", ValueError, "pred_type must be one of", pred_type="x0"),
    _s("guidance", ValueError, "guidance=2.0 needs pred_uncond", guidance=2.0),
    _s("uncond", ValueError, "pred_uncond must have x_t's shape", pred_uncond=torch.zeros(3)),
    _s("clip", ValueError, "clip must be at least 0", clip=-1.0),
    _s("one out", ValueError, r"out must be \(x_prev, x0\), got 1 tensors", out=_X.clone()),
    _s("out shape", ValueError, r"out\[1\] must have x_t's shape", out=(_X, torch.zeros(2))),
    _s("out dtype", TypeError, r"out\[0\] must have x_t's dtype", out=(_X.double(), _X)),
)  # fmt: skip

SPECS = (
    OpSpec(
        name="ddim_step",
        api=foveate.ddim_step,
        backends=("triton", "cpu"),
        dtypes=(torch.float32, torch.float64),
        make_inputs=_step_inputs,
        cases=Cases(_CASES, _draw_step),
        bench=(
            Bench(
                "Pix2Seq-D maps, b=2",
                _noisy_maps(2, 512),
                {"original chain": _original_ddim, "clamp, addcmul": _addcmul_ddim},
                quick=True,
            ),
        ),
        cost=_step_cost,
        bad_inputs=_SHARED_BAD,
    ),
    OpSpec(
        name="ddpm_step",
        api=foveate.ddpm_step,
        backends=("triton", "cpu"),
        dtypes=(torch.float32, torch.float64),
        make_inputs=_ancestral_inputs,
        cases=Cases(
            # A block of pixels: one of channels would take half a minute under emulation.
            _CASES | {"a block + 1": {"shape": (1, 4097), "clip": 1.0, "dim": 0}}, _draw_step
        ),
        bench=(),
        cost=_step_cost,
        bad_inputs=(
            *_SHARED_BAD,
            _s("variance", ValueError, "variance must be one of", variance="huge"),
            _s("no variance", ValueError, "variance must be one of", variance=None),
            _s("variance int", TypeError, "variance must be a name or a floating tensor",
               variance=_X.int()),
            _s("variance shape", ValueError, "variance must have x_t's shape",
               variance=torch.zeros(2)),
            _s("noise shape", ValueError, "noise must have shape", noise=torch.zeros(2)),
            _s("noise int", TypeError, "noise must be floating", noise=_X.int()),
            _s("two sources", ValueError, "exclude each other", noise=_X, seed=1),
            _s("seed", ValueError, "seed must be in 0", seed=-1),
            _s("offset", ValueError, "offset must be in 0", seed=1, offset=2**32),
            _s("dim", ValueError, r"dim must be in -2\.\.1", dim=2),
        ),
    ),
    OpSpec(
        name="instance_weights",
        api=foveate.instance_weights,
        backends=("triton", "cpu"),
        dtypes=(torch.float32,),
        make_inputs=_weights_inputs,
        cases=Cases(
            {
                "empty": {"shape": (2, 0)},
                "one": {"shape": (1, 1)},
                "map": {"shape": (2, 13, 11)},
                "some power": {"shape": (3, 50), "power": 0.2, "ids": torch.int64},
                "no power": {"shape": (2, 9, 3), "power": 0.0, "ids": torch.uint8},
                "many ids": {"shape": (2, 65), "n_ids": 300, "ids": torch.int16},
                "two ids": {"shape": (2, 20), "n_ids": 2, "ids": torch.bool},
            },
            _draw_weights,
        ),
        bench=(
            Bench(
                "2 maps of 512 x 512, 101 ids",
                _instances,
                {"one-hot": _one_hot_weights, "bincount, gather": _bincount_weights},
                quick=True,
            ),
        ),
        cost=_weights_cost,
        bad_inputs=(
            bad("float ids", TypeError, "expected integer ids", torch.zeros(2, 3), 4),
            bad("one axis", ValueError, r"ids must be \[b, \*\]", torch.zeros(3).int(), 4),
            bad("id", ValueError, r"ids must be in \[0, 4\), got min -1, max 9",
                torch.tensor([[-1, 9]]), 4),
            bad("power", ValueError, "power must be at least 0, got -1.0",
                torch.zeros(2, 3).int(), 4, power=-1.0),
            bad("n_ids", ValueError, "n_ids must be at least 1", torch.zeros(2, 3).int(), 0),
            bad("check", ValueError, "check must be one of", torch.zeros(2, 3).int(), 4, check=1),
        ),
    ),
)  # fmt: skip
