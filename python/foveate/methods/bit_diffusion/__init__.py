"""Bit Diffusion and Pix2Seq-D: schedules, panoptic maps, samplers, and the module that trains.

Sources: Chen, Zhang, Hinton, "Analog Bits" (ICLR 2023); Chen, Li, Saxena, Hinton, Fleet, "A
Generalist Framework for Panoptic Segmentation of Images and Videos" (Pix2Seq-D, ICCV 2023).
"""

from __future__ import annotations

from foveate.methods.bit_diffusion.model import BitDiffusion
from foveate.methods.bit_diffusion.panoptic import (
    panoptic_decode,
    panoptic_encode,
    panoptic_merge,
    past_frames,
)
from foveate.methods.bit_diffusion.sampling import sample
from foveate.methods.bit_diffusion.schedules import gamma_schedule, log_snr_schedule, time_pairs

__all__ = [
    "BitDiffusion",
    "gamma_schedule",
    "log_snr_schedule",
    "panoptic_decode",
    "panoptic_encode",
    "panoptic_merge",
    "past_frames",
    "sample",
    "time_pairs",
]
