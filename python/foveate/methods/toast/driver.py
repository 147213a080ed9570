"""Two passes of a timm ViT with feedback between them."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any, NamedTuple, cast

import torch
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from foveate._checks import one_of
from foveate.methods.toast.blocks import (
    Options,
    Projected,
    attention_rows,
    project,
    run_block,
    signal_bias,
    value_rows,
)
from foveate.methods.toast.decoders import Decoder, LoraLinear, matrix
from foveate.methods.toast.results import ToastMaps, ToastOutput
from foveate.ops.topdown_attention.api.feedback import feedback, fold_feedback
from foveate.ops.topdown_attention.api.select import prompt_select

_AFTER_PASS_1 = ("decoders.", "prompt", "top_down_transform", "head.", "fc_norm.", "attn_pool.")


class _Signals(NamedTuple):
    """What pass 2 adds to its values."""

    mask: torch.Tensor  # [b, n, 1], what the prompt selected
    td: tuple[torch.Tensor, ...] | None  # L x [b, n, c]; None when folded
    v_td: Callable[[int], torch.Tensor] | None  # block -> [b, n, a] when folded, bias included


class _Run(NamedTuple):
    """What the two passes left."""

    first: torch.Tensor  # [b, n, c] tokens of pass 1 after the final norm
    first_kept: dict[int, torch.Tensor]  # states of pass 1 that were asked for
    signals: _Signals
    last: torch.Tensor  # [b, queries or n, c] of pass 2, before the final norm
    kept: dict[int, torch.Tensor]  # states of pass 2 that were asked for


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
        """Store W_v R_i L_i .. L_{L-1} T^T of every block, used without gradients; gives self.

        Training, `load_state_dict` and moves drop it; after any other change of a weight the next
        forward call raises a RuntimeError.
        """
        with torch.no_grad():
            dtype = self.top_down_transform.dtype
            work = torch.promote_types(dtype, torch.float32)
            folded = fold_feedback(
                [value_rows(block).to(work) for block in self.blocks],
                [matrix(d.linear, work) for d in self._decoders],
                [matrix(d.linear2, work) for d in self._decoders],
                self.top_down_transform.to(work),
            )
            self._fold = folded.to(dtype)
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
        self._identity_key = None
        return super()._apply(*args, **kwargs)

    def _usable_fold(self) -> torch.Tensor | None:
        if self._fold is None:
            return None
        if not torch.compiler.is_compiling():
            key = self._fold_sources()
            if [p for p, _ in key] != [p for p, _ in self._fold_key]:
                self.unfold()
            elif key != self._fold_key:
                raise RuntimeError("a weight changed after fold(); call fold() again, or unfold()")
        return None if torch.is_grad_enabled() else self._fold

    def _first_is_constant(self, x: torch.Tensor, attn_mask: torch.Tensor | None) -> bool:
        if x.requires_grad or (attn_mask is not None and attn_mask.requires_grad):
            return False
        return not any(
            parameter.requires_grad
            for name, parameter in self.named_parameters()
            if not name.startswith(_AFTER_PASS_1)
        )

    def _drops(self) -> bool:
        """Whether a dropout is live whose draws depend on the number of tokens or of calls."""
        modules = [self.pos_drop]
        for block in self.blocks:
            modules += [block.attn.proj_drop, *block.mlp.modules()]
        return any(
            isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in modules
        )

    def _shares_block_0(self) -> bool:
        """Whether block 0 may attend with what pass 1 projected: the same input, nothing drawn,
        and no wish to keep less and compute twice."""
        checkpointed = self.grad_checkpointing and torch.is_grad_enabled()
        draws = self.blocks[0].training and getattr(self.blocks[0].drop_path1, "drop_prob", 0) > 0
        return not (checkpointed or draws or self._drops())

    def _queries(self, attn_mask: torch.Tensor | None, is_causal: bool) -> int | None:
        """1 if the class token's logits are all that is wanted of the last block."""
        pooled = self.global_pool == "token" and self.attn_pool is None
        return 1 if pooled and attn_mask is None and not is_causal and not self._drops() else None

    def _options(self, attn_mask: torch.Tensor | None, is_causal: bool) -> Options:
        return Options(attn_mask, is_causal, self.td_bias, self.toast_backend)

    def _embed(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_drop(self._pos_embed(self.patch_embed(x)))
        return self.norm_pre(x)  # type: ignore[no-any-return]

    def _blocks(
        self,
        x: torch.Tensor,
        signals: _Signals | None,
        projected: Projected | None,
        options: Options,
        *,
        keep: Container[int],
        queries: int | None = None,
        stop: int | None = None,
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The last state, and those of `keep`: 0 is the input, i + 1 the output of block i.

        `queries` is how many tokens the last block asks for; `stop` how many blocks run.
        """
        kept = {0: x} if 0 in keep else {}
        recompute = self.grad_checkpointing and torch.is_grad_enabled()
        td, v_td = (None, None) if signals is None else (signals.td, signals.v_td)
        for i, block in enumerate(list(self.blocks)[:stop]):
            arguments = (
                block,
                x,
                None if td is None else td[i],
                None if v_td is None else v_td(i),
                projected if i == 0 else None,
                queries if i == len(self.blocks) - 1 else None,
                options,
            )
            x = (
                checkpoint(run_block, *arguments, use_reentrant=False)
                if recompute
                else run_block(*arguments)
            )
            if i + 1 in keep:
                kept[i + 1] = x
        return x, kept

    def first_pass(
        self, x: torch.Tensor, *, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Tokens `[b, n, c]` of the plain ViT after the final norm; no graph if it is frozen."""
        constant = self._first_is_constant(x, attn_mask)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            options = self._options(attn_mask, is_causal)
            tokens, _ = self._blocks(self._embed(x), None, None, options, keep=())
            return self.norm(tokens)  # type: ignore[no-any-return]

    def _transform(self) -> torch.Tensor | None:
        """T, or None where the product by it may be skipped: it is frozen and the identity."""
        t = self.top_down_transform
        if t.requires_grad or torch.compiler.is_compiling():
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

    def _signals(self, first: torch.Tensor) -> _Signals:
        fold = self._usable_fold()
        if fold is None:
            z, mask = self.select(first)
            return _Signals(mask, self.feedback(z), None)
        selected, mask = prompt_select(
            first, self.prompt, return_mask=True, backend=self.toast_backend
        )

        def v_td(i: int) -> torch.Tensor:
            return F.linear(selected, fold[i], signal_bias(self.blocks[i], self.td_bias))

        return _Signals(mask, None, v_td)

    def _run(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None,
        is_causal: bool,
        *,
        first_keep: Container[int] = (),
        keep: Container[int] = (),
        queries: int | None = None,
        stop: int | None = None,
    ) -> _Run:
        options = self._options(attn_mask, is_causal)
        constant = self._first_is_constant(x, attn_mask)
        shared = self._shares_block_0()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            start = self._embed(x)
            projected = project(self.blocks[0], start) if shared else None
            tokens, first_kept = self._blocks(start, None, projected, options, keep=first_keep)
            first = self.norm(tokens)
            # Dropout of positions draws again in pass 2.
            start = start if shared else self._embed(x)
        signals = self._signals(first)
        last, kept = self._blocks(
            start, signals, projected, options, keep=keep, queries=queries, stop=stop
        )
        return _Run(first, first_kept, signals, last, kept)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        *,
        return_aux: bool = False,
        var_loss: bool = False,
    ) -> Any:
        """Logits of pass 2, or `ToastOutput` with `return_aux`.

        Args:
            x: images `[b, channels, H, W]`.
            attn_mask: of both passes, as `foveate.topdown_attention` takes it.
            is_causal: of both passes.
            return_aux: give what the passes made on the way, too.
            var_loss: also compute what `pretraining_loss` needs.

        Raises:
            ValueError: var_loss without return_aux.
            RuntimeError: a weight changed after `fold()`.
        """
        if var_loss and not return_aux:
            raise ValueError("var_loss=True needs return_aux=True, got return_aux=False")
        depth = len(self.blocks)
        run = self._run(
            x,
            attn_mask,
            is_causal,
            keep=range(depth + 1) if var_loss else (),
            queries=None if var_loss else self._queries(attn_mask, is_causal),
        )
        logits = self.forward_head(self.norm(run.last))
        if not return_aux:
            return logits
        loss = None
        if var_loss:
            terms = [
                F.mse_loss(decoder.linear(run.kept[i + 1].detach()), run.kept[i].detach())
                for i, decoder in enumerate(self._decoders)
            ]
            loss = torch.stack(terms).sum()
        first_logits = self.forward_head(run.first)
        return ToastOutput(logits, run.signals.mask, run.signals.td, run.first, first_logits, loss)

    def forward_features(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """Tokens `[b, n, c]` of pass 2 after the final norm."""
        return self.norm(self._run(x, attn_mask, is_causal).last)  # type: ignore[no-any-return]

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
        """timm's arguments and formats; the blocks are those of pass 2."""
        one_of("output_fmt", output_fmt, ("NCHW", "NLC"))
        taken, last = feature_take_indices(len(self.blocks), indices)
        states = {i + 1 for i in taken}
        stop = last + 1 if stop_early else None
        run = self._run(x, attn_mask, is_causal, keep=states, stop=stop)
        p = self.num_prefix_tokens
        outs = [self.norm(y) if norm else y for y in (run.kept[i] for i in sorted(states))]
        prefix = [y[:, :p] for y in outs] if p else None
        maps = [y[:, p:] for y in outs]
        if output_fmt == "NCHW":
            grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
            maps = [y.transpose(1, 2).unflatten(2, grid).contiguous() for y in maps]
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            if prefix is not None and return_prefix_tokens:
                found["image_intermediates_prefix"] = prefix
            return found if intermediates_only else {**found, "image_features": self.norm(run.last)}
        given: list[Any] = maps
        if return_prefix_tokens and prefix is not None:
            given = list(zip(maps, prefix, strict=True))
        return given if intermediates_only else (self.norm(run.last), given)

    @torch.no_grad()
    def maps(self, x: torch.Tensor) -> ToastMaps:
        """What the passes look at, on the patch grid `[gh, gw]`; no gradient.

        Returns:
            selection: `[b, gh, gw]`, the mask of the prompt, prefix tokens dropped.
            attention_first, attention: `[b, h, gh, gw]`, the last block's softmax row of the
                class token over patches, not renormalised, of pass 1 and pass 2; without a class
                token the mean over patch queries.
            feature_norm: `[b, gh, gw]`, the norm of pass-2 tokens.
        """
        before = len(self.blocks) - 1
        run = self._run(x, None, False, first_keep=(before,), keep=(before,))
        grid = self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        p = self.num_prefix_tokens
        block, cls = self.blocks[-1], self.has_class_token

        def attention(tokens: torch.Tensor) -> torch.Tensor:
            rows: torch.Tensor = attention_rows(block, tokens, p, cls).unflatten(-1, grid)
            return rows

        return ToastMaps(
            run.signals.mask[:, p:, 0].unflatten(1, grid),
            attention(run.first_kept[before]),
            attention(run.kept[before]),
            self.norm(run.last)[:, p:].norm(dim=-1).unflatten(1, grid),
        )
