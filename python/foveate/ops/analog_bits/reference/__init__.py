"""The definition of analog bits in plain PyTorch."""

from foveate.ops.analog_bits.reference.codec import bits_decode, bits_encode

__all__ = ["bits_decode", "bits_encode"]
