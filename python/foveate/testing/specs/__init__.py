"""THE REGISTRY: every op of every family."""

from foveate.testing.spec import OpSpec
from foveate.testing.specs import analog_bits, ncut, pearson

SPECS: tuple[OpSpec, ...] = (*analog_bits.SPECS, *ncut.SPECS, *pearson.SPECS)
from foveate.testing.specs import analog_bits, pearson, topdown_attention

SPECS: tuple[OpSpec, ...] = (*analog_bits.SPECS, *pearson.SPECS, *topdown_attention.SPECS)
