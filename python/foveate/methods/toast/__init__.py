"""TOAST: a frozen ViT that runs twice, the second time attending to what the task needs.

Source: Shi et al., "TOAST: Transfer Learning via Attention Steering" (arXiv 2305.15542).
"""

from foveate.methods.toast.build import toast
from foveate.methods.toast.checkpoints import LoadReport, load_toast_checkpoint
from foveate.methods.toast.driver import ToastViT
from foveate.methods.toast.plots import overlay, plot_maps
from foveate.methods.toast.results import ToastMaps, ToastOutput, pretraining_loss

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
