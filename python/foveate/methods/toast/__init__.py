"""TOAST: a frozen ViT that runs twice, the second time attending to what the task needs.

Source: Shi et al., "TOAST: Transfer Learning via Attention Steering" (arXiv 2305.15542).
"""

from foveate.methods.toast.checkpoints import LoadReport, load_toast_checkpoint
from foveate.methods.toast.driver import (
    ToastMaps,
    ToastOutput,
    ToastViT,
    pretraining_loss,
    toast,
)
from foveate.methods.toast.plots import overlay, plot_maps

__all__ = [
    "LoadReport",
    "ToastMaps",
    "ToastOutput",
    "ToastViT",
    "load_toast_checkpoint",
    "overlay",
    "plot_maps",
    "pretraining_loss",
    "toast",
]
