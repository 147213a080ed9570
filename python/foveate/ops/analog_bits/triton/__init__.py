"""analog_bits on CUDA tensors."""

from typing import Any

from foveate.ops.analog_bits.triton.codec import bits_decode, bits_encode

__all__ = ["bits_decode", "bits_encode", "unsupported"]


def unsupported(_op: str, *_args: Any) -> str | None:
    return None
