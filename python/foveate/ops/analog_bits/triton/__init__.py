"""analog_bits on CUDA tensors."""

from typing import Any

from foveate.ops.analog_bits.triton.codec import bits_decode, bits_encode
from foveate.ops.analog_bits.triton.noise import bits_noise, bits_q_sample

__all__ = ["bits_decode", "bits_encode", "bits_noise", "bits_q_sample", "unsupported"]


def unsupported(_op: str, *_args: Any) -> str | None:
    return None
