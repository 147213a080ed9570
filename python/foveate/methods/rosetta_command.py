"""`foveate rosetta`: a folder of pictures and two or more networks become Rosetta sets."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HELP = "find units of several networks that behave alike on a folder of pictures"

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of the command."""
    parser.add_argument("images", metavar="IMAGES", help="a folder, read recursively")
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME=SPEC",
        help="timm:NAME, torchvision:NAME or FILE.py:FUNCTION, each with @CHECKPOINT",
    )
    parser.add_argument("--layers", action="append", default=[], metavar="NAME=PATTERN")
    parser.add_argument("--prefix-tokens", action="append", default=[], metavar="NAME=N")
    parser.add_argument("--anchor", metavar="NAME", help="network whose units a star starts from")
    parser.add_argument("--k", default="1,5", metavar="A,B", help="ranks of a match (1,5)")
    parser.add_argument("--rule", default="star", choices=("star", "clique", "components"))
    parser.add_argument("--mode", default="pearson", choices=("pearson", "iccv2023"))
    parser.add_argument(
        "--precision", default="fp32", choices=("bf16", "tf32", "bf16x3", "fp32", "fp64")
    )
    parser.add_argument("--grid", default="pair-max", help="pair-max, a, b, native or H,W")
    parser.add_argument("--min-corr", type=float, metavar="X")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-images", type=int, metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--baseline", action="store_true", help="also correlate shuffled images")
    parser.add_argument("--plot", type=int, default=0, metavar="N", help="draw the best N sets")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", required=True, metavar="DIR")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 if the work failed; 2 if nothing could start."""
    from foveate.methods._optional import MissingPackageError

    try:
        job = _prepare(args)
    except (ValueError, TypeError, OSError, MissingPackageError) as error:
        print(f"foveate rosetta: {error}", file=sys.stderr)
        return 2
    try:
        _work(args, job)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"foveate rosetta: {error}", file=sys.stderr)
        return 1
    return 0


def _named(flag: str, values: list[str]) -> list[tuple[str, str]]:
    pairs = []
    for value in values:
        name, equals, rest = value.partition("=")
        if not equals or not name or not rest:
            raise ValueError(f"{flag} must be NAME=VALUE, got {value!r}")
        pairs.append((name, rest))
    return pairs


def _numbers(flag: str, text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{flag} must be two numbers A,B, got {text!r}")
    return int(parts[0]), int(parts[1])


def _prepare(args: argparse.Namespace) -> dict[str, Any]:
    from foveate.methods.images import find_images
    from foveate.ops.pearson.layers import LayerSpec

    for flag in ("image_size", "batch_size", "max_images"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} must be at least 1, got {value}")
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"IMAGES must be an existing folder, got {args.images}")
    specs = dict(_named("--model", args.model))
    if len(specs) < 2 or len(specs) != len(args.model):
        raise ValueError(f"--model must name at least 2 networks, got {args.model}")
    prefixes = dict(_named("--prefix-tokens", args.prefix_tokens))
    layers: dict[str, Any] = {}
    for name, pattern in _named("--layers", args.layers):
        prefix = prefixes.get(name)
        spec = LayerSpec(prefix_tokens=None if prefix is None else int(prefix))
        layers.setdefault(name, {})[pattern] = spec
    for name in (*layers, *prefixes, *([args.anchor] if args.anchor else [])):
        if name not in specs:
            raise ValueError(f"every name must be a --model of {list(specs)}, got {name!r}")
    for name in prefixes:
        if name not in layers:
            raise ValueError(f"--prefix-tokens {name}=N needs --layers {name}=PATTERN")
    k = _numbers("--k", args.k)
    if min(k) < 1:
        raise ValueError(f"--k must be at least 1, got {args.k}")
    grid: Any = args.grid
    if grid not in ("pair-max", "a", "b", "native"):
        grid = _numbers("--grid", grid)
    files = find_images([args.images], skip=Path(args.out))
    if not files:
        raise ValueError(f"IMAGES must hold pictures, got none in {args.images}")
    models = {name: _model(spec) for name, spec in specs.items()}
    return {"models": models, "layers": layers, "k": k, "grid": grid, "files": files}


def _model(spec: str) -> Any:
    from foveate.methods._optional import optional
    from foveate.methods.checkpoints import read_state_dict

    source, _, checkpoint = spec.partition("@")
    kind, colon, name = source.rpartition(":")
    if not colon or not kind or not name:
        raise ValueError(f"a model must be timm:NAME, torchvision:NAME or FILE.py:F, got {spec!r}")
    if kind == "timm":
        timm = optional("timm")
        if name not in timm.list_models():
            raise ValueError(f"timm has no model {name!r}")
        model = timm.create_model(name, pretrained=False)
    elif kind == "torchvision":
        zoo = optional("torchvision.models")
        if name not in zoo.list_models():
            raise ValueError(f"torchvision has no model {name!r}")
        model = zoo.get_model(name, weights=None)
    else:
        if not Path(kind).is_file():
            raise FileNotFoundError(f"a model's file must exist, got {kind}")
        scope: dict[str, Any] = {"__name__": "foveate_model", "__file__": kind}
        exec(compile(Path(kind).read_text(), kind, "exec"), scope)
        if not callable(scope.get(name)):
            raise ValueError(f"{kind} must define a function {name!r}")
        model = scope[name]()
    if checkpoint:
        try:
            model.load_state_dict(read_state_dict(checkpoint), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint} must fit {source}: {error}") from error
    else:
        print(f"foveate rosetta: {source} has no checkpoint: random weights", file=sys.stderr)
    return model


def _batches(files: list[Any], size: int, batch: int, skip_bad: bool) -> Iterator[Any]:
    import torch

    from foveate.methods.images import read_image, resize_image

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (_MEAN, _STD))
    waiting: list[torch.Tensor] = []
    for file in files:
        try:
            pixels = resize_image(read_image(file.path), size, size)
        except Exception as error:  # whatever Pillow raises for a broken file
            if not skip_bad:
                raise RuntimeError(f"{file.name} cannot be read: {error}") from error
            print(f"foveate rosetta: left out {file.name}: {error}", file=sys.stderr)
            continue
        waiting.append((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)
        if len(waiting) == batch:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)


class _Loader:
    """The pictures as batches, readable more than once."""

    def __init__(self, files: list[Any], size: int, batch: int, skip_bad: bool) -> None:
        self._given = (files, size, batch, skip_bad)

    def __iter__(self) -> Iterator[Any]:
        return _batches(*self._given)


def _work(args: argparse.Namespace, job: dict[str, Any]) -> None:
    from foveate.methods.rosetta import plot_sets, rosetta

    loader = _Loader(job["files"], args.image_size, args.batch_size, args.skip_bad)
    found = rosetta(
        job["models"],
        loader,
        layers=job["layers"],
        anchor=args.anchor,
        k=job["k"],
        rule=args.rule,
        mode=args.mode,
        precision=args.precision,
        grid=job["grid"],
        min_corr=args.min_corr,
        max_images=args.max_images,
        device=args.device,
        baseline=args.baseline,
    )
    found.save(args.out)
    found.to_csv(Path(args.out) / "sets.csv")
    if args.plot > 0 and found.sets:
        images = next(iter(loader)).to(args.device)
        path = Path(args.out) / "sets.png"
        plot_sets(found, job["models"], images, sets=args.plot, path=path)
    best = found.rows()[:10]
    if args.json:
        units = {n: sum(i.channels for i in infos) for n, infos in found.layout.items()}
        pairs = {f"{a}/{b}": len(m) for (a, b), m in found.matches.items()}
        report = {"images": found.count, "units": units, "pairs": pairs, "sets": len(found.sets)}
        print(json.dumps(report | {"best": best, "out": str(args.out)}))
        return
    print(f"{found.count} images, {len(found.sets)} sets; wrote {args.out}")
    for row in best:
        names = "  ".join(f"{name}={row[name]}" for name in row if name != "score")
        print(f"{row['score']:.4f}  {names}")
