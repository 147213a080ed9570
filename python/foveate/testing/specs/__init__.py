"""THE REGISTRY: every op of every family."""

from foveate.testing.spec import OpSpec
from foveate.testing.specs import analog_bits, ncut, pairwise_loss, pearson, topdown_attention

SPECS: tuple[OpSpec, ...] = (
    *analog_bits.SPECS,
    *pairwise_loss.SPECS,
    *ncut.SPECS,
    *pearson.SPECS,
    *topdown_attention.SPECS,
)
