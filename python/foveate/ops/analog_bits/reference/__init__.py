"""The definition of analog bits in plain PyTorch."""

from foveate.ops.analog_bits.reference.codec import bits_decode, bits_encode
from foveate.ops.analog_bits.reference.linear import (
    bits_linear_softmax_cross_entropy,
    bits_linear_softmax_expectation,
)
from foveate.ops.analog_bits.reference.loss import bits_loss
from foveate.ops.analog_bits.reference.noise import bits_noise, bits_q_sample
from foveate.ops.analog_bits.reference.softmax import (
    bits_softmax_cross_entropy,
    bits_softmax_expectation,
)
from foveate.ops.analog_bits.reference.step import bits_step, instance_weights

__all__ = [
    "bits_decode",
    "bits_encode",
    "bits_linear_softmax_cross_entropy",
    "bits_linear_softmax_expectation",
    "bits_loss",
    "bits_noise",
    "bits_q_sample",
    "bits_softmax_cross_entropy",
    "bits_softmax_expectation",
    "bits_step",
    "instance_weights",
]
