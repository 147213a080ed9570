"""analog_bits on CPU tensors: csrc/cpu/analog_bits*.cpp."""

from typing import Any

import torch

from foveate.ops.analog_bits.cpu.codec import bits_decode, bits_encode
from foveate.ops.analog_bits.cpu.linear import (
    bits_linear_softmax_expectation_bwd,
    bits_linear_softmax_expectation_fwd,
    bits_linear_softmax_loss_bwd,
    bits_linear_softmax_loss_fwd,
)
from foveate.ops.analog_bits.cpu.loss import bits_loss_bwd, bits_loss_fwd
from foveate.ops.analog_bits.cpu.noise import bits_noise, bits_q_sample
from foveate.ops.analog_bits.cpu.softmax import (
    bits_softmax_expectation_bwd,
    bits_softmax_expectation_fwd,
    bits_softmax_loss_bwd,
    bits_softmax_loss_fwd,
)
from foveate.ops.analog_bits.cpu.step import bits_step, instance_weights

__all__ = [
    "bits_decode",
    "bits_encode",
    "bits_linear_softmax_expectation_bwd",
    "bits_linear_softmax_expectation_fwd",
    "bits_linear_softmax_loss_bwd",
    "bits_linear_softmax_loss_fwd",
    "bits_loss_bwd",
    "bits_loss_fwd",
    "bits_noise",
    "bits_q_sample",
    "bits_softmax_expectation_bwd",
    "bits_softmax_expectation_fwd",
    "bits_softmax_loss_bwd",
    "bits_softmax_loss_fwd",
    "bits_step",
    "instance_weights",
    "unsupported",
]


def unsupported(op: str, *args: Any) -> str | None:
    if "softmax" in op and args[0] == torch.float64:
        return "float64 logits are computed by the reference"
    return None
