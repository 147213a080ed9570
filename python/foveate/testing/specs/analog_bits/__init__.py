"""analog_bits: codec, noise, loss, softmax."""

from foveate.testing.spec import OpSpec
from foveate.testing.specs.analog_bits import codec, loss, noise, softmax

SPECS: tuple[OpSpec, ...] = (*codec.SPECS, *noise.SPECS, *loss.SPECS, *softmax.SPECS)
