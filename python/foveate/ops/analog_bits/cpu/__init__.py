"""analog_bits on CPU tensors: csrc/cpu/analog_bits*.cpp."""

from typing import Any

from foveate.ops.analog_bits.cpu.codec import bits_decode, bits_encode
from foveate.ops.analog_bits.cpu.loss import bits_loss_bwd, bits_loss_fwd
from foveate.ops.analog_bits.cpu.noise import bits_noise, bits_q_sample

__all__ = [
    "bits_decode",
    "bits_encode",
    "bits_loss_bwd",
    "bits_loss_fwd",
    "bits_noise",
    "bits_q_sample",
    "unsupported",
]


def unsupported(_op: str, *_args: Any) -> str | None:
    return None
