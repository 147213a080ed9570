"""analog_bits: codec, noise."""

from foveate.testing.spec import OpSpec
from foveate.testing.specs.analog_bits import codec, noise

SPECS: tuple[OpSpec, ...] = (*codec.SPECS, *noise.SPECS)
