"""Rosetta sets: units of several networks that match each other."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from foveate._checks import integer, one_of
from foveate.methods._optional import optional
from foveate.ops.pearson.matching import Matches

RULES = ("star", "clique", "components")
RANKS = ("mean", "min", "sum", "max")
Unit = tuple[str, int]
_Edges = dict[tuple[str, str], dict[tuple[int, int], float]]


@dataclass(frozen=True)
class RosettaSet:
    """Units that match across networks."""

    units: dict[str, tuple[int, ...]]
    score: float
    edges: int


def _names(matches: Mapping[tuple[str, str], Matches]) -> list[str]:
    return list(dict.fromkeys(name for pair in matches for name in pair))


def _edges(matches: Mapping[tuple[str, str], Matches], min_corr: float | None) -> _Edges:
    """Scores of matched units by ordered pair of names, in both orientations."""
    found: _Edges = {}
    for (first, second), match in matches.items():
        pairs = zip(match.pairs.tolist(), match.scores.tolist(), strict=True)
        kept = {(i, j): s for (i, j), s in pairs if min_corr is None or s >= min_corr}
        found[first, second] = kept
        found[second, first] = {(j, i): s for (i, j), s in kept.items()}
    return found


def _score(scores: list[float], rank: str) -> float:
    if rank == "mean":
        return sum(scores) / len(scores)
    if rank == "sum":
        return sum(scores)
    return min(scores) if rank == "min" else max(scores)


def rosetta_sets(
    matches: Mapping[tuple[str, str], Matches],
    *,
    anchor: str | None = None,
    rule: str = "star",
    min_models: int | None = None,
    rank: str = "mean",
    min_corr: float | None = None,
) -> list[RosettaSet]:
    """Joins pairwise matches over networks.

    Source: Dravid, Gandelsman, Efros, Shocher, "Rosetta Neurons" (ICCV 2023), section 3.

    Args:
        matches: {(name_a, name_b): Matches}, either orientation.
        anchor: of "star"; None: the first name of the first key.
        rule: "star": anchor units with a match in every other network, the best-scoring one of
            each (ties: the lower unit); "clique": one unit of every network, all pairs matched;
            "components": connected components that span enough networks.
        min_models: networks that a set must span; None: all.
        rank: "mean", "min", "sum" or "max" over the set's edges.
        min_corr: edges below it are ignored.

    Returns:
        Sets by score descending, ties by units in the order of the networks.

    Raises:
        ValueError: an unknown choice or anchor, fewer than two networks, or a missing pair.
    """
    one_of("rule", rule, RULES)
    one_of("rank", rank, RANKS)
    names = _names(matches)
    if len(names) < 2:
        raise ValueError(f"matches must hold at least 2 networks, got {names}")
    anchor = names[0] if anchor is None else anchor
    if anchor not in names:
        raise ValueError(f"anchor must be one of {names}, got {anchor!r}")
    least = len(names) if min_models is None else integer("min_models", min_models, 2, len(names))
    edges = _edges(matches, min_corr)
    if rule == "star":
        wanted = [(anchor, name) for name in names if name != anchor]
    else:
        wanted = list(itertools.combinations(names, 2))
    for pair in wanted:
        if pair not in edges:
            raise ValueError(f"matches must hold the pair {pair}, got {list(matches)}")
    if rule == "star":
        found = _stars(edges, names, anchor, least)
    elif rule == "clique":
        found = _cliques(edges, names)
    else:
        found = _components(edges, names, least)
    sets = [RosettaSet(units, _score(scores, rank), len(scores)) for units, scores in found]
    return sorted(sets, key=lambda s: (-s.score, [s.units.get(name, ()) for name in names]))


_Found = list[tuple[dict[str, tuple[int, ...]], list[float]]]


def _stars(edges: _Edges, names: list[str], anchor: str, least: int) -> _Found:
    best: dict[int, dict[str, tuple[float, int]]] = {}
    for name in names:
        for (i, j), score in edges.get((anchor, name), {}).items():
            mine = best.setdefault(i, {})
            if name not in mine or (-score, j) < (-mine[name][0], mine[name][1]):
                mine[name] = (score, j)
    found: _Found = []
    for i, partners in best.items():
        if len(partners) + 1 >= least:
            units: dict[str, tuple[int, ...]] = {anchor: (i,)}
            units |= {name: (j,) for name, (_, j) in partners.items()}
            ordered = {name: units[name] for name in names if name in units}
            found.append((ordered, [score for score, _ in partners.values()]))
    return found


def _cliques(edges: _Edges, names: list[str]) -> _Found:
    chosen: list[tuple[tuple[int, ...], list[float]]] = [
        ((i, j), [score]) for (i, j), score in edges[names[0], names[1]].items()
    ]
    for depth in range(2, len(names)):
        neighbours: dict[int, list[int]] = {}
        for i, j in edges[names[0], names[depth]]:
            neighbours.setdefault(i, []).append(j)
        longer = []
        for units, scores in chosen:
            for j in neighbours.get(units[0], []):
                links = [
                    edges[names[at], names[depth]].get((unit, j)) for at, unit in enumerate(units)
                ]
                known = [link for link in links if link is not None]
                if len(known) == len(links):
                    longer.append(((*units, j), scores + known))
        chosen = longer
    return [
        ({name: (unit,) for name, unit in zip(names, units, strict=True)}, scores)
        for units, scores in chosen
    ]


def _components(edges: _Edges, names: list[str], least: int) -> _Found:
    root: dict[Unit, Unit] = {}

    def find(unit: Unit) -> Unit:
        root.setdefault(unit, unit)
        while root[unit] != unit:
            root[unit] = root[root[unit]]
            unit = root[unit]
        return unit

    links: list[tuple[Unit, float]] = []
    for first, second in itertools.combinations(names, 2):
        for (i, j), score in edges[first, second].items():
            root[find((first, i))] = find((second, j))
            links.append(((first, i), score))
    units: dict[Unit, dict[str, list[int]]] = {}
    scores: dict[Unit, list[float]] = {}
    for name, index in list(root):
        units.setdefault(find((name, index)), {}).setdefault(name, []).append(index)
    for unit, score in links:
        scores.setdefault(find(unit), []).append(score)
    return [
        ({name: tuple(sorted(part[name])) for name in names if name in part}, scores[key])
        for key, part in units.items()
        if len(part) >= least
    ]


def self_clusters(corr: Any, *, threshold: float = 0.5, linkage: str = "average") -> torch.Tensor:
    """Clusters of one network's units by 1 - r, agglomerative.

    Args:
        corr: `[c, c]` tensor or array, or a PearsonAccumulator of a network with itself.
        threshold: least r of a cluster, in the sense of `linkage`.
        linkage: "average", "single" or "complete".

    Returns:
        Labels `[c]` int64, numbered by first appearance; units whose row is NaN are alone.

    Raises:
        ValueError: `corr` is not square, or an unknown linkage.
    """
    one_of("linkage", linkage, ("average", "single", "complete"))
    matrix = corr.compute() if hasattr(corr, "compute") else torch.as_tensor(corr)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"corr must be [c, c], got {tuple(matrix.shape)}")
    distance = 1 - matrix.detach().cpu().double()
    alone = matrix.detach().cpu().diagonal().isnan()
    usable = (~alone).nonzero()[:, 0]
    labels = torch.arange(len(distance)) + len(distance)
    if len(usable) > 1:
        part = distance[usable][:, usable]
        part = ((part + part.T) / 2).clamp(min=0).fill_diagonal_(0)
        hierarchy = optional("scipy.cluster.hierarchy")
        condensed = optional("scipy.spatial.distance").squareform(part.numpy(), checks=False)
        tree = hierarchy.linkage(condensed, linkage)
        found = hierarchy.fcluster(tree, 1 - threshold, criterion="distance")
        labels[usable] = torch.as_tensor(found).long() - 1
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(int(x), len(numbers)) for x in labels]).long()
