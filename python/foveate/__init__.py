"""The fused, exact cores of ICCV 2023's vision methods, on CPU, Triton and CUDA."""

from __future__ import annotations

import importlib
from typing import Any

from foveate.ops.analog_bits.api.codec import bits_decode, bits_encode
from foveate.ops.analog_bits.api.linear import (
    bits_linear_softmax_cross_entropy,
    bits_linear_softmax_expectation,
)
from foveate.ops.analog_bits.api.loss import bits_loss
from foveate.ops.analog_bits.api.noise import bits_noise, bits_q_sample
from foveate.ops.analog_bits.api.softmax import bits_softmax_cross_entropy, bits_softmax_expectation
from foveate.ops.analog_bits.api.step import ddim_step, ddpm_step
from foveate.ops.analog_bits.api.weights import instance_weights
from foveate.ops.ncut.api import maskcut, ncut, ncut_affinity, tokencut
from foveate.ops.ncut.results import MaskCutResult, MaskStatus, NCutResult, TokenCutResult
from foveate.ops.pairwise_loss.api.info_nce import info_nce_loss
from foveate.ops.pairwise_loss.api.sigmoid import sigmoid_loss
from foveate.ops.pairwise_loss.pairs import PairStats
from foveate.ops.pearson.accumulator import PearsonAccumulator
from foveate.ops.pearson.api import pearson_matrix
from foveate.ops.pearson.layers import LayerInfo, LayerSpec
from foveate.ops.pearson.matching import Matches, TopK, mutual_nearest_neighbors
from foveate.ops.pearson.paired import paired_correlation
from foveate.ops.pearson.summary import PearsonSummary
from foveate.ops.topdown_attention.api.attention import topdown_attention
from foveate.ops.topdown_attention.api.feedback import feedback, fold_feedback
from foveate.ops.topdown_attention.api.sdpa import topdown_sdpa
from foveate.ops.topdown_attention.api.select import prompt_select

__version__ = "0.1.0"

__all__ = [
    "LayerInfo",
    "LayerSpec",
    "MaskCutResult",
    "MaskStatus",
    "Matches",
    "NCutResult",
    "PairStats",
    "PearsonAccumulator",
    "PearsonSummary",
    "TokenCutResult",
    "TopK",
    "bits_decode",
    "bits_encode",
    "bits_linear_softmax_cross_entropy",
    "bits_linear_softmax_expectation",
    "bits_loss",
    "bits_noise",
    "bits_q_sample",
    "bits_softmax_cross_entropy",
    "bits_softmax_expectation",
    "ddim_step",
    "ddpm_step",
    "feedback",
    "fold_feedback",
    "info_nce_loss",
    "instance_weights",
    "maskcut",
    "mutual_nearest_neighbors",
    "ncut",
    "ncut_affinity",
    "paired_correlation",
    "pearson_matrix",
    "prompt_select",
    "sigmoid_loss",
    "tokencut",
    "topdown_attention",
    "topdown_sdpa",
]

_ON_FIRST_USE = ("bench", "cli", "compat", "methods", "nn", "testing")


def __getattr__(name: str) -> Any:
    if name in _ON_FIRST_USE:
        return importlib.import_module(f"foveate.{name}")
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ON_FIRST_USE, "__version__"])
