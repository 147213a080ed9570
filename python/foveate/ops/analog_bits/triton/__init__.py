"""analog_bits on CUDA tensors."""

from typing import Any

from foveate.ops.analog_bits.triton.codec import bits_decode, bits_encode
from foveate.ops.analog_bits.triton.expectation import (
    bits_softmax_expectation_bwd,
    bits_softmax_expectation_fwd,
)
from foveate.ops.analog_bits.triton.loss import bits_loss_bwd, bits_loss_fwd
from foveate.ops.analog_bits.triton.noise import bits_noise, bits_q_sample
from foveate.ops.analog_bits.triton.softmax import bits_softmax_loss_bwd, bits_softmax_loss_fwd
from foveate.ops.analog_bits.triton.step import bits_step
from foveate.ops.analog_bits.triton.sums import bits_scale_slope
from foveate.ops.analog_bits.triton.weights import instance_weights

__all__ = [
    "bits_decode",
    "bits_encode",
    "bits_loss_bwd",
    "bits_loss_fwd",
    "bits_noise",
    "bits_q_sample",
    "bits_scale_slope",
    "bits_softmax_expectation_bwd",
    "bits_softmax_expectation_fwd",
    "bits_softmax_loss_bwd",
    "bits_softmax_loss_fwd",
    "bits_step",
    "instance_weights",
    "unsupported",
]


def unsupported(_op: str, *_args: Any) -> str | None:
    return None
