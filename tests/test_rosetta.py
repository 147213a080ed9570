"""Rosetta units: sets by hand, hooks, a channel-permuted twin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from foveate import LayerSpec, Matches, PearsonAccumulator
from foveate.methods import rosetta as method

rosetta, rosetta_sets, capture = method.rosetta, method.rosetta_sets, method.capture


def matches(*triples):
    pairs = torch.tensor([t[:2] for t in triples]).reshape(-1, 2)
    scores = torch.tensor([t[2] for t in triples], dtype=torch.float64)
    zeros = torch.zeros(len(triples), dtype=torch.int64)
    return Matches(pairs, scores, zeros, zeros)


FOUR = {
    ("p", "q"): matches((0, 1, 0.75), (0, 2, 0.75), (1, 3, 0.5)),
    ("r", "p"): matches((4, 0, 1.0), (5, 1, 0.25)),
    ("p", "s"): matches((0, 6, 0.5)),
    ("q", "r"): matches((1, 4, 0.5)),
    ("q", "s"): matches((1, 6, 0.25)),
    ("r", "s"): matches((4, 6, 0.75)),
}


def test_three_rules_join_four_networks_as_by_hand():
    (star,) = rosetta_sets(FOUR)
    assert star.units == {"p": (0,), "q": (1,), "r": (4,), "s": (6,)}
    assert (star.score, star.edges) == (0.75, 3)
    some = rosetta_sets(FOUR, min_models=3, rank="min")
    assert [s.units for s in some][1] == {"p": (1,), "q": (3,), "r": (5,)}
    assert [s.score for s in some] == [0.5, 0.25]
    (clique,) = rosetta_sets(FOUR, rule="clique", rank="sum")
    assert (clique.units["q"], clique.score, clique.edges) == ((1,), 3.75, 6)
    whole, part = rosetta_sets(FOUR, rule="components", min_models=3, rank="max")
    assert whole.units == {"p": (0,), "q": (1, 2), "r": (4,), "s": (6,)}
    assert (whole.score, part.units) == (1.0, {"p": (1,), "q": (3,), "r": (5,)})
    assert rosetta_sets(FOUR, rule="clique", min_corr=0.3) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rule": "ring"}, "rule must be one of 'star'"),
        ({"rank": "last"}, "rank must be one of 'mean'"),
        ({"anchor": "x"}, "anchor must be one of"),
        ({"min_models": 5}, r"min_models must be in 2\.\.4"),
    ],
)
def test_unknown_choices_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        rosetta_sets(FOUR, **given)
    with pytest.raises(ValueError, match="at least 2 networks"):
        rosetta_sets({})
    with pytest.raises(ValueError, match=r"the pair \('q', 'r'\)"):
        rosetta_sets({k: v for k, v in FOUR.items() if k != ("q", "r")}, rule="clique")


def test_clusters_join_units_that_correlate():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    units = torch.stack([x[:, 0], x[:, 1], x[:, 0] * 2, x[:, 2] * 0, x[:, 1] + 1], 1)
    acc = PearsonAccumulator().update(units, units)
    for linkage in ("average", "single", "complete"):
        assert method.self_clusters(acc, linkage=linkage).tolist() == [0, 1, 0, 2, 1]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(),
    )


def twin(model, order):
    copy = network(1)
    copy.load_state_dict(model.state_dict())
    copy[2].weight.data = model[2].weight.data[order]
    copy[2].bias.data = model[2].bias.data[order]
    return copy


def images(count=24, seed=2):
    x = torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return list(x.split(8))


@pytest.mark.parametrize("mode", ["pearson", "iccv2023"])
def test_a_channel_permuted_twin_is_found_with_score_one(mode, tmp_path):
    model = network(0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    other = twin(model, order)
    state = torch.random.get_rng_state()
    layers = {"one": ["3"], "two": ["3"]}
    models = {"one": model, "two": other}
    found = rosetta(models, images(), layers=layers, k=1, mode=mode, baseline=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    pairs = found.matches["one", "two"].pairs
    assert torch.equal(order[pairs[:, 1]], pairs[:, 0])
    assert len(pairs) == 8
    assert found.sets[0].score > 1 - 1e-5
    assert bool((found.baseline["one", "two"] < 0.9).all())
    assert found.unit("two", 3) == ("3", 3)
    assert found.index("one", "3", 5) == 5
    assert found.rows()[0]["one"].startswith("3:")
    found.save(tmp_path)
    again = method.RosettaResult.load(tmp_path)
    assert again.sets == found.sets
    assert again.layout == found.layout
    assert torch.equal(again.matches["one", "two"].scores, found.matches["one", "two"].scores)
    found.to_csv(tmp_path / "sets.csv")
    assert len((tmp_path / "sets.csv").read_text().splitlines()) == 9
    text = (tmp_path / "rosetta.json").read_text().replace('"version": 1', '"version": 9')
    (tmp_path / "rosetta.json").write_text(text)
    with pytest.raises(ValueError, match="got version 9"):
        method.RosettaResult.load(tmp_path)


def test_hooks_read_before_in_place_modules_and_leave_nothing_behind():
    model = network(4).eval()
    x = images()[0]
    with capture(model, ["0", "1"]) as maps:
        model(x)
        assert bool((maps["0"] < 0).any())
        assert torch.equal(maps["0"].relu(), maps["1"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    shared = nn.ReLU()
    twice = nn.Sequential(shared, shared)
    with capture(twice, ["0"]), pytest.raises(RuntimeError, match="'0' must be called once"):
        twice(x)
    assert not shared._forward_hooks
    with pytest.raises(ValueError, match="'9'; the closest are"), capture(model, ["9"]):
        pass


class Pair(nn.Module):
    def forward(self, x):
        return x, x + 1


def test_parts_of_tuples_are_selected():
    model = nn.Sequential(Pair())
    x = torch.zeros(2, 3)
    with capture(model, ["0"]), pytest.raises(TypeError, match=r"layer '0' .*select"):
        model(x)
    with capture(model, {"0": LayerSpec(select=1)}) as maps:
        model(x)
        assert torch.equal(maps["0"], x + 1)


def test_default_layers_and_refusals():
    model = network(0)
    assert method.default_layers(model) == ["1", "3"]
    with pytest.raises(ValueError, match="at least 2 networks"):
        rosetta({"one": model}, images())
    with pytest.raises(ValueError, match="anchor must be one of"):
        rosetta({"one": model, "two": model}, images(), anchor="three")
    with pytest.raises(ValueError, match="at least one image"):
        rosetta({"one": model, "two": network(1)}, [])
    with pytest.raises(ValueError, match="readable twice"):
        rosetta({"one": model, "two": network(1)}, iter(images()), mode="iccv2023")
