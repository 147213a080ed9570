"""Drop-in modules; each is a constructor and a forward over the functional ops."""

from __future__ import annotations

import torch
from torch import nn

from foveate._checks import integer, one_of
from foveate.ops.topdown_attention.api.attention import topdown_attention

__all__ = ["TopDownAttention"]


class TopDownAttention(nn.Module):
    """Self-attention of a ViT block that takes a top-down signal; the keys of timm's Attention.

    proj(topdown_attention(x, td, qkv.weight, qkv.bias)). Source: "TOAST" (arXiv 2305.15542).

    Args:
        dim: width of the tokens.
        num_heads: heads, a divisor of dim.
        qkv_bias: whether the packed projection has a bias.
        proj_bias: whether the output projection has one.
        td_bias: "twice" or "once", how often b_v is added when td is given.
        backend: passed to `foveate.topdown_attention`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: num_heads does not divide dim, or td_bias is not a name.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        *,
        proj_bias: bool = True,
        td_bias: str = "twice",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = integer("dim", dim, 1)
        self.num_heads = integer("num_heads", num_heads, 1)
        if dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        one_of("td_bias", td_bias, ("twice", "once"))
        self.td_bias = td_bias
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)

    def forward(
        self,
        x: torch.Tensor,
        td: torch.Tensor | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """`[b, n, dim]` from tokens `[b, n, dim]` and their top-down signal, if any."""
        out: torch.Tensor = topdown_attention(
            x,
            td,
            self.qkv.weight,
            self.qkv.bias,
            num_heads=self.num_heads,
            td_bias=self.td_bias,
            is_causal=is_causal,
            attn_mask=attn_mask,
            backend=self.backend,
        )
        return self.proj(out)  # type: ignore[no-any-return]
