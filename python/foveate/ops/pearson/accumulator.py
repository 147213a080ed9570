"""Correlation of two networks' units over a stream of batches."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from foveate._checks import integer, one_of
from foveate.ops.pearson import comoment, intake
from foveate.ops.pearson.checkpoint import dump, load, on_cpu
from foveate.ops.pearson.comoment import CoMoment
from foveate.ops.pearson.grids import RESAMPLERS, check_grid, joint_grid
from foveate.ops.pearson.layers import LayerInfo, LayerSpec
from foveate.ops.pearson.matching import (
    RANKINGS,
    PartialTopK,
    TopK,
    backend_module,
    check_k,
    pair_of_k,
)
from foveate.ops.pearson.policies import CONSTANTS, NAN_POLICIES, PRECISIONS
from foveate.ops.pearson.summary import PearsonSummary, summarise

MODES = ("pearson", "iccv2023")
STORES = ("products", "samples")
_TILE = 2048  # rows of the co-moments that a stored stream forms at a time
_VERSION = 1
_OPTIONS = ("mode", "grid", "resample", "precision")
_SETTINGS = (*_OPTIONS, "store", "acc_dtype", "nan_policy", "constant")


class PearsonAccumulator:
    """Pearson's r of every unit of A with every unit of B, over any number of batches.

    The state is central (means, variances and co-moments by Chan's update), the co-moments are
    float64 by default, and no map is resized to the larger grid.
    Source: Dravid, Gandelsman, Efros, Shocher, "Rosetta Neurons" (ICCV 2023), section 3.

    Args:
        layers_a: LayerSpec of all layers of A, or name -> LayerSpec.
        layers_b: the same for B.
        mode: "pearson", r over the whole stream, whatever the batches; or "iccv2023", the mean over
            batches of the batch's cosine after subtracting `means`.
        means: for iccv2023, (means_a, means_b), each `[c]` or name -> `[c]`.
        grid: "pair-max", (H, W), "a", "b" or "native", as in `pearson_matrix`.
        resample: "bilinear", "nearest" or "area".
        precision: floor on the accuracy of the products, as in `pearson_matrix`.
        store: "products" keeps the co-moments `[c1, c2]`; "samples" keeps the activations.
        acc_dtype: of the co-moments, float64 or float32.
        k_stage: samples of one product; None: the backend's.
        memory_limit: bytes that the store may take; None: 80 % of what is free at first.
        nan_policy: "propagate", "raise" or "omit", as in `pearson_matrix`.
        constant: r of a unit without variance: "nan" or "zero".
        device: None: that of the first batch.
        backend: "auto", "reference" or "cpu".

    Raises:
        ValueError: an unknown choice, or options that iccv2023 does not have.
    """

    def __init__(
        self,
        *,
        layers_a: LayerSpec | Mapping[str, LayerSpec] | None = None,
        layers_b: LayerSpec | Mapping[str, LayerSpec] | None = None,
        mode: str = "pearson",
        means: tuple[Any, Any] | None = None,
        grid: str | tuple[int, int] = "pair-max",
        resample: str = "bilinear",
        precision: str = "fp32",
        store: str = "products",
        acc_dtype: torch.dtype = torch.float64,
        k_stage: int | None = None,
        memory_limit: int | None = None,
        nan_policy: str = "propagate",
        constant: str = "nan",
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        one_of("mode", mode, MODES)
        check_grid(grid)
        one_of("resample", resample, RESAMPLERS)
        one_of("precision", precision, PRECISIONS)
        one_of("store", store, STORES)
        one_of("nan_policy", nan_policy, NAN_POLICIES)
        one_of("constant", constant, CONSTANTS)
        one_of("acc_dtype", acc_dtype, (torch.float64, torch.float32))
        one_of("backend", backend, ("auto", "reference", "cpu", "triton", "cuda"))
        if k_stage is not None:
            integer("k_stage", k_stage, 1)
        if memory_limit is not None:
            integer("memory_limit", memory_limit, 0)
        if mode == "iccv2023":
            if means is None:
                raise ValueError("means must be (means_a, means_b) with mode='iccv2023', got None")
            if nan_policy != "propagate" or constant != "nan":
                raise ValueError(
                    "mode='iccv2023' has its own policy: nan_policy and constant must be left, "
                    f"got nan_policy={nan_policy!r}, constant={constant!r}; its means are fixed"
                )
            if not isinstance(means, (tuple, list)) or len(means) != 2:
                raise ValueError(f"means must be (means_a, means_b), got {type(means).__name__}")
        self.layers_a, self.layers_b = layers_a, layers_b
        self.mode, self.means = mode, means
        self.grid = grid if isinstance(grid, str) else (int(grid[0]), int(grid[1]))
        self.resample, self.precision, self.store = resample, precision, store
        self.acc_dtype, self.k_stage, self.memory_limit = acc_dtype, k_stage, memory_limit
        self.nan_policy, self.constant, self.backend = nan_policy, constant, backend
        self.device = None if device is None else torch.device(device)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was seen."""
        self.count = 0
        self.omitted = 0
        self.layout_a: tuple[LayerInfo, ...] = ()
        self.layout_b: tuple[LayerInfo, ...] = ()
        self._wide = False
        self._sealed = False
        self._state: CoMoment | None = None
        self._samples: list[dict[str, Any]] = []

    def update(self, a: Any, b: Any, *, weight: Any = None) -> PearsonAccumulator:
        """Add a batch.

        Args:
            a: tensor, list of tensors or dict name -> tensor, each `[s, c]`, `[n, t, c]` or
                `[n, c, h, w]`; detached. The first batch fixes names, order, channels and grids.
            b: the same of network B, with the same first size.
            weight: `[n]`, not negative; None: ones.

        Raises:
            ValueError: shapes, names, devices or weights that do not fit.
            TypeError: an input that is no floating tensor, or float64 after float32.
            RuntimeError: over `memory_limit`, or after all_reduce_.
        """
        self._open("update")
        read_a = intake.read_side("a", a, self.layers_a)
        read_b = intake.read_side("b", b, self.layers_b)
        n = intake.checked_batch(read_a, read_b, self.device)
        device = next(iter(read_a.values())).device
        weights = intake.checked_weight(weight, n, device, self.mode == "iccv2023")
        new_a, new_b = intake.layout_of(read_a), intake.layout_of(read_b)
        first = not self.layout_a
        if first:
            self._check_store(new_a, new_b, device)
        else:
            intake.check_same_layout("a", self.layout_a, new_a)
            intake.check_same_layout("b", self.layout_b, new_b)
            self._check_width(read_a, read_b)
        if n == 0:
            return self
        layout_a, layout_b = (new_a, new_b) if first else (self.layout_a, self.layout_b)
        self._fixed_means(layout_a, layout_b)
        kept = intake.kept_images((read_a, read_b), self.nan_policy)
        if first:
            self.layout_a, self.layout_b = layout_a, layout_b
            layers = (*read_a.values(), *read_b.values())
            self._wide = any(x.dtype == torch.float64 for x in layers)
            self.device = self.device or device
        maps = [
            [read[info.name] for info in layout]
            for read, layout in ((read_a, layout_a), (read_b, layout_b))
        ]
        used = kept
        if weights is not None:
            used = weights > 0 if kept is None else kept & (weights > 0)
        left = n if kept is None else int(kept.sum())
        if used is not None and not bool(used.all()):
            maps = [[x[used] for x in side] for side in maps]
            weights = None if weights is None else weights[used]
        if maps[0][0].shape[0] > 0:
            self._store(maps, weights)
        self.omitted += n - left
        self.count += left
        return self

    def compute(self, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """r `[c1, c2]`: float32, or float64 if the first batch held a float64 layer.

        Raises:
            RuntimeError: no image was seen.
        """
        self._seen("compute")
        state = self._full_state(None)
        dtype = self._dtype()
        if out is None:
            out = state.acc.new_empty(state.acc.shape, dtype=dtype)
        elif out.shape != state.acc.shape or out.dtype != dtype or out.device != state.acc.device:
            raise ValueError(
                f"out must be {tuple(state.acc.shape)} of {dtype} on {state.acc.device}, "
                f"got {tuple(out.shape)} of {out.dtype} on {out.device}"
            )
        target = out if out.stride(1) == 1 or out.shape[1] <= 1 else out.contiguous()
        comoment.finalize(self._module(), state, self.mode, self.constant, target)
        return out if target is out else out.copy_(target)

    def topk(
        self,
        k: int | tuple[int, int],
        *,
        side: str = "both",
        by: str = "signed",
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
    ) -> TopK:
        """The best partners of every unit, without the matrix.

        Args:
            k: int, or (k_a, k_b).
            side: "a" ranks B's units for each unit of A, "b" the reverse, "both".
            by: "signed", or "abs" to rank by |r|.
            rows: (start, stop), units of A; indices stay global.
            cols: the same of B.

        Returns:
            TopK: score descending, ties by the lower index, NaN never ranked.

        Raises:
            ValueError: k above the number of units it ranks, or a range that does not fit.
            RuntimeError: no image was seen.
        """
        one_of("side", side, ("a", "b", "both"))
        one_of("by", by, RANKINGS)
        k_a, k_b = pair_of_k(k)
        self._seen("topk")
        c1, c2 = self._sizes()
        span_a, span_b = _span("rows", rows, c1), _span("cols", cols, c2)
        if side != "b":
            check_k(k_a, c2, "b")
        if side != "a":
            check_k(k_b, c1, "a")
        wanted = (0 if side == "b" else k_a, 0 if side == "a" else k_b)
        if self.store == "products":
            found = self._tile_topk(self._full_state(None), wanted, by, span_a, span_b)
        else:
            found = self._stored_topk(wanted, by, span_a, span_b)
        kind = TopK if (span_a, span_b) == ((0, c1), (0, c2)) else PartialTopK
        of_a, of_b = found[:2] if side != "b" else (None, None), found[2:]
        return kind(*of_a, *(of_b if side != "a" else (None, None)))

    def summary(self, *, bins: int = 100, tails: int = 50) -> PearsonSummary:
        """Histogram, extreme pairs and moments of the rows and columns of r.

        Raises:
            RuntimeError: no image was seen.
        """
        integer("bins", bins, 1)
        integer("tails", tails, 0)
        self._seen("summary")
        return summarise(self.compute(), bins, tails)

    def merge_(self, other: PearsonAccumulator) -> PearsonAccumulator:
        """Add what `other` has seen; it is left as it is.

        Raises:
            ValueError: settings or layouts differ.
            RuntimeError: after all_reduce_.
        """
        self._open("merge_")
        if not isinstance(other, PearsonAccumulator):
            raise TypeError(f"other must be a PearsonAccumulator, got {type(other).__name__}")
        for name in _SETTINGS:
            _equal(name, getattr(self, name), getattr(other, name))
        if not other.layout_a:
            return self
        if not self.layout_a:
            self.layout_a, self.layout_b = other.layout_a, other.layout_b
            self._wide, self.device = other._wide, self.device or other.device
        _equal("layout_a", self.layout_a, other.layout_a)
        _equal("layout_b", self.layout_b, other.layout_b)
        _equal("float64", self._wide, other._wide)
        self.count += other.count
        self.omitted += other.omitted
        self._samples += other._samples
        if other._state is not None:
            comoment.merge(self._module(), self._products(), other._state, self.mode == "iccv2023")
        return self

    def all_reduce_(self, group: Any = None) -> PearsonAccumulator:
        """Every rank ends with the state of all ranks, also one that has seen nothing.

        Afterwards update, merge_ and all_reduce_ raise until `reset()`.
        """
        self._open("all_reduce_")
        from torch import distributed

        size = distributed.get_world_size(group)
        states: list[Any] = [None] * size
        distributed.all_gather_object(states, on_cpu(self.state_dict()), group=group)
        self.reset()
        for state in states:
            part = self._like()
            part.load_state_dict(state)
            self.merge_(part)
        self._sealed = True
        return self

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON-able values that `load_state_dict` takes."""
        return dump(self, _SETTINGS, _VERSION)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: its settings are not this accumulator's; the field and both values.
        """
        load(self, state, _SETTINGS, _VERSION)

    def _like(self) -> PearsonAccumulator:
        return PearsonAccumulator(
            layers_a=self.layers_a,
            layers_b=self.layers_b,
            means=self.means,
            device=self.device,
            backend=self.backend,
            memory_limit=self.memory_limit,
            **{name: getattr(self, name) for name in _SETTINGS},
        )

    def _open(self, name: str) -> None:
        if self._sealed:
            raise RuntimeError(f"{name} after all_reduce_ counts images twice: call reset() first")

    def _seen(self, name: str) -> None:
        if self.count == 0:
            raise RuntimeError(f"{name} needs at least one image, got 0: call update first")
        cells = [
            joint_grid(self.grid, a.grid, b.grid) for a in self.layout_a for b in self.layout_b
        ]
        if self.count == 1 and all(grid == (1, 1) for grid in cells):
            warnings.warn("one sample: every unit is constant", UserWarning, stacklevel=3)

    def _module(self) -> Any:
        assert self.device is not None
        return backend_module(self.backend, self.device.type)

    def _dtype(self) -> torch.dtype:
        return torch.float64 if self._wide else torch.float32

    def _sizes(self) -> tuple[int, int]:
        last_a, last_b = self.layout_a[-1], self.layout_b[-1]
        return last_a.start + last_a.channels, last_b.start + last_b.channels

    def _store(self, maps: list[list[torch.Tensor]], weight: torch.Tensor | None) -> None:
        if self.store == "products":
            self._add(self._products(), maps, weight, None)
            return
        batch = {"a": [x.clone() for x in maps[0]], "b": [x.clone() for x in maps[1]], "w": weight}
        held = sum(x.nbytes for s in (*self._samples, batch) for x in (*s["a"], *s["b"]))
        if self.memory_limit is not None and held > self.memory_limit:
            raise RuntimeError(
                f"the store needs {held} bytes, allowed are {self.memory_limit}: use topk on fewer "
                'images with store="samples", or store="products"'
            )
        self._samples.append(batch)

    def _check_width(self, *sides: dict[str, torch.Tensor]) -> None:
        for side, maps in zip("ab", sides, strict=True):
            for name, x in maps.items():
                if x.dtype == torch.float64 and not self._wide:
                    raise TypeError(
                        f"layer {name!r} of {side} must be no wider than torch.float32, as in the "
                        "first update, got torch.float64"
                    )

    def _fixed_means(
        self, layout_a: intake.Layout, layout_b: intake.Layout
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.means is None or self.mode != "iccv2023":
            return None
        return (
            intake.fixed_means("a", self.means[0], layout_a, self.device),
            intake.fixed_means("b", self.means[1], layout_b, self.device),
        )

    def _check_store(
        self, layout_a: intake.Layout, layout_b: intake.Layout, device: torch.device
    ) -> None:
        for info_a in layout_a:
            for info_b in layout_b:
                joint_grid(
                    self.grid, info_a.grid, info_b.grid, f"layers {info_a.name!r}, {info_b.name!r}"
                )
        if self.store == "samples":
            return
        c1, c2 = (sum(info.channels for info in layout) for layout in (layout_a, layout_b))
        needed = c1 * c2 * self.acc_dtype.itemsize
        limit = self.memory_limit
        if limit is None:
            limit = int(0.8 * intake.free_bytes(device))
        if needed > limit:
            raise RuntimeError(
                f"the store needs {needed} bytes, allowed are {limit}: use topk with "
                'store="samples", fewer layers, acc_dtype=torch.float32 or a larger memory_limit'
            )

    def _products(self) -> CoMoment:
        if self._state is None:
            self._state = self._empty(self.layout_a)
        return self._state

    def _empty(self, layout_a: tuple[LayerInfo, ...]) -> CoMoment:
        assert self.device is not None
        return comoment.empty_comoment(
            intake.grid_blocks(layout_a),
            intake.grid_blocks(self.layout_b),
            self.grid,
            self.resample,
            self.acc_dtype,
            self.device,
        )

    def _add(self, state: CoMoment, maps: Any, weight: torch.Tensor | None, rows: Any) -> None:
        means = self._fixed_means(self.layout_a, self.layout_b)
        if means is not None and rows is not None:
            means = (means[0][rows[0] : rows[1]], means[1])
        blocks = [
            intake.by_block(side.blocks, layers)
            for side, layers in zip((state.a, state.b), maps, strict=True)
        ]
        wide = self._wide or self.precision == "fp64"
        comoment.update(
            self._module(),
            state,
            blocks[0],
            blocks[1],
            weight,
            means,
            self.precision,
            wide,
            self.k_stage,
        )

    def _full_state(self, rows: tuple[int, int] | None) -> CoMoment:
        """The co-moments, of A's units in `rows`; from stored samples where they are not kept."""
        if self.store == "products":
            return self._products()
        span = rows or (0, self._sizes()[0])
        layout, cuts, start = [], [], 0
        for info in self.layout_a:
            low = max(span[0] - info.start, 0)
            high = min(span[1] - info.start, info.channels)
            cuts.append((low, max(high, low)))
            if high > low:
                layout.append(LayerInfo(info.name, high - low, info.grid, start))
                start += high - low
        state = self._empty(tuple(layout))
        for batch in self._samples:
            part = [x[:, low:high] for x, (low, high) in zip(batch["a"], cuts, strict=True)]
            part = [x for x in part if x.shape[1]]
            self._add(state, [part, batch["b"]], batch["w"], span)
        return state

    def _tile_topk(
        self, state: CoMoment, k: tuple[int, int], by: str, rows: Any, cols: Any
    ) -> tuple[torch.Tensor, ...]:
        own = (self.mode, self.constant, k, by, rows, cols, self._dtype())
        return comoment.topk(self._module(), state, *own)

    def _stored_topk(
        self, k: tuple[int, int], by: str, rows: tuple[int, int], cols: tuple[int, int]
    ) -> tuple[torch.Tensor, ...]:
        tops: list[tuple[torch.Tensor, ...]] = []
        for begin in range(rows[0], rows[1], _TILE):
            end = min(begin + _TILE, rows[1])
            state = self._full_state((begin, end))
            va, ia, vb, ib = self._tile_topk(state, k, by, (0, end - begin), cols)
            tops.append((va, ia, vb, torch.where(ib >= 0, ib + begin, -1)))
        values = torch.cat([top[2] for top in tops], 1)
        indices = torch.cat([top[3] for top in tops], 1)
        key = values.abs() if by == "abs" else values
        key = torch.where(values.isnan(), float("-inf"), key)
        order = key.sort(dim=1, descending=True, stable=True)[1][:, : k[1]]
        return (
            torch.cat([top[0] for top in tops]),
            torch.cat([top[1] for top in tops]),
            values.gather(1, order),
            indices.gather(1, order),
        )


def _span(name: str, given: Any, size: int) -> tuple[int, int]:
    if given is None:
        return 0, size
    start, stop = (int(x) for x in given)
    if not 0 <= start < stop <= size:
        raise ValueError(f"{name} must be (start, stop) in 0..{size}, got {tuple(given)}")
    return start, stop


def _equal(name: str, own: Any, other: Any) -> None:
    if own != other:
        raise ValueError(f"{name} must be {own!r} in both accumulators, got {other!r}")
