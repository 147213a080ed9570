"""The contract of the losses' arguments: shapes, dtypes, devices, names. Values: pairs.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from foveate._arrays import as_tensors
from foveate._checks import FLOATING, one_of, same_device
from foveate.ops.pairwise_loss.pairs import Pairs

_INDEX = (torch.int32, torch.int64)
_INTEGER = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_SPARSE = (torch.sparse_coo, torch.sparse_csr)
SIGMOID_FORMS = (
    '"diagonal", None, an integer index [n], (ids_x [n], ids_y [m]), bool or floating targets '
    "[n, m], or sparse COO or CSR targets [n, m]"
)
INFO_NCE_FORMS = '"diagonal" or an integer index [n]'


def arrays(**values: Any) -> tuple[list[Any], Callable[[Any], Any]]:
    """The values with arrays as tensors, also inside pairs; and what gives results back."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, (tuple, list)):
            for index, item in enumerate(value):
                flat[f"{name}[{index}]"] = item
        elif value is not None and not isinstance(value, (bool, int, float, str)):
            flat[name] = value
    tensors, back = as_tensors(**flat)
    found = dict(zip(flat, tensors, strict=True))
    result: list[Any] = []
    for name, value in values.items():
        if isinstance(value, (tuple, list)):
            result.append(tuple(found[f"{name}[{index}]"] for index in range(len(value))))
        else:
            result.append(found.get(name, value))
    return result, back


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """A context in which products keep their dtype."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def features(x: Any, y: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y in one dtype, that of autocast where it is on."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor or a NumPy or CuPy array, "
                f"got {type(value).__name__}"
            )
        if value.dtype not in FLOATING:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}"
            )
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in (*x.shape, *y.shape):
        raise ValueError(
            "x must be [n, d] and y [m, d] with n, m, d at least 1, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    same_device(x=x, y=y)
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        # float64 is not autocast, as in torch.mm.
        x = x if x.dtype == torch.float64 else x.to(dtype)
        y = y if y.dtype == torch.float64 else y.to(dtype)
    if x.dtype != y.dtype:
        raise TypeError(f"x and y must have one dtype, got {x.dtype} and {y.dtype}")
    return x, y


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits and loss."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_element(name: str, value: Any, x: torch.Tensor) -> torch.Tensor:
    """A number or a tensor of one element as a scalar of the logits' dtype on x's device."""
    dtype = accumulator(x.dtype)
    if not isinstance(value, torch.Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                f"{name} must be a number or a floating tensor of one element, "
                f"got {type(value).__name__}"
            )
        return torch.full((), value, dtype=dtype, device=x.device)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor of one element, got {value.dtype}")
    if value.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    if value.device != x.device and value.device.type != "cpu":
        raise ValueError(f"{name} is on {value.device}, x is on {x.device}")
    return value.reshape(()).to(device=x.device, dtype=dtype)


def _no_gradient(**tensors: torch.Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require grad: it gets no gradient")


def _vector(name: str, value: Any, size: int, letter: str, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor [{letter}], got {type(value).__name__}")
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name} must have shape [{letter}] = ({size},), got {tuple(value.shape)}")
    same_device(x=x, **{name: value})
    return value


def ids(name: str, value: Any, x: torch.Tensor, n: int, m: int) -> tuple[Any, Any]:
    """The two vectors of a pair of ids."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be (ids_x [n], ids_y [m]), got {type(value).__name__}")
    found = []
    for part, letter, size in (("x", "n", n), ("y", "m", m)):
        label = f"{name}[{'xy'.index(part)}] (ids_{part})"
        tensor = value["xy".index(part)]
        if isinstance(tensor, torch.Tensor) and tensor.dtype not in _INTEGER:
            raise TypeError(f"{label} must be of an integer dtype, got {tensor.dtype}")
        found.append(_vector(label, tensor, size, letter, x))
    return found[0], found[1]


def weights(
    x: torch.Tensor, n: int, m: int, row_weight: Any, col_weight: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """row_weight [n] and col_weight [m], each floating or None."""
    for name, value, size, letter in (
        ("row_weight", row_weight, n, "n"),
        ("col_weight", col_weight, m, "m"),
    ):
        if value is None:
            continue
        _vector(name, value, size, letter, x)
        if value.dtype not in FLOATING:
            raise TypeError(f"{name} must be floating, got {value.dtype}")
        _no_gradient(**{name: value})
    return row_weight, col_weight


def weight_number(name: str, value: Any) -> float:
    """A finite number >= 0 as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value >= 0 or math.isinf(value):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return float(value)


def _index(positives: torch.Tensor, x: torch.Tensor, n: int) -> torch.Tensor:
    if positives.dtype not in _INDEX:
        raise TypeError(
            f"positives as an index must be of an integer dtype, int32 or int64, "
            f"got {positives.dtype}"
        )
    return _vector("positives", positives, n, "n", x)


def _sparse(positives: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """CSR row starts, columns and targets; duplicates are summed, columns ascend."""
    n = positives.shape[0]
    detached = positives.detach()
    if detached.layout == torch.sparse_csr:
        starts = detached.crow_indices().long()
        rows = torch.repeat_interleave(starts.diff())
        indices, values = torch.stack([rows, detached.col_indices().long()]), detached.values()
    else:
        indices, values = detached._indices(), detached._values()
    if values.dtype == torch.bool:
        values = values.float()  # duplicates of True are summed too
    summed = torch.sparse_coo_tensor(
        indices, values, positives.shape, check_invariants=False
    ).coalesce()
    rows, columns = summed.indices()
    counts = torch.bincount(rows, minlength=n)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return starts, columns.contiguous(), summed.values()


def sigmoid_pairs(
    positives: Any, ignore: Any, share: Any, x: torch.Tensor, m: int, columns: int
) -> Pairs:
    """The pairs of `sigmoid_loss`, without weights, of this process's `m` of `columns` columns."""
    n = x.shape[0]
    one_of("positive_share", share, ("each", "row", "both"))
    a = b = c = None
    if positives is None:
        form = "none"
    elif isinstance(positives, str):
        if positives != "diagonal":
            raise ValueError(f"positives must be {SIGMOID_FORMS}, got {positives!r}")
        if n != m:
            raise ValueError(
                f'positives="diagonal" needs as many rows as columns, got n = {n} and m = {m}'
            )
        form = "diagonal"
    elif isinstance(positives, (tuple, list)):
        form = "ids"
        a, b = ids("positives", positives, x, n, m)
    elif not isinstance(positives, torch.Tensor):
        raise TypeError(f"positives must be {SIGMOID_FORMS}, got {type(positives).__name__}")
    elif positives.layout in _SPARSE or positives.ndim == 2:
        form = "dense" if positives.layout == torch.strided else "sparse"
        if positives.dtype not in (*FLOATING, torch.bool):
            raise TypeError(f"positives as targets must be bool or floating, got {positives.dtype}")
        if tuple(positives.shape) != (n, columns):
            raise ValueError(
                f"positives must have shape [n, m] = ({n}, {columns}), got {tuple(positives.shape)}"
            )
        _no_gradient(positives=positives)
        same_device(x=x, positives=positives)
        if form == "dense":
            a = positives
        else:
            a, b, c = _sparse(positives)
    elif positives.layout == torch.strided:
        form = "index"
        a = _index(positives, x, n)
    else:
        raise ValueError(f"positives must be {SIGMOID_FORMS}, got layout {positives.layout}")
    if share != "each" and form != "ids":
        raise ValueError(
            "positive_share must be 'each' unless positives are ids (of 'each', 'row', 'both'), "
            f"got {share!r}"
        )
    ignore_x = ignore_y = None
    if ignore is not None:
        ignore_x, ignore_y = ids("ignore", ignore, x, n, m)
    return Pairs(form, 0, a, b, c, None, ignore_x, ignore_y, share, None, None, 1.0, 1.0, 0.0)


def info_nce_pairs(positives: Any, ignore: Any, symmetric: bool, x: torch.Tensor, m: int) -> Pairs:
    """The pairs of `info_nce_loss`."""
    n = x.shape[0]
    a = None
    if isinstance(positives, str):
        if positives != "diagonal":
            raise ValueError(f"positives must be {INFO_NCE_FORMS}, got {positives!r}")
        if n > m or (symmetric and n != m):
            needs = "as many rows as columns" if symmetric else "at most as many rows as columns"
            raise ValueError(f'positives="diagonal" needs {needs}, got n = {n} and m = {m}')
        form = "diagonal"
    elif isinstance(positives, torch.Tensor):
        if symmetric:
            raise ValueError("positives as an index need symmetric=False, got symmetric=True")
        form = "index"
        a = _index(positives, x, n)
    else:
        raise ValueError(f"positives must be {INFO_NCE_FORMS}, got {type(positives).__name__}")
    ignore_x = ignore_y = None
    if ignore is not None:
        ignore_x, ignore_y = ids("ignore", ignore, x, n, m)
    return Pairs(
        form, 0, a, None, None, None, ignore_x, ignore_y, "each", None, None, 1.0, 1.0, 0.0
    )


_SEEN: set[tuple[Any, ...]] = set()  # CUDA calls whose values have been checked, by signature


def checks_values(check: bool | None, signature: tuple[Any, ...], device: str) -> bool:
    """Whether this call checks values: by default on CPU always, on CUDA once per signature."""
    one_of("check", check, (None, True, False))
    if check is not None:
        return check
    if device == "cpu":
        return True
    if torch.compiler.is_compiling() or signature in _SEEN:
        return False
    _SEEN.add(signature)
    return True
