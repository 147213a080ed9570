"""What rosetta finds, as a table and as files."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.methods._optional import optional
from foveate.methods.rosetta.sets import RosettaSet
from foveate.ops.pearson.layers import LayerInfo
from foveate.ops.pearson.matching import Matches

_VERSION = 1
_FORMAT = "foveate.rosetta"
_PARTS = ("pairs", "scores", "rank_a", "rank_b")


@dataclass(frozen=True, eq=False)
class RosettaResult:
    """Matches and sets of several networks.

    `baseline`: {(a, b): largest score [c1] of each unit of a against shuffled images}, or None.
    """

    layout: dict[str, tuple[LayerInfo, ...]]
    matches: dict[tuple[str, str], Matches]
    sets: list[RosettaSet]
    config: dict[str, Any]
    count: int
    baseline: dict[tuple[str, str], torch.Tensor] | None = None

    def unit(self, model: str, index: int) -> tuple[str, int]:
        """(layer, channel) of a unit's number."""
        for info in self.layout[model]:
            if info.start <= index < info.start + info.channels:
                return info.name, index - info.start
        raise ValueError(f"index must be a unit of {model!r}, got {index}")

    def index(self, model: str, layer: str, channel: int) -> int:
        """The number of a layer's channel."""
        for info in self.layout[model]:
            if info.name == layer and 0 <= channel < info.channels:
                return info.start + channel
        raise ValueError(f"{model!r} has no channel {channel} in a layer {layer!r}")

    def rows(self) -> list[dict[str, Any]]:
        """One dict per set: score, and name -> "layer:channel", several joined by a space."""
        table = []
        for found in self.sets:
            row: dict[str, Any] = {"score": found.score}
            for name, units in found.units.items():
                row[name] = " ".join("{}:{}".format(*self.unit(name, unit)) for unit in units)
            table.append(row)
        return table

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """The rows as a CSV file."""
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["score", *self.layout], restval="")
            writer.writeheader()
            writer.writerows(self.rows())

    def save(self, folder: str | os.PathLike[str]) -> None:
        """`rosetta.safetensors` and `rosetta.json` in a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, keys = {}, list(self.matches)
        for number, key in enumerate(keys):
            for part in _PARTS:
                tensors[f"{number}.{part}"] = getattr(self.matches[key], part).contiguous()
            if self.baseline is not None:
                tensors[f"{number}.baseline"] = self.baseline[key].contiguous()
        optional("safetensors.torch").save_file(tensors, folder / "rosetta.safetensors")
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "layout": {
                name: [[i.name, i.channels, list(i.grid), i.start] for i in infos]
                for name, infos in self.layout.items()
            },
            "pairs": [list(key) for key in keys],
            "sets": [{"units": s.units, "score": s.score, "edges": s.edges} for s in self.sets],
            "config": self.config,
            "count": self.count,
            "baseline": self.baseline is not None,
        }
        (folder / "rosetta.json").write_text(json.dumps(document, indent=1))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RosettaResult:
        """What `save` wrote.

        Raises:
            ValueError: a foreign file, or one of another version.
        """
        folder = Path(folder)
        document = json.loads((folder / "rosetta.json").read_text())
        version = document.get("version") if isinstance(document, dict) else None
        if version != _VERSION or document.get("format") != _FORMAT:
            raise ValueError(
                f"{folder} must hold a {_FORMAT} file of version {_VERSION}, got version {version}"
            )
        tensors = optional("safetensors.torch").load_file(folder / "rosetta.safetensors")
        keys = [(first, second) for first, second in document["pairs"]]
        return cls(
            {
                name: tuple(LayerInfo(n, c, (g[0], g[1]), s) for n, c, g, s in infos)
                for name, infos in document["layout"].items()
            },
            {
                key: Matches(*(tensors[f"{number}.{part}"] for part in _PARTS))
                for number, key in enumerate(keys)
            },
            [
                RosettaSet({n: tuple(u) for n, u in s["units"].items()}, s["score"], s["edges"])
                for s in document["sets"]
            ],
            document["config"],
            document["count"],
            {key: tensors[f"{number}.baseline"] for number, key in enumerate(keys)}
            if document["baseline"]
            else None,
        )
