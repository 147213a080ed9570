"""Drop-in modules; each is a constructor and a forward over the functional ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from foveate._checks import integer, one_of
from foveate.ops.analog_bits.api.linear import (
    bits_linear_softmax_cross_entropy,
    bits_linear_softmax_expectation,
)
from foveate.ops.analog_bits.groups import group_count
from foveate.ops.analog_bits.layout import bit_widths
from foveate.ops.topdown_attention.api.attention import topdown_attention

__all__ = ["BitsSoftmaxHead", "TopDownAttention"]


class BitsSoftmaxHead(nn.Module):
    """The last layer of Pix2Seq-D: a 1 x 1 convolution to logits, and their softmax over bits.

    The logits never exist whole. Source: Chen et al., "A Generalist Framework for Panoptic
    Segmentation of Images and Videos" (ICCV 2023).

    Args:
        dim: channels of the features.
        n_bits: bits of an id, 1..63; a tuple gives the bits of each of K maps.
        groups: G groups of N / G bits with a softmax each; None is one for each map.
        scale: value of a bit that is surely set.
        bit_order: "lsb" or "msb", the bit that comes first.
        channel_dim: axis of the channels, in the features and in the bits.
        backend: passed to the ops.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: groups that do not fit n_bits, a size or a name outside its range.
    """

    def __init__(
        self,
        dim: int,
        n_bits: int | Sequence[int],
        groups: int | None = None,
        *,
        scale: float = 1.0,
        bit_order: str = "lsb",
        channel_dim: int = 1,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dim = integer("dim", dim, 1)
        one_of("bit_order", bit_order, ("lsb", "msb"))
        widths = bit_widths(n_bits)
        self.n_bits = widths.n_bits[0] if widths.single else widths.n_bits
        self.groups = group_count(widths, groups)
        self.group_bits = widths.channels // self.groups
        self.scale = float(scale)
        self.bit_order = bit_order
        self.channel_dim = channel_dim
        self.backend = backend
        logits = self.groups << self.group_bits
        self.weight = nn.Parameter(torch.empty(logits, dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(logits, device=device, dtype=dtype))
        bound = dim**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        h: torch.Tensor,
        x: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Expected bits of features `[*pixel, dim]` (dim at channel_dim); with ids x, the loss."""
        if x is None:
            bits: torch.Tensor = bits_linear_softmax_expectation(
                h,
                self.weight,
                self.bias,
                self.group_bits,
                scale=self.scale,
                bit_order=self.bit_order,
                dim=self.channel_dim,
                backend=self.backend,
            )
            return bits
        loss: torch.Tensor = bits_linear_softmax_cross_entropy(
            h,
            self.weight,
            self.bias,
            x,
            self.n_bits,
            groups=self.groups,
            weight=weight,
            bit_order=self.bit_order,
            dim=self.channel_dim,
            backend=self.backend,
        )
        return loss


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
