"""What a steered ViT gives, and the loss of its pre-training."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F


class ToastOutput(NamedTuple):
    """What `ToastViT.forward(return_aux=True)` gives."""

    logits: torch.Tensor
    mask: torch.Tensor  # [b, n, 1]
    td: tuple[torch.Tensor, ...] | None  # L x [b, n, c]; None when folded
    first_pass: torch.Tensor  # [b, n, c]
    first_logits: torch.Tensor
    var_loss: torch.Tensor | None


class ToastMaps(NamedTuple):
    """What the two passes look at, on the patch grid [gh, gw]."""

    selection: torch.Tensor  # [b, gh, gw]
    attention_first: torch.Tensor  # [b, h, gh, gw]
    attention: torch.Tensor  # [b, h, gh, gw]
    feature_norm: torch.Tensor  # [b, gh, gw]


def pretraining_loss(
    output: ToastOutput,
    target: torch.Tensor,
    *,
    var_weight: float = 0.1,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
) -> torch.Tensor:
    """Mean criterion over the logits of both passes + var_weight var_loss.

    var_loss = sum_i mse(L_i(out_i), in_i) over the blocks of pass 2, both detached: it teaches
    the decoders' `linear` alone to give a block's input from its output. Source: Shi et al.,
    "Top-Down Visual Attention from Analysis by Synthesis" (CVPR 2023).

    Args:
        output: of `ToastViT.forward(return_aux=True, var_loss=True)`.
        target: what the criterion takes, such as class ids `[b]`.
        var_weight: weight of var_loss.
        criterion: (logits, target) -> scalar.

    Returns:
        A scalar.

    Raises:
        ValueError: the output was made without var_loss=True.
    """
    if output.var_loss is None:
        raise ValueError("output must be made with var_loss=True, got var_loss None")
    both: torch.Tensor = 0.5 * (
        criterion(output.logits, target) + criterion(output.first_logits, target)
    )
    return both + var_weight * output.var_loss
