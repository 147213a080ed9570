"""`foveate maskcut`: a folder of pictures becomes a COCO annotation file."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

HELP = "find objects in pictures without labels; writes COCO annotations"


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags: one per argument of `foveate.methods.maskcut.annotate`, and two of its own."""
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="folders (recursive) and files")
    parser.add_argument("--out", required=True, metavar="FILE", help="the annotation file to write")
    source = parser.add_argument_group("descriptors")
    source.add_argument(
        "--features",
        default="color",
        metavar="color|DIR",
        help="color (default): CIELAB statistics, no weights; a folder: saved .npy or .safetensors",
    )
    source.add_argument("--model", metavar="NAME", help="a vision transformer of timm")
    source.add_argument("--weights", metavar="FILE", help="its .pth, .pt or .safetensors file")
    source.add_argument("--facet", default="key", choices=("query", "key", "value", "kqv"))
    source.add_argument("--size", type=int, default=480, help="side of the resampled image (480)")
    source.add_argument("--patch", type=int, default=8, help="side of a patch (8); a model's own")
    source.add_argument(
        "--keep-aspect", action="store_true", help="size is the longer side, not both"
    )
    cut = parser.add_argument_group("cut")
    cut.add_argument("--n-masks", type=int, default=3, help="masks per image at most (3)")
    cut.add_argument("--tau", type=float, default=0.15, help="cosine threshold (0.15)")
    cut.add_argument("--eps", type=float, default=1e-5, help="weight of the other edges (1e-5)")
    cut.add_argument("--iou-threshold", type=float, default=0.5, help="overlap allowed (0.5)")
    cut.add_argument("--min-area", type=float, default=0.01, help="smallest later mask (0.01)")
    cut.add_argument("--on-reject", default="retry", choices=("retry", "stop", "skip"))
    run_group = parser.add_argument_group("run")
    run_group.add_argument("--batch-size", type=int, default=8, help="images a launch (8)")
    run_group.add_argument(
        "--device", help="cpu (default), cuda, cuda:1; under torchrun the local rank's by default"
    )
    run_group.add_argument("--backend", default="auto", help="auto, cuda, triton, cpu, reference")
    run_group.add_argument(
        "--shard", type=_shard, metavar="I/N", help="every N-th image from the I-th, from 0 (0/1)"
    )
    run_group.add_argument("--resume", action="store_true", help="go on from what a run left")
    run_group.add_argument("--overwrite", action="store_true", help="replace what a run left")
    run_group.add_argument("--overlay", metavar="DIR", help="also draw the masks, as PNG files")
    run_group.add_argument("--compat", choices=("cutler",), help="width and height as CutLER wants")
    run_group.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="a bar on stderr"
    )
    run_group.add_argument("--strict", action="store_true", help="exit 1 if any image failed")
    run_group.add_argument("--quiet", action="store_true", help="print errors only")


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not slash or not (index.isdecimal() and count.isdecimal()) or int(index) >= int(count):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, got {text!r}")
    return int(index), int(count)


def _place(shard: tuple[int, int] | None, device: str | None) -> tuple[tuple[int, int], str]:
    """The shard and device: as given, else as torchrun's environment tells."""
    import torch

    rank, world, local = (os.environ.get(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if shard is None:
        shard = (0, 1) if rank is None or world is None else (int(rank), int(world))
    if device is None:
        device = "cuda" if local is not None and torch.cuda.is_available() else "cpu"
    if device == "cuda" and local is not None:
        device = f"cuda:{int(local)}"
    return shard, device


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if every image failed, or one with `--strict`; 2 if nothing could start."""
    from foveate.methods._optional import MissingPackageError
    from foveate.methods.maskcut import prepare
    from foveate.methods.maskcut_work import work

    own = ("command", "run", "strict", "quiet")
    arguments: dict[str, Any] = {key: value for key, value in vars(args).items() if key not in own}
    try:
        arguments["shard"], arguments["device"] = _place(args.shard, args.device)
        arguments["progress"] = args.progress and not args.quiet
        job = prepare(refine=None, **arguments)
    except (ValueError, TypeError, OSError, NotImplementedError, MissingPackageError) as error:
        return _refusal(error)
    try:
        done = work(job)
    except MissingPackageError as error:
        return _refusal(error)
    if not args.quiet:
        _report(done, args.out)
    return 1 if done.failed and (args.strict or done.failed == done.images) else 0


def _refusal(error: Exception) -> int:
    print(f"foveate maskcut: {error}", file=sys.stderr)
    return 2


def _report(done: Any, out: str) -> None:
    print(
        f"{done.images} images, {done.masks} masks, {done.failed} failed, {done.resumed} resumed; "
        + (f"wrote {out}" if done.merged else f"{out} waits for the other shards"),
        file=sys.stderr,
    )
