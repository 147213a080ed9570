"""Rosetta units of a small CNN and a small MLP, both trained on scikit-learn's digits."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

from foveate.methods.rosetta import plot_sets, rosetta


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--json", metavar="FILE", help="write what was found")
    parser.add_argument("--figure", metavar="FILE", help="draw the best sets")
    args = parser.parse_args()
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    fit, test = order[:1400], order[1400:]
    models = {"cnn": cnn(), "mlp": mlp()}
    accuracy = {}
    for name, model in models.items():
        train(model, x[fit], y[fit], 6 if args.quick else 25)
        with torch.no_grad():
            accuracy[name] = float((model(x[test]).argmax(1) == y[test]).float().mean())
    # Hidden vectors; the networks' feature maps have no common positions.
    layers = {"cnn": ["6"], "mlp": ["2", "4"]}
    found = rosetta(models, x[test].split(64), layers=layers, k=1, baseline=True)
    best = found.sets[0].score
    chance = float(torch.cat(list(found.baseline.values())).nan_to_num(-1).max())
    print(f"accuracy {accuracy}; {len(found.sets)} sets, shuffled images reach {chance:.3f}")
    for row in found.rows()[:5]:
        print(f"{row['score']:.3f}  cnn {row['cnn']}  mlp {row['mlp']}")
    if args.figure:
        conv = rosetta(models, x[test].split(64), layers={"cnn": ["3"], "mlp": ["4"]}, k=1)
        plot_sets(conv, models, x[test][:6], path=args.figure)
    if args.json:
        report = {
            "accuracy": accuracy,
            "sets": len(found.sets),
            "best": best,
            "baseline": chance,
        }
        Path(args.json).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
