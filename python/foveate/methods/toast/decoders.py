"""The linear decoders that send selected tokens back to a block."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class LoraLinear(nn.Linear):
    """x W^T + scale x A^T B^T: a frozen matrix and a trained product of rank r, never merged."""

    def __init__(
        self, width: int, r: int, alpha: float, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(width, width, bias=False, device=device, dtype=dtype)
        self.lora_A = nn.Parameter(torch.empty(r, width, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(width, r, device=device, dtype=dtype))
        self.lora_scale = alpha / r

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(F.linear(x, self.lora_A), self.lora_B)
        return F.linear(x, self.weight) + self.lora_scale * low


def matrix(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """W, or W + scale B A, `[c, c]`, computed in `dtype`."""
    weight = layer.weight.to(dtype)
    if not isinstance(layer, LoraLinear):
        return weight
    return weight + layer.lora_scale * (layer.lora_B.to(dtype) @ layer.lora_A.to(dtype))


class Decoder(nn.Module):
    """`linear` passes the signal to the block below, `linear2` gives it to the block's values."""

    def __init__(
        self,
        width: int,
        r: int | None,
        alpha: float,
        generator: torch.Generator | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()

        def make() -> nn.Linear:
            if r is None:
                layer = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
            else:
                layer = LoraLinear(width, r, alpha, device=device, dtype=dtype)
            with torch.no_grad():
                nn.init.trunc_normal_(layer.weight, std=0.02, generator=generator)
                if isinstance(layer, LoraLinear):
                    nn.init.kaiming_uniform_(layer.lora_A, a=math.sqrt(5), generator=generator)
            return layer

        self.linear = make()
        self.linear2 = make()
