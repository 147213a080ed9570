"""Options that every entry point shares, and the images that a NaN policy leaves."""

from __future__ import annotations

import torch

PRECISIONS = ("bf16", "tf32", "bf16x3", "fp32", "fp64")
NAN_POLICIES = ("propagate", "raise", "omit")
CONSTANTS = ("nan", "zero")


def finite_images(*sides: torch.Tensor) -> torch.Tensor:
    """Which images [n] hold no NaN and no infinity in any of the maps [n, ..]."""
    keep = torch.ones(sides[0].shape[0], dtype=torch.bool, device=sides[0].device)
    for maps in sides:
        keep = keep & maps.detach().isfinite().flatten(1).all(1)
    return keep


def checked_images(a: torch.Tensor, b: torch.Tensor, nan_policy: str) -> torch.Tensor:
    """The images [n] to keep: all under "propagate", the finite ones under "omit".

    Raises:
        ValueError: a non-finite value under "raise"; no image left under "omit".
    """
    if nan_policy == "propagate":
        return torch.ones(a.shape[0], dtype=torch.bool, device=a.device)
    if nan_policy == "raise":
        for side, maps in (("a", a), ("b", b)):
            wrong = (~maps.detach().isfinite()).sum((0, 2, 3))  # [c]
            if bool(wrong.any()):
                channel = int(wrong.nonzero()[0, 0])
                raise ValueError(
                    f"{side} must be finite under nan_policy='raise', got {int(wrong[channel])} "
                    f"non-finite values in channel {channel} of layer '0'"
                )
    keep = finite_images(a, b)
    if not bool(keep.any()):
        raise ValueError("pearson_matrix needs at least 2 samples, got 0: every image was omitted")
    return keep
