"""topdown_attention: calls that must be refused, and how."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from foveate.testing.spec import BadInput, Call


def _bad(id: str, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> BadInput:
    return BadInput(id, lambda: Call(args, kwargs), error, match)


_X = torch.zeros(2, 5, 8)
_W = torch.zeros(24, 8)
_B = torch.zeros(24)
_Q = torch.zeros(2, 2, 5, 4)
_M = torch.zeros(3, 8, 8)
_TD = r"td must be \[b, n, c\] = \(2, 5, 8\), prefix tokens included, got "


def bad_attention() -> tuple[BadInput, ...]:
    def bad(id: str, error: type[Exception], match: str, *args: Any, **kwargs: Any) -> BadInput:
        given = [*args, *(_X, _X, _W, _B)[len(args) :]]
        return _bad(id, error, match, *given, **{"num_heads": 2, **kwargs})

    return (
        bad("td without prefix", ValueError, _TD + r"\(2, 4, 8\)", _X, _X[:, 1:]),
        bad("td of one image", ValueError, _TD + r"\(1, 5, 8\)", _X, _X[:1]),
        bad("td width", ValueError, _TD + r"\(2, 5, 7\)", _X, _X[..., 1:]),
        bad("td 2-D", ValueError, _TD, _X, _X[0]),
        bad("x 2-D", ValueError, r"x must be \[b, n, c\], got \(5, 8\)", _X[0], None),
        bad("columns", ValueError, r"qkv_weight .* c = 8.*got \(24, 7\)", _X, _X, _W[:, 1:]),
        bad("rows", ValueError, r"qkv_weight must be \[3 a, c\].*got \(23, 8\)", _X, _X, _W[1:]),
        bad("heads", ValueError, "num_heads must divide a = 8.*got 3", num_heads=3),
        bad("bias", ValueError, r"qkv_bias must be .*\(24,\).*got \(23,\)", _X, _X, _W, _B[1:]),
        bad("no heads", ValueError, "num_heads must be at least 1, got 0", num_heads=0),
        bad("float heads", TypeError, "num_heads must be an int", num_heads=2.0),
        bad("bool heads", TypeError, "num_heads must be an int", num_heads=True),
        bad("td_bias", ValueError, "td_bias must be one of 'twice', 'once'", td_bias="thrice"),
        bad("backend", ValueError, "backend must be one of 'auto'", backend="gpu"),
        bad("num_queries 0", ValueError, r"num_queries must be in 1\.\.5, got 0", num_queries=0),
        bad("num_queries 6", ValueError, r"num_queries must be in 1\.\.5, got 6", num_queries=6),
        bad("num_queries float", TypeError, "num_queries must be an int", num_queries=1.5),
        bad("integers", TypeError, "x must be float16.*int64", _X.long(), None),
        bad(
            "mixed",
            TypeError,
            "one dtype: x is torch.float32, td is torch.float64",
            _X,
            _X.double(),
        ),
        bad("weight dtype", TypeError, "qkv_weight is torch.bfloat16", _X, _X, _W.bfloat16()),
        bad("a list", TypeError, "x must be a torch.Tensor", [[[1.0]]], None),
        bad("kinds", TypeError, "cannot be mixed", np.zeros((2, 5, 8), np.float32)),
        bad(
            "mask of integers",
            TypeError,
            "attn_mask must be bool or floating, got torch.int64",
            attn_mask=torch.ones(5, 5, dtype=torch.int64),
        ),
        bad(
            "mask shape",
            ValueError,
            r"attn_mask must be broadcastable to .*\(2, 2, 5, 5\), got \(4, 5\)",
            attn_mask=torch.ones(4, 5, dtype=torch.bool),
        ),
        bad(
            "mask 5-D",
            ValueError,
            "attn_mask must be broadcastable",
            attn_mask=torch.ones(1, 1, 1, 5, 5, dtype=torch.bool),
        ),
        bad(
            "mask and causal",
            ValueError,
            "attn_mask and is_causal",
            attn_mask=torch.ones(5, 5, dtype=torch.bool),
            is_causal=True,
        ),
        bad(
            "queries and causal",
            ValueError,
            "num_queries and is_causal",
            num_queries=2,
            is_causal=True,
        ),
        bad("scale", TypeError, "scale must be a number", scale="large"),
        bad("device", ValueError, "one device", _X, _X.to("meta")),
    )


def bad_sdpa() -> tuple[BadInput, ...]:
    return (
        _bad("q 3-D", ValueError, r"q must be \[b, h, n, d\], got \(2, 5, 4\)", _Q[0], _Q, _Q),
        _bad("k 3-D", ValueError, r"k must be \[b, h, m, d\]", _Q, _Q[0], _Q),
        _bad("k heads", ValueError, "k must be .*repeat the heads", _Q, _Q[:, :1], _Q[:, :1]),
        _bad("k width", ValueError, "k must be", _Q, _Q[..., 1:], _Q),
        _bad(
            "v length",
            ValueError,
            r"v must be .*\(2, 2, 5, 4\).*got \(2, 2, 4, 4\)",
            _Q,
            _Q,
            _Q[:, :, 1:],
        ),
        _bad("v_td batch", ValueError, "v_td must be", _Q, _Q, _Q, _Q[:1]),
        _bad(
            "causal",
            ValueError,
            "is_causal=True needs as many keys as queries, got m = 4, n = 5",
            _Q,
            _Q[:, :, 1:],
            _Q[:, :, 1:],
            is_causal=True,
        ),
        _bad(
            "mask and causal",
            ValueError,
            "attn_mask and is_causal",
            _Q,
            _Q,
            _Q,
            attn_mask=torch.ones(5, 5, dtype=torch.bool),
            is_causal=True,
        ),
        _bad(
            "mask of integers",
            TypeError,
            "attn_mask must be bool or floating",
            _Q,
            _Q,
            _Q,
            attn_mask=torch.ones(5, 5, dtype=torch.int32),
        ),
        _bad(
            "mask shape",
            ValueError,
            "attn_mask must be broadcastable",
            _Q,
            _Q,
            _Q,
            attn_mask=torch.ones(3, 1, 5, 5),
        ),
        _bad(
            "mixed",
            TypeError,
            "one dtype: q is torch.float32, k is torch.float16",
            _Q,
            _Q.half(),
            _Q,
        ),
        _bad("integers", TypeError, "q must be float16", _Q.int(), _Q, _Q),
        _bad("backend", ValueError, "backend must be one of", _Q, _Q, _Q, backend="gpu"),
    )


def bad_select() -> tuple[BadInput, ...]:
    p = torch.zeros(8)
    return (
        _bad("x 2-D", ValueError, r"x must be \[b, n, c\]", _X[0], p),
        _bad(
            "prompt width", ValueError, r"prompt must be \[c\] = \(8,\) or .*got \(7,\)", _X, p[1:]
        ),
        _bad(
            "prompt images", ValueError, r"prompt must be .*\(2, 8\), got \(3, 8\)", _X, _M[0, :3]
        ),
        _bad(
            "transform",
            ValueError,
            r"transform must be \[c, c\] = \(8, 8\), got \(8, 7\)",
            _X,
            p,
            _M[0, :, 1:],
        ),
        _bad("eps 0", ValueError, "eps must be greater than 0, got 0", _X, p, eps=0.0),
        _bad("eps negative", ValueError, "eps must be greater than 0", _X, p, eps=-1e-6),
        _bad("eps string", TypeError, "eps must be a number", _X, p, eps="small"),
        _bad("integers", TypeError, "x must be float16", _X.long(), p),
        _bad("mixed", TypeError, "prompt is torch.float64", _X, p.double()),
        _bad("prompt missing", TypeError, "prompt must be a torch.Tensor", _X, 3.0),
        _bad("backend", ValueError, "backend must be one of", _X, p, backend="gpu"),
    )


def bad_feedback() -> tuple[BadInput, ...]:
    return (
        _bad("z 2-D", ValueError, r"z must be \[b, n, c\]", _X[0], _M, _M),
        _bad(
            "length", ValueError, "linear2 must have 3 matrices, as linear, got 2", _X, _M, _M[:2]
        ),
        _bad("width", ValueError, r"linear\[0\] must be \[c, c\] = \(8, 8\)", _X, _M[..., 1:], _M),
        _bad("stack 2-D", ValueError, "linear must be a stack", _X, _M[0], _M),
        _bad("no blocks", ValueError, "linear must have at least one matrix", _X, [], []),
        _bad("not a stack", TypeError, "linear must be a tensor", _X, 1.0, _M),
        _bad("mixed", TypeError, r"linear\[0\] is torch.float64", _X, _M.double(), _M),
        _bad("backend", ValueError, "backend must be one of", _X, _M, _M, backend="gpu"),
    )


def bad_fold() -> tuple[BadInput, ...]:
    return (
        _bad(
            "length", ValueError, "linear must have 3 matrices, as v_weight, got 2", _M, _M[:2], _M
        ),
        _bad("length 2", ValueError, "linear2 must have 3 matrices", _M, _M, _M[:2]),
        _bad(
            "columns", ValueError, r"linear\[0\] must be \[c, c\] = \(7, 7\)", _M[..., 1:], _M, _M
        ),
        _bad("ragged", ValueError, r"v_weight\[1\] must be", [_M[0], _M[0, 1:]], _M[:2], _M[:2]),
        _bad("transform", ValueError, "transform must be", _M, _M, _M, _M[0, 1:]),
        _bad("mixed", TypeError, "one dtype", _M, _M.half(), _M),
        _bad("backend", ValueError, "backend must be one of", _M, _M, _M, backend="gpu"),
    )
