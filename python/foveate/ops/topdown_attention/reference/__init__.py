"""The definition of top-down attention in plain PyTorch."""

from foveate.ops.topdown_attention.reference.attention import topdown_attention, topdown_sdpa
from foveate.ops.topdown_attention.reference.feedback import (
    feedback,
    fold_feedback,
    prompt_select,
)

__all__ = ["feedback", "fold_feedback", "prompt_select", "topdown_attention", "topdown_sdpa"]
