"""Drop-in modules; each is a constructor and a forward over the functional ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from foveate._checks import integer, one_of
from foveate.ops.analog_bits.api.linear import (
    bits_linear_softmax_cross_entropy,
    bits_linear_softmax_expectation,
)
from foveate.ops.analog_bits.groups import group_count
from foveate.ops.analog_bits.layout import bit_widths
from foveate.ops.pairwise_loss.api.info_nce import info_nce_loss
from foveate.ops.pairwise_loss.api.sigmoid import sigmoid_loss
from foveate.ops.topdown_attention.api.attention import topdown_attention

__all__ = ["BitsSoftmaxHead", "ClipLoss", "SigLipLoss", "TopDownAttention"]


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


_RING, _GATHER = ("bidir", "shift"), ("gather", "reduce")


def _group_of(rank: int, world_size: int, group: Any) -> Any:
    """The process group of a loss module, checked against the rank and size it was given."""
    if world_size == 1 and group is None:
        return None
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise RuntimeError(
            f"world_size = {world_size} needs torch.distributed, which is not initialised: "
            "call torch.distributed.init_process_group first"
        )
    found = torch.distributed.group.WORLD if group is None else group
    place = torch.distributed.get_rank(found), torch.distributed.get_world_size(found)
    if place != (rank, world_size):
        raise ValueError(
            f"rank and world_size must be those of the group, {place[0]} and {place[1]}, "
            f"got {rank} and {world_size}"
        )
    return found


class SigLipLoss(nn.Module):
    """The sigmoid loss of paired features, in place of open_clip's module of this name.

    Mean over this rank's rows of the sum over all ranks' columns, `foveate.sigmoid_loss`. Logits
    and loss are float32 whatever the features' dtype, also under autocast.

    Args:
        cache_labels: kept as an attribute; changes nothing.
        rank: of this process.
        world_size: processes whose text features are the columns.
        dist_impl: None, "bidir", "shift", "gather" or "reduce"; all give the same bits.
        chunk_size: an int >= 0, kept as an attribute; changes nothing.
        group: process group; None is the default one where world_size > 1.
        backend: passed to `foveate.sigmoid_loss`.

    Raises:
        TypeError: chunk_size is not an int.
        ValueError: a value out of range, a dist_impl that is not a name.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        one_of("dist_impl", dist_impl, (None, *_RING, *_GATHER))
        self.cache_labels = cache_labels
        self.rank = integer("rank", rank, 0)
        self.world_size = integer("world_size", world_size, 1)
        self.dist_impl = dist_impl or "bidir"
        self.chunk_size = integer("chunk_size", chunk_size, 0)
        self.group = group
        self.backend = backend
        self.prev_num_logits = 0
        self.labels: dict[Any, torch.Tensor] = {}

    def get_ground_truth(
        self,
        device: torch.device,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> torch.Tensor:
        """`[num_logits, num_logits]`: 1 on the diagonal and -1 elsewhere, or -1 everywhere."""
        labels = -torch.ones(num_logits, num_logits, device=device, dtype=dtype)
        if negative_only:
            return labels
        return 2 * torch.eye(num_logits, device=device, dtype=dtype) + labels

    def get_logits(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The dense s x y^T + b, `[n, m]`; for subclasses, forward does not use it."""
        logits = logit_scale * image_features @ text_features.T
        return logits if logit_bias is None else logits + logit_bias

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss `[]`, or {"contrastive_loss": loss}; features `[n, d]`."""
        loss = sigmoid_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            group=_group_of(self.rank, self.world_size, self.group),
            dist="ring" if self.dist_impl in _RING else "gather",
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class ClipLoss(nn.Module):
    """The symmetric softmax loss of paired features, in place of open_clip's module of this name.

    `foveate.info_nce_loss`: the mean of both cross-entropies. Logits and loss are float32 whatever
    the features' dtype, also under autocast. A logit_bias cancels; its gradient is exactly 0.

    Args:
        local_loss: with several processes, the loss of this rank's rows and columns; else of all.
        gather_with_grad: whether gradients reach the other ranks' features.
        cache_labels: kept as an attribute; changes nothing.
        rank: of this process.
        world_size: processes whose features are compared.
        use_horovod: must be False.
        group: process group; None is the default one where world_size > 1.
        backend: passed to `foveate.info_nce_loss`.

    Raises:
        ValueError: a value out of range, or use_horovod.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: Any = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False: ranks talk through torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = integer("rank", rank, 0)
        self.world_size = integer("world_size", world_size, 1)
        self.use_horovod = False
        self.group = group
        self.backend = backend
        self.prev_num_logits = 0
        self.labels: dict[Any, torch.Tensor] = {}

    def get_ground_truth(self, device: torch.device, num_logits: int) -> torch.Tensor:
        """The column of each row's positive among all ranks', `[num_logits]`."""
        labels = torch.arange(num_logits, device=device)
        return (
            labels + num_logits * self.rank if self.world_size > 1 and self.local_loss else labels
        )

    def get_logits(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The dense logits of images and of texts, `[n, m]` and `[m, n]`; forward has no use of
        them."""
        logits = logit_scale * image_features @ text_features.T
        logits = logits if logit_bias is None else logits + logit_bias
        return logits, logits.T

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        output_dict: bool = False,
    ) -> Any:
        """The loss `[]`, or {"contrastive_loss": loss}; features `[n, d]`."""
        loss = info_nce_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            group=_group_of(self.rank, self.world_size, self.group),
            local_loss=bool(self.local_loss),
            gather_with_grad=bool(self.gather_with_grad),
            backend=self.backend,
        )
        return {"contrastive_loss": loss} if output_dict else loss
