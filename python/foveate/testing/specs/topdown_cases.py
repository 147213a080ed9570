"""topdown_attention: sizes, options and random inputs of its ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from foveate.testing.spec import Call, Cases


def maker(dtype: torch.dtype, device: str, seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int, scale: float = 1.0, grad: bool = True) -> torch.Tensor:
        values = scale * torch.randn(shape, generator=generator)
        return values.to(device, dtype).requires_grad_(grad)

    return make


def _mask(
    kind: str | None, scores: tuple[int, int, int, int], device: str, seed: int
) -> torch.Tensor | None:
    """Masks of several broadcast shapes; the last query of "closed" has no allowed key."""
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(seed + 1)
    b, h, n, m = scores
    sizes = {
        "bool": scores,
        "closed": (n, m),
        "keys": (b, 1, 1, m),
        "queries": (1, h, n, 1),
        "float": scores,
        "float keys": (m,),
    }[kind]
    noise = torch.randn(sizes, generator=generator)
    if kind.startswith("float"):
        return noise.masked_fill(noise > 1.5, -torch.inf).to(device)
    allowed = noise > -0.5
    if kind == "closed" and n:
        allowed[-1] = False
    return allowed.to(device)


def attention_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    b, n, c, h = case["b"], case["n"], case["c"], case["h"]
    a = h * case.get("d", c // h)
    make = maker(dtype, device, seed)
    x = make(b, n, c, grad=case.get("grad", "all") in ("all", "frozen"))
    td = make(b, n, c) if case.get("td", True) else None
    trains = case.get("grad", "all") == "all"
    weight = make(3 * a, c, scale=max(c, 1) ** -0.5, grad=trains)
    bias = make(3 * a, scale=0.5, grad=trains) if case.get("bias", True) else None
    queries = case.get("num_queries")
    kwargs: dict[str, Any] = {"num_heads": h, "td_bias": case.get("td_bias", "twice")}
    if case.get("causal"):
        kwargs["is_causal"] = True
    mask = _mask(case.get("mask"), (b, h, queries or n, n), device, seed)
    if mask is not None:
        kwargs["attn_mask"] = mask
    if queries:
        kwargs["num_queries"] = queries
    if "scale" in case:
        kwargs["scale"] = case["scale"]
    return Call((x, td, weight, bias), kwargs)


def _attention_draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    n = integers(1, 40)
    mask = (None, "bool", "closed", "keys", "queries", "float", "float keys")[integers(0, 6)]
    causal = mask is None and integers(0, 2) == 0
    queries = integers(1, n) if not causal and integers(0, 2) == 0 else None
    return {
        "b": integers(0, 2),
        "n": n,
        "c": integers(1, 24),
        "h": integers(1, 3),
        "d": integers(1, 20),
        "td": integers(0, 3) > 0,
        "bias": integers(0, 2) > 0,
        "td_bias": ("twice", "once")[integers(0, 1)],
        "grad": ("all", "frozen", "td")[integers(0, 2)],
        "mask": mask,
        "causal": causal,
        "num_queries": queries,
        "scale": (0.5, -0.25, 1e-3)[integers(0, 2)],
    }


ATTENTION_CASES = Cases(
    {
        "one": {"b": 1, "n": 1, "c": 4, "h": 1},
        "tiny": {"b": 1, "n": 3, "c": 4, "h": 2},
        "empty": {"b": 0, "n": 3, "c": 4, "h": 2},
        "no tokens": {"b": 2, "n": 0, "c": 4, "h": 2},
        "panel": {"b": 2, "n": 16, "c": 24, "h": 3, "d": 16},
        "panel + 1": {"b": 1, "n": 17, "c": 16, "h": 1, "d": 17, "td_bias": "once"},
        "half a panel over": {"b": 1, "n": 25, "c": 12, "h": 2, "d": 8},
        "odd": {"b": 2, "n": 13, "c": 26, "h": 2},
        "plain": {"b": 1, "n": 50, "c": 32, "h": 2, "td": False},
        "no bias": {"b": 1, "n": 33, "c": 32, "h": 1, "bias": False},
        "wide heads": {"b": 1, "n": 34, "c": 20, "h": 2, "d": 80},
        "frozen": {"b": 1, "n": 65, "c": 32, "h": 2, "grad": "frozen"},
        "only td": {"b": 2, "n": 49, "c": 32, "h": 2, "grad": "td"},
        "causal": {"b": 1, "n": 70, "c": 16, "h": 2, "causal": True},
        "closed row": {"b": 2, "n": 19, "c": 16, "h": 2, "mask": "closed"},
        "mask of keys": {"b": 2, "n": 20, "c": 16, "h": 2, "mask": "keys", "grad": "frozen"},
        "mask of queries": {"b": 2, "n": 20, "c": 16, "h": 2, "mask": "queries"},
        "added mask": {"b": 1, "n": 31, "c": 16, "h": 2, "mask": "float"},
        "one query": {"b": 2, "n": 37, "c": 16, "h": 2, "num_queries": 1},
        "masked queries": {"b": 1, "n": 37, "c": 16, "h": 2, "num_queries": 7, "mask": "bool"},
        "class token": {"b": 1, "n": 197, "c": 32, "h": 1, "d": 32},
    },
    _attention_draw,
)


def sdpa_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    b, h, n, d = case["b"], case["h"], case["n"], case["d"]
    m = case.get("m", n)
    make = maker(dtype, device, seed)
    q, k, v = make(b, h, n, d), make(b, h, m, d), make(b, h, m, d)
    v_td = make(b, h, m, d) if case.get("td", True) else None
    kwargs: dict[str, Any] = {}
    if case.get("causal"):
        kwargs["is_causal"] = True
    mask = _mask(case.get("mask"), (b, h, n, m), device, seed)
    if mask is not None:
        kwargs["attn_mask"] = mask
    if "scale" in case:
        kwargs["scale"] = case["scale"]
    return Call((q, k, v, v_td), kwargs)


def _sdpa_draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    n = integers(0, 40)
    mask = (None, "bool", "closed", "keys", "queries", "float", "float keys")[integers(0, 6)]
    causal = mask is None and integers(0, 2) == 0
    return {
        "b": integers(0, 2),
        "h": integers(1, 3),
        "n": n,
        "m": n if causal else integers(1, 40),
        "d": integers(1, 20),
        "td": integers(0, 1) > 0,
        "mask": mask,
        "causal": causal,
        "scale": (0.5, -0.25, 1e-3)[integers(0, 2)],
    }


SDPA_CASES = Cases(
    {
        "one": {"b": 1, "h": 1, "n": 1, "d": 4},
        "tiny": {"b": 1, "h": 2, "n": 3, "m": 5, "d": 4},
        "empty": {"b": 0, "h": 2, "n": 3, "d": 4},
        "no keys": {"b": 1, "h": 2, "n": 3, "m": 0, "d": 4},
        "no queries": {"b": 1, "h": 2, "n": 0, "m": 3, "d": 4},
        "panel": {"b": 1, "h": 2, "n": 6, "m": 16, "d": 16},
        "panel + 1": {"b": 2, "h": 1, "n": 7, "m": 17, "d": 17},
        "row block + 1": {"b": 1, "h": 1, "n": 97, "m": 33, "d": 8},
        "no td": {"b": 1, "h": 2, "n": 21, "m": 40, "d": 13, "td": False},
        "causal": {"b": 1, "h": 2, "n": 65, "d": 16, "causal": True},
        "closed row": {"b": 1, "h": 2, "n": 9, "m": 12, "d": 8, "mask": "closed"},
        "added mask": {"b": 2, "h": 2, "n": 9, "m": 31, "d": 8, "mask": "float keys"},
    },
    _sdpa_draw,
)


def select_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    b, n, c = case["b"], case["n"], case["c"]
    make = maker(dtype, device, seed)
    x = make(b, n, c, grad=case.get("grad", True))
    prompt = make(b, c) if case.get("per_image") else make(c)
    transform = make(c, c, scale=max(c, 1) ** -0.5) if case.get("transform") else None
    if case.get("zero") and b and n:
        with torch.no_grad():
            x[0, 0] = 0
    if case.get("along") and b and n:
        with torch.no_grad():
            x[0, -1] = prompt if prompt.ndim == 1 else prompt[0]
            x[-1, 0] = -x[0, -1]
    kwargs: dict[str, Any] = {"return_mask": case.get("mask", False)}
    if "eps" in case:
        kwargs["eps"] = case["eps"]
    return Call((x, prompt, transform), kwargs)


def _select_draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    return {
        "b": integers(0, 3),
        "n": integers(0, 70),
        "c": integers(1, 40),
        "grad": integers(0, 1) > 0,
        "per_image": integers(0, 1) > 0,
        "transform": integers(0, 1) > 0,
        "mask": integers(0, 1) > 0,
        "zero": integers(0, 1) > 0,
    }


SELECT_CASES = Cases(
    {
        "one": {"b": 1, "n": 1, "c": 1, "mask": True},
        "tiny": {"b": 2, "n": 3, "c": 4, "mask": True, "transform": True},
        "per image, tiny": {"b": 2, "n": 3, "c": 5, "mask": True, "per_image": True},
        "empty": {"b": 0, "n": 3, "c": 4},
        "no tokens": {"b": 2, "n": 0, "c": 4},
        "vector": {"b": 1, "n": 5, "c": 8},
        "vector + 1": {"b": 1, "n": 5, "c": 9, "mask": True},
        "row block - 1": {"b": 1, "n": 63, "c": 16},
        "row block": {"b": 2, "n": 32, "c": 16, "per_image": True},
        "row block + 1": {"b": 1, "n": 65, "c": 17, "mask": True},
        "zero row": {"b": 2, "n": 7, "c": 19, "zero": True, "mask": True},
        "frozen tokens": {"b": 2, "n": 70, "c": 32, "grad": False},
        "large eps": {"b": 2, "n": 7, "c": 8, "eps": 3.0, "mask": True},
        "wide": {"b": 1, "n": 6, "c": 768, "transform": True},
    },
    _select_draw,
)


def feedback_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    b, n, c, depth = case["b"], case["n"], case["c"], case["L"]
    make = maker(dtype, device, seed)
    stacks = [make(depth, c, c, scale=c**-0.5) for _ in range(2)]
    if case.get("lists"):
        stacks = [list(stack.detach().unbind(0)) for stack in stacks]  # type: ignore[misc]
    return Call((make(b, n, c), *stacks))


def fold_inputs(case: dict[str, Any], dtype: torch.dtype, device: str, seed: int) -> Call:
    c, depth = case["c"], case["L"]
    make = maker(dtype, device, seed)
    scale = c**-0.5
    args = [make(depth, case.get("a", c), c, scale=scale)]
    args += [make(depth, c, c, scale=scale) for _ in range(2)]
    return Call((*args, make(c, c, scale=scale) if case.get("transform", True) else None))


def _feedback_draw(integers: Callable[[int, int], int]) -> dict[str, Any]:
    return {
        "b": integers(0, 2),
        "n": integers(0, 9),
        "c": integers(1, 12),
        "a": integers(1, 12),
        "L": integers(1, 4),
        "lists": integers(0, 1) > 0,
        "transform": integers(0, 1) > 0,
    }


FEEDBACK_CASES = Cases(
    {
        "tiny": {"b": 1, "n": 2, "c": 3, "L": 2},
        "empty": {"b": 0, "n": 2, "c": 3, "L": 2},
        "one block": {"b": 2, "n": 5, "c": 8, "L": 1},
        "sequences": {"b": 2, "n": 5, "c": 8, "L": 3, "lists": True},
        "six blocks": {"b": 1, "n": 17, "c": 16, "L": 6},
    },
    _feedback_draw,
)
FOLD_CASES = Cases(
    {
        "tiny": {"c": 3, "a": 2, "L": 2},
        "no transform": {"c": 5, "a": 4, "L": 2, "transform": False},
        "one block": {"c": 8, "L": 1},
        "six blocks": {"c": 16, "a": 24, "L": 6},
    },
    _feedback_draw,
)
