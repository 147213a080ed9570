"""A small ViT learns the digits 0 to 4, pre-trains feedback, and adapts to 5 to 9 from 200 images.

Prints parameters, held-out accuracy and seconds of each way to adapt, and draws what the two passes
of each steered model look at. It needs scikit-learn, timm and matplotlib.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from foveate.methods.toast import plot_maps, pretraining_loss, toast


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, rate: float, loss) -> None:
    """AdamW on what requires a gradient, with a one-cycle rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(x) // 50)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(epochs):
        for pick in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            loss(model, x[pick], y[pick]).backward()
            optimizer.step()
            schedule.step()


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), y)


def pretraining(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return pretraining_loss(model(x, return_aux=True, var_loss=True), y)


@torch.no_grad()
def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    return (model(x).argmax(1) == y).double().mean().item()


def new_head(model: nn.Module, trained: tuple[str, ...]) -> nn.Module:
    """A copy with a fresh head, of which the parameters with these prefixes train."""
    model = copy.deepcopy(model)
    model.reset_classifier(5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="toast_digits", help="folder of the figures")
    parser.add_argument("--quick", action="store_true", help="few epochs, to see that it runs")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # layers of width 64 are too small to share
    epochs = 1 if args.quick else 10

    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    x = F.interpolate(x, size=16, mode="bilinear", align_corners=False)
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    old = y < 5
    x_new, y_new = x[~old], y[~old] - 5
    few, held_out = slice(0, 200), slice(200, None)

    vit = VisionTransformer(
        img_size=16, patch_size=4, in_chans=1, embed_dim=64, depth=4, num_heads=4, num_classes=5
    )
    # timm's start is made for long training; these layers' own lets a short one arrive.
    for module in vit.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
    nn.init.normal_(vit.pos_embed, std=0.1)
    fit(vit, x[old][200:], y[old][200:], epochs, 1e-3, cross_entropy)
    print(f"backbone, digits 0 to 4: accuracy {accuracy(vit, x[old][:200], y[old][:200]):.3f}")

    steered = toast(copy.deepcopy(vit), "toast", train_transform=False)
    fit(steered.train(), x[old][200:], y[old][200:], max(1, epochs // 2), 1e-3, pretraining)
    start = steered.state_dict()
    print(f"with feedback: accuracy {accuracy(steered, x[old][:200], y[old][:200]):.3f}")

    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{'adapted to 5 to 9':20}{'trained':>10}{'accuracy':>10}{'seconds':>9}")
    for name in ("linear probe", "frozen", "toast-lite", "toast", "end2end"):
        torch.manual_seed(args.seed)
        if name == "linear probe":
            model = new_head(vit, ("head.",))
        else:
            model = toast(copy.deepcopy(vit), name)
            model.load_state_dict(start, strict=False)
            model.reset_classifier(5)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        began = time.perf_counter()
        rate = 1e-3 if name == "end2end" else 3e-3
        fit(model.train(), x_new[few], y_new[few], 2 * epochs, rate, cross_entropy)
        seconds = time.perf_counter() - began
        score = accuracy(model, x_new[held_out], y_new[held_out])
        print(f"{name:20}{count:>10}{score:>10.3f}{seconds:>9.1f}")
        if name != "linear probe":
            shown = torch.cat([x_new[held_out][y_new[held_out] == digit][:1] for digit in range(5)])
            plot_maps(shown, model.maps(shown), path=folder / f"{name}.png")


if __name__ == "__main__":
    main()
