"""Digits drawn as label maps: a small denoiser on 4 analog bits a pixel, softmax objective.

Each pixel of scikit-learn's 8 x 8 digits is an id, digit + 1 on the stroke and 0 elsewhere. Prints
the share of samples whose shape a logistic regression reads as the digit that their ids name.
"""

from __future__ import annotations

import argparse

import torch
from matplotlib.image import imsave
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

import foveate
from foveate.methods.bit_diffusion import BitDiffusion


class Denoiser(nn.Module):
    """Logits of the 16 ids of a pixel from [x_t, estimate] and the noise level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(64 * 9, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.leave = nn.Linear(width, 16 * 64)

    def forward(self, x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        level = gamma.view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        h = self.enter(torch.cat([x, level], 1).flatten(1))
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            h = h + layer(nn.functional.silu(norm(h)))
        return self.leave(h).view(-1, 16, 8, 8)


def picture(rows: list[torch.Tensor], path: str) -> None:
    """Rows of label maps `[n, 8, 8]` as a PNG."""
    sheet = torch.cat([torch.cat(list(nn.functional.pad(row, (1, 1, 1, 1))), 1) for row in rows])
    imsave(path, sheet.numpy(), cmap="nipy_spectral", vmin=0, vmax=15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps")
    parser.add_argument("--out", default="bit_diffusion.png", help="the picture")
    options = parser.parse_args()
    steps, width, count = (20, 64, 16) if options.quick else (1000, 256, 512)
    torch.set_num_threads(1)  # layers this small gain nothing from more
    torch.manual_seed(0)
    digits = load_digits()
    strokes = torch.from_numpy(digits.images > 6).long()
    ids = strokes * (torch.from_numpy(digits.target).view(-1, 1, 1) + 1)
    model = BitDiffusion(Denoiser(width), 4, objective="softmax", self_cond="concat")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = model(ids[torch.randint(len(ids), (128,))])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    way: list[torch.Tensor] = []
    drawn = model.eval().sample(
        (count, 8, 8), iterations=10 if options.quick else 50, max_value=10, seed=1,
        callback=lambda *state: way.append(foveate.bits_decode(state[2][:16], dim=1)),
    )  # fmt: skip
    reader = LogisticRegression(max_iter=500).fit(strokes.flatten(1).numpy(), digits.target)
    named = torch.stack([(drawn == k + 1).flatten(1).sum(1) for k in range(10)], 1)
    read = torch.from_numpy(reader.predict((drawn > 0).flatten(1).long().numpy()))
    share = ((named.argmax(1) == read) & (named.amax(1) > 0)).double().mean().item()
    picture([ids[:16], *way[:: len(way) // 5], drawn[:16]], options.out)
    print(f"loss {loss.item():.3f}; {share:.3f} of {count} samples read as the digit they name")


if __name__ == "__main__":
    main()
