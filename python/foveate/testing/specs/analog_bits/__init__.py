"""analog_bits: codec, noise, loss, softmax, linear, step."""

from foveate.testing.spec import OpSpec
from foveate.testing.specs.analog_bits import codec, linear, loss, noise, softmax, step

SPECS: tuple[OpSpec, ...] = (
    *codec.SPECS,
    *noise.SPECS,
    *loss.SPECS,
    *softmax.SPECS,
    *linear.SPECS,
    *step.SPECS,
)
