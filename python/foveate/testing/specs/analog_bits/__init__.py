"""analog_bits: codec, noise, loss."""

from foveate.testing.spec import OpSpec
from foveate.testing.specs.analog_bits import codec, loss, noise

SPECS: tuple[OpSpec, ...] = (*codec.SPECS, *noise.SPECS, *loss.SPECS)
