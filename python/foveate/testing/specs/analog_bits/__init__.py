"""analog_bits: codec, noise, loss, softmax, step."""

from foveate.testing.spec import OpSpec
from foveate.testing.specs.analog_bits import codec, loss, noise, softmax, step

SPECS: tuple[OpSpec, ...] = (
    *codec.SPECS,
    *noise.SPECS,
    *loss.SPECS,
    *softmax.SPECS,
    *step.SPECS,
)
