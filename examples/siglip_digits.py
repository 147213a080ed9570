"""Trains an image tower and a text tower on handwritten digits, and classifies held-out ones by
the nearest phrase: `python examples/siglip_digits.py [--loss siglip|clip]`.

It needs scikit-learn and tqdm.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import foveate

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASES = ("a {}", "the digit {}", "{}", "a handwritten {}")
LENGTH = 24  # characters a phrase is padded to
WIDTH = 64  # of the embeddings


def encode(text: str) -> list[int]:
    """Characters as numbers, 0 beyond the end."""
    return [ord(c) - ord("a") + 2 if c != " " else 1 for c in text] + [0] * (LENGTH - len(text))


class ImageTower(nn.Sequential):
    """[n, 1, 8, 8] -> [n, WIDTH]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 16, 128),
            nn.ReLU(),
            nn.Linear(128, WIDTH),
        )


class TextTower(nn.Module):
    """[n, LENGTH] character numbers -> [n, WIDTH]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(28, 32, padding_idx=0)
        self.convolve = nn.Conv1d(32, 128, 5, padding=2)
        self.project = nn.Linear(128, WIDTH)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        hidden = self.convolve(self.embed(text).transpose(1, 2))
        return self.project(F.relu(hidden).amax(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loss", choices=("siglip", "clip"), default="siglip")
    options = parser.parse_args()
    torch.manual_seed(options.seed)

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels))
    held_out, train = order[: len(labels) // 3], order[len(labels) // 3 :]
    phrases = torch.tensor([[encode(p.format(w)) for p in PHRASES] for w in WORDS])

    image_tower, text_tower = ImageTower(), TextTower()
    siglip = options.loss == "siglip"
    log_scale = nn.Parameter(torch.tensor(10.0 if siglip else 14.0).log())
    bias = nn.Parameter(torch.tensor(-10.0 if siglip else 0.0))
    towers = [*image_tower.parameters(), *text_tower.parameters()]
    optimizer = torch.optim.AdamW([*towers, log_scale, bias], lr=2e-3)

    progress = tqdm(range(options.steps), desc=options.loss)
    for _ in progress:
        pick = train[torch.randint(len(train), (options.batch_size,))]
        ids = labels[pick]
        x = F.normalize(image_tower(images[pick]))
        # The few phrases there are pass through the tower once, however often a batch has them.
        texts = F.normalize(text_tower(phrases.flatten(0, 1)))
        y = texts[ids * len(PHRASES) + torch.randint(len(PHRASES), (len(pick),))]
        if siglip:
            # Every phrase of the class describes the image.
            loss, stats = foveate.sigmoid_loss(
                x, y, log_scale.exp(), bias, positives=(ids, ids), return_stats=True
            )
        else:
            loss, stats = foveate.info_nce_loss(
                x, y, log_scale.exp(), ignore=(ids, ids), return_stats=True
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(
            loss=f"{loss.item():.3f}",
            row_top1=f"{stats.row_top1.item():.2f}",
            scale=f"{log_scale.exp().item():.1f}",
        )

    with torch.no_grad():
        classes = F.normalize(text_tower(phrases.flatten(0, 1))).view(10, len(PHRASES), WIDTH)
        scores = F.normalize(image_tower(images[held_out])) @ classes.mean(1).T
    print(f"accuracy {(scores.argmax(1) == labels[held_out]).double().mean():.2f}")


if __name__ == "__main__":
    main()
