"""pairwise_loss: benchmark rows, their peers and their cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from foveate.testing import inputs
from foveate.testing.spec import Bench, Call, Cost


def _plain_sigmoid(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, **_: Any
) -> torch.Tensor:
    """open_clip's formula: labels times logits through logsigmoid, all of them kept."""
    logits = scale * x @ y.T + bias
    labels = 2 * torch.eye(len(x), device=x.device, dtype=x.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(x)


def _open_clip_sigmoid(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, **_: Any
) -> torch.Tensor:
    from open_clip.loss import SigLipLoss

    loss: torch.Tensor = SigLipLoss()(x, y, scale, bias)
    return loss


def _softplus_sigmoid(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, **_: Any
) -> torch.Tensor:
    """softplus(z).sum() - diag: the strongest dense form."""
    z = scale * (x @ y.T) + bias
    return (F.softplus(z).sum() - z.diagonal().sum()) / len(x)


class _ChunkedSigmoid(torch.autograd.Function):
    """The strongest plain form: chunks of rows, gradients in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Any, y: Any, scale: Any, bias: Any) -> Any:
        n, rows = len(x), 512
        dx, dy = torch.empty_like(x), torch.zeros_like(y)
        loss, ds, db = x.new_zeros(()), x.new_zeros(()), x.new_zeros(())
        for start in range(0, n, rows):
            part = x[start : start + rows]
            dots = part @ y.T
            z = torch.addcmul(bias, dots, scale)
            loss += F.softplus(z).sum() - z.diagonal(start).sum()
            g = z.sigmoid_()
            g.diagonal(start).sub_(1)
            dx[start : start + rows] = g @ y
            dy.addmm_(g.T, part)
            ds += torch.dot(g.flatten(), dots.flatten())
            db += g.sum()
        ctx.save_for_backward(dx.mul_(scale / n), dy.mul_(scale / n), ds / n, db / n)
        return loss / n

    @staticmethod
    def backward(ctx: Any, upstream: Any) -> Any:
        return tuple(upstream * gradient for gradient in ctx.saved_tensors)


def _chunked_sigmoid(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, **_: Any
) -> torch.Tensor:
    loss: torch.Tensor = _ChunkedSigmoid.apply(x, y, scale, bias)
    return loss


def _compiled_sigmoid(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, **_: Any
) -> torch.Tensor:
    if "sigmoid" not in _COMPILED:
        _COMPILED["sigmoid"] = torch.compile(_plain_sigmoid)
    loss: torch.Tensor = _COMPILED["sigmoid"](x, y, scale, bias)
    return loss


_COMPILED: dict[str, Callable[..., Any]] = {}


def _torchvision_focal(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, **options: Any
) -> torch.Tensor:
    from torchvision.ops import sigmoid_focal_loss

    ids_x, ids_y = options["positives"]
    target = (ids_x[:, None] == ids_y).to(x.dtype)
    z = scale * (x @ y.T) + bias
    loss: torch.Tensor = sigmoid_focal_loss(z, target, -1, 2.0, "sum") / len(x)
    return loss


def _open_clip_softmax(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, **_: Any
) -> torch.Tensor:
    from open_clip.loss import ClipLoss

    loss: torch.Tensor = ClipLoss()(x, y, scale)
    return loss


def _one_product_softmax(
    x: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, **_: Any
) -> torch.Tensor:
    """The cross-entropy of one product and its transpose."""
    z = scale * (x @ y.T)
    labels = torch.arange(len(x), device=x.device)
    return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2


def _bench_call(n: int, d: int, *, dtype: torch.dtype = torch.float32, frozen: str = "") -> Any:
    def make(device: str) -> Call:
        pair = inputs.paired_embeddings(n, d)
        x = pair.image.to(device, dtype).requires_grad_("x" not in frozen)
        y = pair.text.to(device, dtype).requires_grad_("y" not in frozen)
        scale = torch.tensor(10.0, device=device, requires_grad=True)
        return Call((x, y, scale, torch.tensor(-10.0, device=device, requires_grad=True)))

    return make


def _bench_softmax(n: int, d: int) -> Any:
    def make(device: str) -> Call:
        call = _bench_call(n, d)(device)
        return Call(call.args[:3])

    return make


def _bench_focal(n: int, m: int, d: int) -> Any:
    def make(device: str) -> Call:
        pair = inputs.paired_embeddings(n, d)
        x = pair.image.to(device).requires_grad_()
        y = pair.text[:m].to(device).requires_grad_()
        ids = pair.label.to(device), pair.label[:m].to(device)
        scale = torch.tensor(10.0, device=device, requires_grad=True)
        bias = torch.tensor(-4.0, device=device, requires_grad=True)
        return Call((x, y, scale, bias), {"positives": ids, "focal_gamma": 2.0})

    return make


def cost(call: Call) -> Cost:
    x, y = call.args[:2]
    products = 1 + int(x.requires_grad) + int(y.requires_grad)
    features = x.numel() * x.element_size() + y.numel() * y.element_size()
    recorded = any(t.requires_grad for t in (x, y))
    return Cost(2 * products * x.shape[0] * y.numel(), features * (2 if recorded else 1))


_SIGMOID_PEERS: dict[str, Callable[..., Any]] = {
    "open_clip SigLipLoss": _open_clip_sigmoid,
    "torch.compile(plain)": _compiled_sigmoid,
    "softplus - diagonal": _softplus_sigmoid,
    "chunks, gradients in forward": _chunked_sigmoid,
}
_SOFTMAX_PEERS: dict[str, Callable[..., Any]] = {
    "open_clip ClipLoss": _open_clip_softmax,
    "one product": _one_product_softmax,
}

SIGMOID_BENCH = (
    Bench("1024 x 512, ViT-B/32", _bench_call(1024, 512), _SIGMOID_PEERS, quick=True),
    Bench(
        "1024 x 512, bf16 features",
        _bench_call(1024, 512, dtype=torch.bfloat16),
        {
            "open_clip SigLipLoss": _open_clip_sigmoid,
            "chunks, gradients in forward": _chunked_sigmoid,
        },
    ),
    Bench("2048 x 64, digits", _bench_call(2048, 64), _SIGMOID_PEERS),
    Bench("2048 x 256", _bench_call(2048, 256), _SIGMOID_PEERS),
    Bench("2048 x 768, SigLIP B", _bench_call(2048, 768), _SIGMOID_PEERS),
    Bench(
        "2048 x 256, frozen image tower (LiT)",
        _bench_call(2048, 256, frozen="x"),
        {"open_clip SigLipLoss": _open_clip_sigmoid},
    ),
    Bench("8192 x 256", _bench_call(8192, 256), _SIGMOID_PEERS),
    Bench(
        "1600 x 600 x 64, focal",
        _bench_focal(1600, 600, 64),
        {"torchvision sigmoid_focal_loss": _torchvision_focal},
    ),
    Bench(
        "4096 x 1200 x 512, focal",
        _bench_focal(4096, 1200, 512),
        {"torchvision sigmoid_focal_loss": _torchvision_focal},
    ),
)
INFO_NCE_BENCH = (
    Bench("1024 x 512, ViT-B/32", _bench_softmax(1024, 512), _SOFTMAX_PEERS, quick=True),
    Bench("2048 x 64", _bench_softmax(2048, 64), _SOFTMAX_PEERS),
    Bench("2048 x 256", _bench_softmax(2048, 256), _SOFTMAX_PEERS),
    Bench("2048 x 768", _bench_softmax(2048, 768), _SOFTMAX_PEERS),
)
