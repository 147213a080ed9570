"""THE REGISTRY: every op of every family."""

from foveate.testing.spec import OpSpec
from foveate.testing.specs import analog_bits, ncut, pearson, topdown_attention

SPECS: tuple[OpSpec, ...] = (
    *analog_bits.SPECS,
    *ncut.SPECS,
    *pearson.SPECS,
    *topdown_attention.SPECS,
)
