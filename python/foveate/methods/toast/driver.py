"""Two passes of a timm ViT with feedback between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from timm.layers import Attention
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from foveate._checks import integer, one_of
from foveate.methods.toast.blocks import attention_rows, run_block, value_rows
from foveate.methods.toast.decoders import Decoder, LoraLinear
from foveate.ops.topdown_attention.api.feedback import feedback, fold_feedback
from foveate.ops.topdown_attention.api.select import prompt_select

METHODS = ("toast", "toast-lite", "end2end", "frozen")


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


class ToastViT(VisionTransformer):  # type: ignore[misc]
    """A timm VisionTransformer with top-down feedback; made by `toast`."""

    decoders: nn.ModuleList
    prompt: nn.Parameter
    top_down_transform: nn.Parameter
    td_bias: str
    toast_backend: str
    toast_method: str
    _fold: torch.Tensor | None
    _fold_key: tuple[tuple[int, int], ...]
    _identity_key: tuple[int, int, bool] | None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fold": None, "_fold_key": (), "_identity_key": None}

    @property
    def _decoders(self) -> list[Decoder]:
        return cast("list[Decoder]", list(self.decoders))

    @property
    def folded(self) -> bool:
        """Whether inference uses one matrix per block in place of the chain of decoders."""
        return self._fold is not None

    def _fold_sources(self) -> tuple[tuple[int, int], ...]:
        tensors = [block.attn.qkv.weight for block in self.blocks]
        tensors += [*self.decoders.parameters(), self.top_down_transform]
        return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)

    def fold(self) -> ToastViT:
        """Store W_v R_i L_i .. L_{L-1} T^T of every block, used without gradients; gives self."""
        with torch.no_grad():
            left, right = zip(*(d.matrices() for d in self._decoders), strict=True)
            self._fold = fold_feedback(
                [value_rows(block) for block in self.blocks],
                list(left),
                list(right),
                self.top_down_transform,
            )
        self._fold_key = self._fold_sources()
        return self

    def unfold(self) -> ToastViT:
        """Drop what `fold` stored; gives self."""
        self._fold, self._fold_key = None, ()
        return self

    def train(self, mode: bool = True) -> ToastViT:
        """As nn.Module's; training drops a fold."""
        if mode:
            self.unfold()
        super().train(mode)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's; drops a fold."""
        self.unfold()
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.unfold()
        return super()._apply(*args, **kwargs)

    def _usable_fold(self) -> torch.Tensor | None:
        if self._fold is None or torch.is_grad_enabled():
            return None
        key = self._fold_sources()
        if [p for p, _ in key] != [p for p, _ in self._fold_key]:
            self.unfold()
        elif key != self._fold_key:
            raise RuntimeError("a weight changed after fold(); call fold() again, or unfold()")
        return self._fold

    def _first_is_constant(self, x: torch.Tensor) -> bool:
        ignored = ("decoders.", "prompt", "top_down_transform", "head.", "fc_norm.", "attn_pool.")
        return not x.requires_grad and not any(
            p.requires_grad for name, p in self.named_parameters() if not name.startswith(ignored)
        )

    def _drops(self) -> bool:
        """Whether a dropout whose draws depend on the number of tokens is live."""
        if not self.training:
            return False
        modules = [self.pos_drop]
        for block in self.blocks:
            modules += [block.attn.proj_drop, *block.mlp.modules()]
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in modules)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_drop(self._pos_embed(self.patch_embed(x)))
        return self.norm_pre(x)  # type: ignore[no-any-return]

    def _blocks(
        self,
        x: torch.Tensor,
        td: tuple[torch.Tensor, ...] | None,
        v_td: Callable[[int], torch.Tensor] | None,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        last_queries: int | None = None,
    ) -> list[torch.Tensor]:
        """The input of block 0 and the output of every block."""
        states = [x]
        for i, block in enumerate(self.blocks):
            queries = last_queries if i == len(self.blocks) - 1 else None
            signal = None if td is None else td[i]
            values = None if v_td is None else v_td(i)
            options = (values, attn_mask, is_causal, self.td_bias, queries, self.toast_backend)
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(run_block, block, x, signal, *options, use_reentrant=False)
            else:
                x = run_block(block, x, signal, *options)
            states.append(x)
        return states

    def first_pass(
        self, x: torch.Tensor, *, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Tokens `[b, n, c]` of the plain ViT after the final norm; no graph if it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._first_is_constant(x)):
            tokens = self._blocks(self._embed(x), None, None, attn_mask, is_causal)[-1]
            return self.norm(tokens)  # type: ignore[no-any-return]

    def _transform(self) -> torch.Tensor | None:
        t = self.top_down_transform
        if t.requires_grad:
            return t
        key = (t.data_ptr(), t._version)
        if self._identity_key is None or self._identity_key[:2] != key:
            same = torch.equal(t, torch.eye(len(t), device=t.device, dtype=t.dtype))
            self._identity_key = (*key, same)
        return None if self._identity_key[2] else t

    def select(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(z `[b, n, c]`, mask `[b, n, 1]`): tokens weighted by the prompt, transformed."""
        z, mask = prompt_select(
            tokens, self.prompt, self._transform(), return_mask=True, backend=self.toast_backend
        )
        return z, mask

    def feedback(self, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The top-down signal of every block from the selected tokens."""
        if not any(isinstance(m, LoraLinear) for m in self.decoders.modules()):
            signals: tuple[torch.Tensor, ...] = feedback(
                z,
                [d.linear.weight for d in self._decoders],
                [d.linear2.weight for d in self._decoders],
            )
            return signals
        found = []
        for decoder in reversed(self._decoders):
            z = decoder.linear(z)
            found.append(decoder.linear2(z))
        return tuple(found[::-1])

    def _second(
        self, x: torch.Tensor, mask: torch.Tensor | None, causal: bool, queries: int | None
    ) -> tuple[list[torch.Tensor], torch.Tensor, tuple[torch.Tensor, ...] | None, torch.Tensor]:
        """(states of pass 2, selection mask, td, tokens of pass 1)."""
        constant = self._first_is_constant(x)
        first = self.first_pass(x, attn_mask=mask, is_causal=causal)
        fold = self._usable_fold()
        if fold is None:
            z, selection = self.select(first)
            td: tuple[torch.Tensor, ...] | None = self.feedback(z)
            v_td = None
        else:
            selected, selection = prompt_select(
                first, self.prompt, return_mask=True, backend=self.toast_backend
            )
            td = None
            rows = selected.to(fold.dtype)

            def v_td(i: int) -> torch.Tensor:
                return F.linear(rows, fold[i])

        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            start = self._embed(x)
        return self._blocks(start, td, v_td, mask, causal, queries), selection, td, first

    def _queries(self, mask: torch.Tensor | None, causal: bool) -> int | None:
        pooled = self.global_pool == "token" and self.attn_pool is None
        return 1 if pooled and mask is None and not causal and not self._drops() else None

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        *,
        return_aux: bool = False,
        var_loss: bool = False,
    ) -> Any:
        """Logits of pass 2, or `ToastOutput` with `return_aux`."""
        if var_loss and not return_aux:
            raise ValueError("var_loss=True needs return_aux=True, got return_aux=False")
        queries = None if var_loss else self._queries(attn_mask, is_causal)
        states, mask, td, first = self._second(x, attn_mask, is_causal, queries)
        logits = self.forward_head(self.norm(states[-1]))
        if not return_aux:
            return logits
        loss = None
        if var_loss:
            terms = [
                F.mse_loss(d.linear(after.detach()), before.detach())
                for d, before, after in zip(self._decoders, states, states[1:], strict=False)
            ]
            loss = torch.stack(terms).sum()
        return ToastOutput(logits, mask, td, first, self.forward_head(first), loss)

    def forward_features(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Tokens `[b, n, c]` of pass 2 after the final norm."""
        states = self._second(x, attn_mask, is_causal, None)[0]
        return self.norm(states[-1])  # type: ignore[no-any-return]

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's, of the blocks of pass 2. `stop_early` changes what is given as features."""
        one_of("output_fmt", output_fmt, ("NCHW", "NLC"))
        taken, last = feature_take_indices(len(self.blocks), indices)
        states = self._second(x, attn_mask, is_causal, None)[0]
        final = self.norm(states[last + 1 if stop_early else -1])
        p = self.num_prefix_tokens
        outs = [self.norm(y) if norm else y for y in (states[i + 1] for i in sorted(taken))]
        prefix = [y[:, :p] for y in outs] if p else None
        maps = [y[:, p:] for y in outs]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            if prefix is not None and return_prefix_tokens:
                found["image_intermediates_prefix"] = prefix
            return found if intermediates_only else {**found, "image_features": final}
        given: list[Any] = maps
        if return_prefix_tokens and prefix is not None:
            given = list(zip(maps, prefix, strict=True))
        return given if intermediates_only else (final, given)

    @torch.no_grad()
    def maps(self, x: torch.Tensor) -> ToastMaps:
        """What the passes look at, on the patch grid; no gradient."""
        before = self._blocks(self._embed(x), None, None, None, False)
        states, mask, _, _ = self._second(x, None, False, None)
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        p = self.num_prefix_tokens
        block, cls = self.blocks[-1], self.has_class_token

        def attention(tokens: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = attention_rows(block, tokens, p, cls).unflatten(-1, grid)
            return rows

        return ToastMaps(
            mask[:, p:, 0].unflatten(1, grid),
            attention(before[-2]),
            attention(states[-2]),
            self.norm(states[-1])[:, p:].norm(dim=-1).unflatten(1, grid),
        )


def pretraining_loss(
    output: ToastOutput,
    target: torch.Tensor,
    *,
    var_weight: float = 0.1,
    criterion: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = F.cross_entropy,
) -> torch.Tensor:
    """Mean criterion over the logits of both passes + var_weight var_loss.

    Raises:
        ValueError: the output was made without var_loss=True.
    """
    if output.var_loss is None:
        raise ValueError("output must be made with var_loss=True, got var_loss None")
    both: torch.Tensor = 0.5 * (
        criterion(output.logits, target) + criterion(output.first_logits, target)
    )
    return both + var_weight * output.var_loss


def _require_plain_vit(vit: Any) -> None:
    if isinstance(vit, ToastViT):
        raise TypeError("vit is a ToastViT already")
    if isinstance(vit, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"vit is wrapped in {type(vit).__name__}: pass .module")
    if type(vit) is not VisionTransformer:
        raise TypeError(f"vit must be a timm VisionTransformer, got {type(vit).__name__}")
    for block in vit.blocks:
        if type(block) is not Block:
            raise TypeError(f"blocks must be timm's Block, got {type(block).__name__}")
        if type(block.attn) is not Attention:
            raise TypeError(f"attn must be timm's Attention, got {type(block.attn).__name__}")
        if getattr(block.attn, "gate", None) is not None:
            raise TypeError("attn must be timm's Attention without a gate, got gated attention")
        if block.attn.attn_drop.p > 0:
            raise ValueError(f"attn_drop_rate must be 0, got {block.attn.attn_drop.p}")
    if not isinstance(vit.patch_drop, nn.Identity):
        raise ValueError(
            "patch_drop_rate must be 0, or the passes keep different patches; "
            f"got {vit.patch_drop.prob}"
        )


def toast(
    vit: Any,
    method: str = "toast",
    *,
    num_classes: int | None = None,
    td_bias: str = "twice",
    lora_r: int = 4,
    lora_alpha: float = 1.0,
    train_transform: bool | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> ToastViT:
    """A ViT that runs twice, its second pass steered by tokens that a prompt selects.

    Source: Shi et al., "TOAST" (arXiv 2305.15542), sections 3 and 4. The result shares the
    tensors of `vit` and sets their `requires_grad`; `vit` stays a plain ViT.

    Args:
        vit: a timm `VisionTransformer` of `Block` and `Attention`.
        method: "toast" trains decoders, prompt and head; "toast-lite" LoRA factors of the
            decoders, prompt, transform and head; "end2end" everything; "frozen" the head.
        num_classes: a new head of so many classes; None keeps the head.
        td_bias: "twice" or "once", how often b_v is added in pass 2.
        lora_r: rank of the factors.
        lora_alpha: the factors count alpha / r.
        train_transform: whether the transform trains; None is the method's rule.
        generator: of the initial prompt, decoders and factors.
        backend: of the ops.

    Returns:
        The model, in the training mode of `vit`.

    Raises:
        TypeError: another model, block or attention.
        ValueError: dropout of patches or attention, a bad method, td_bias or lora_r.
    """
    _require_plain_vit(vit)
    one_of("method", method, METHODS)
    one_of("td_bias", td_bias, ("twice", "once"))
    lora_r = integer("lora_r", lora_r, 1)
    one_of("train_transform", train_transform, (None, True, False))
    model = ToastViT.__new__(ToastViT)
    nn.Module.__init__(model)
    for name, value in vit.__dict__.items():
        model.__dict__[name] = value.copy() if isinstance(value, dict) else value
    if num_classes is not None:
        model.reset_classifier(num_classes)
    model.td_bias, model.toast_backend, model.toast_method = td_bias, backend, method
    model._fold, model._fold_key, model._identity_key = None, (), None
    where = vit.blocks[0].attn.qkv.weight
    kind: dict[str, Any] = {"device": where.device, "dtype": where.dtype}
    c = vit.embed_dim
    rank = lora_r if method == "toast-lite" else None
    model.prompt = nn.Parameter(torch.empty(c, **kind).normal_(generator=generator))
    model.top_down_transform = nn.Parameter(torch.eye(c, **kind))
    model.decoders = nn.ModuleList(
        Decoder(c, rank, lora_alpha, generator, **kind) for _ in vit.blocks
    ).train(vit.training)
    trained = {
        "toast": ("decoders.", "prompt", "head."),
        "toast-lite": ("prompt", "top_down_transform", "head."),
        "end2end": ("",),
        "frozen": ("head.",),
    }[method]
    for name, parameter in model.named_parameters():
        lora = method == "toast-lite" and ".lora_" in name
        parameter.requires_grad_(lora or name.startswith(trained))
    if train_transform is not None:
        model.top_down_transform.requires_grad_(train_transform)
    return model
