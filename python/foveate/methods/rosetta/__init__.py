"""Rosetta units: units of several networks that behave alike (ICCV 2023)."""

from foveate.methods.rosetta.driver import rosetta
from foveate.methods.rosetta.hooks import capture, default_layers
from foveate.methods.rosetta.plots import plot_sets
from foveate.methods.rosetta.result import RosettaResult
from foveate.methods.rosetta.sets import RosettaSet, rosetta_sets, self_clusters

__all__ = [
    "RosettaResult",
    "RosettaSet",
    "capture",
    "default_layers",
    "plot_sets",
    "rosetta",
    "rosetta_sets",
    "self_clusters",
]
