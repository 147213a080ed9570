"""topdown_attention: benchmark rows at the sizes of real ViTs, their peers, and costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from foveate.testing import inputs
from foveate.testing.spec import Bench, Call, Cost
from foveate.testing.specs.topdown_cases import maker


def _heads(y: torch.Tensor, h: int) -> torch.Tensor:
    out: torch.Tensor = y.unflatten(-1, (h, y.shape[-1] // h)).transpose(1, 2)
    return out


def original(
    x: torch.Tensor,
    td: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_heads: int,
    **_: Any,
) -> torch.Tensor:
    """The published formulation: the whole projection of td, scores and softmax in memory."""
    b, n, _c = x.shape
    q, k, v = F.linear(x, weight, bias).view(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    v = v + F.linear(td, weight, bias).view(b, n, 3, num_heads, -1).permute(2, 0, 3, 1, 4)[2]
    p = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5).softmax(-1)
    out: torch.Tensor = (p @ v).transpose(1, 2).reshape(b, n, -1)
    return out


def merged(
    x: torch.Tensor,
    td: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    num_heads: int,
    **_: Any,
) -> torch.Tensor:
    """The strongest plain form: two linears of x and x + td, and torch's fused attention."""
    a = weight.shape[0] // 3
    q, k = F.linear(x, weight[: 2 * a], bias[: 2 * a]).chunk(2, -1)
    v = F.linear(x + td, weight[2 * a :], 2 * bias[2 * a :])
    o = F.scaled_dot_product_attention(
        _heads(q, num_heads), _heads(k, num_heads), _heads(v, num_heads)
    )
    out: torch.Tensor = o.transpose(1, 2).flatten(2)
    return out


_COMPILED: dict[str, Callable[..., torch.Tensor]] = {}


def compiled_merged(*args: Any, **kwargs: Any) -> torch.Tensor:
    """torch.compile of the strongest plain form."""
    if "merged" not in _COMPILED:
        _COMPILED["merged"] = torch.compile(merged)
    return _COMPILED["merged"](*args, **kwargs)


_PEERS: dict[str, Callable[..., Any]] = {
    "original": original,
    "merged": merged,
    "compile(merged)": compiled_merged,
}
_GRIDS = {50: 7, 197: 14, 577: 24, 785: 28}


def _attention_bench(b: int, n: int, c: int, h: int, grad: str) -> Callable[[str], Call]:
    """Tokens of photographs at a ViT's size; `grad` is "none", "frozen" or "td"."""

    def make(device: str) -> Call:
        x = inputs.tokens(b, _GRIDS[n], c, prefix=1).to(device)
        td = 0.1 * inputs.tokens(b, _GRIDS[n], c, prefix=1, seed=1).to(device)
        weight, bias = maker(torch.float32, device, 0), maker(torch.float32, device, 1)
        return Call(
            (
                x.requires_grad_(grad == "frozen"),
                td.requires_grad_(grad != "none"),
                weight(3 * c, c, scale=c**-0.5, grad=False),
                bias(3 * c, scale=0.1, grad=False),
            ),
            {"num_heads": h},
        )

    return make


def attention_rows() -> tuple[Bench, ...]:
    models = {
        "ViT-B, b=8": (8, 197, 768, 12),
        "ViT-Ti, b=16": (16, 197, 192, 3),
        "ViT-S/8, b=2": (2, 785, 384, 6),
        "ViT-B/32, b=8": (8, 50, 768, 12),
        "ViT-L 384, b=4": (4, 577, 1024, 16),
        "ViT-B, b=32": (32, 197, 768, 12),
        "ViT-B, b=128": (128, 197, 768, 12),
    }
    rows = [
        Bench(
            f"{name}, inference", _attention_bench(*size, "none"), _PEERS, name.startswith("ViT-Ti")
        )
        for name, size in models.items()
    ]
    for name in ("ViT-B, b=8", "ViT-Ti, b=16"):
        rows.append(Bench(f"{name}, frozen", _attention_bench(*models[name], "frozen"), _PEERS))
        rows.append(Bench(f"{name}, only td", _attention_bench(*models[name], "td"), _PEERS))
    return tuple(rows)


def sdpa_peer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, v_td: torch.Tensor) -> Any:
    return F.scaled_dot_product_attention(q, k, v + v_td)


def sdpa_bench(b: int, n: int, c: int, h: int, *, grad: bool) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        packed = torch.cat([inputs.tokens(b, _GRIDS[n], c, prefix=1, seed=s) for s in range(4)], -1)
        parts = packed.to(device).chunk(4, -1)
        return Call(tuple(_heads(part, h).detach().requires_grad_(grad) for part in parts))

    return make


def _select_original(x: torch.Tensor, prompt: torch.Tensor, *_: Any) -> torch.Tensor:
    """The published formulation: both sides normalised in memory, clamp, product."""
    cosine = F.normalize(x, dim=-1) @ F.normalize(prompt[None, :, None], dim=1)
    return x * cosine.clamp(0, 1)


def _select_lean(x: torch.Tensor, prompt: torch.Tensor, *_: Any) -> torch.Tensor:
    """The strongest plain form: two reductions of x and one product."""
    cosine = (x @ F.normalize(prompt, dim=0)) / x.norm(dim=-1).clamp_min(1e-12)
    out: torch.Tensor = x * cosine.clamp(0, 1).unsqueeze(-1)
    return out


def select_bench(*, grad: bool) -> Callable[[str], Call]:
    def make(device: str) -> Call:
        x = inputs.tokens(8, 14, 768, prefix=1).to(device)
        prompt = maker(torch.float32, device, 0)(768, grad=grad)
        return Call((x.requires_grad_(grad), prompt))

    return make


SELECT_PEERS: dict[str, Callable[..., Any]] = {
    "original": _select_original,
    "lean": _select_lean,
}


def feedback_bench(device: str) -> Call:
    make = maker(torch.float32, device, 0)
    z = inputs.tokens(8, 14, 384, prefix=1).to(device)
    return Call((z, *(make(12, 384, 384, scale=0.05, grad=False) for _ in range(2))))


def fold_bench(device: str) -> Call:
    make = maker(torch.float32, device, 0)
    return Call(tuple(make(12, 384, 384, scale=0.05, grad=False) for _ in range(3)))


def fold_chain(v_weight: torch.Tensor, linear: torch.Tensor, linear2: torch.Tensor) -> torch.Tensor:
    chain, folded = torch.eye(linear.shape[-1], device=linear.device), []
    for w, left, right in zip(v_weight.flip(0), linear.flip(0), linear2.flip(0), strict=True):
        chain = left @ chain
        folded.append(w @ (right @ chain))
    return torch.stack(folded[::-1])


def feedback_loop(z: torch.Tensor, linear: torch.Tensor, linear2: torch.Tensor) -> Any:
    signals = []
    for left, right in zip(linear.flip(0), linear2.flip(0), strict=True):
        z = F.linear(z, left)
        signals.append(F.linear(z, right))
    return tuple(signals[::-1])


def attention_cost(call: Call) -> Cost:
    x, td, weight, _ = call.args
    b, n, c = x.shape
    a = weight.shape[0] // 3
    asked = call.kwargs.get("num_queries") or n
    item = x.element_size()
    flops = 2.0 * b * c * a * (asked + 2 * n) + 4.0 * b * asked * n * a
    bytes_ = item * ((1 + (td is not None)) * b * n * c + b * asked * a + 3 * a * c)
    if any(tensor.requires_grad for tensor in call.tensors()):
        full = x.requires_grad or weight.requires_grad
        flops += (6.0 if full else 2.0) * b * n * c * a + (10.0 if full else 4.0) * b * n * n * a
        bytes_ += item * ((2 + (td is not None)) * b * n * c + 3 * b * n * a + 3 * a * c)
    return Cost(flops, bytes_)


def sdpa_cost(call: Call) -> Cost:
    q, k = call.args[:2]
    b, h, n, d = q.shape
    m = k.shape[2]
    grad = q.requires_grad
    tensors = sum(t.numel() for t in call.args if t is not None) + q.numel()
    return Cost(
        (14.0 if grad else 4.0) * b * h * n * m * d, (2 if grad else 1) * tensors * q.element_size()
    )


def select_cost(call: Call) -> Cost:
    x = call.args[0]
    grad = any(tensor.requires_grad for tensor in call.tensors())
    passes = 5 if grad else 2
    return Cost((15.0 if grad else 5.0) * x.numel(), passes * x.numel() * x.element_size())


def feedback_cost(call: Call) -> Cost:
    z, linear = call.args[:2]
    depth, c = len(linear), z.shape[-1]
    item = z.element_size()
    return Cost(4.0 * depth * z.numel() * c, item * ((1 + depth) * z.numel() + 2 * depth * c * c))


def fold_cost(call: Call) -> Cost:
    v_weight = call.args[0]
    depth, a, c = v_weight.shape
    item = v_weight.element_size()
    return Cost(2.0 * depth * c * c * (2 * a + c), item * depth * (2 * a * c + 2 * c * c))
