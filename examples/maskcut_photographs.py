"""Objects in scikit-image's photographs, without labels: COCO annotations and overlay pictures.

    python examples/maskcut_photographs.py --out photographs

writes photographs/annotations.json, photographs/overlays/*.png and, with --thumbnails 320,
photographs/thumbnails/*.jpg. It needs foveate[methods] and scikit-image. The patch descriptors are
colour statistics, so that no weights are needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from foveate.methods.maskcut import annotate

PHOTOGRAPHS = ("horse", "camera", "retina", "immunohistochemistry", "astronaut", "coffee")


def photograph(name: str) -> Image.Image:
    """The picture of skimage.data; two levels become black and white."""
    pixels = getattr(skimage.data, name)()
    return Image.fromarray(pixels * np.uint8(255) if pixels.dtype == bool else pixels)


def main(argv: list[str] | None = None) -> int:
    """Writes the pictures, then annotates the folder that holds them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", default=PHOTOGRAPHS, help="of skimage.data")
    parser.add_argument("--out", type=Path, default=Path("photographs"), help="folder to write")
    parser.add_argument("--size", type=int, default=480, help="side of the resampled image (480)")
    parser.add_argument("--tau", type=float, default=0.15, help="cosine threshold (0.15)")
    parser.add_argument("--n-masks", type=int, default=2, help="masks per image at most (2)")
    parser.add_argument("--thumbnails", type=int, metavar="SIDE", help="also JPEGs of this side")
    args = parser.parse_args(argv)
    pictures, overlays = args.out / "pictures", args.out / "overlays"
    pictures.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        photograph(name).convert("RGB").save(pictures / f"{name}.png")
    done = annotate(
        [pictures / f"{name}.png" for name in args.names],
        args.out / "annotations.json",
        size=args.size,
        tau=args.tau,
        n_masks=args.n_masks,
        overlay=overlays,
        overwrite=True,
        progress=False,
    )
    if args.thumbnails:
        folder = args.out / "thumbnails"
        folder.mkdir(exist_ok=True)
        for name in args.names:
            small = Image.open(overlays / f"{name}.png.png")
            small.thumbnail((args.thumbnails, args.thumbnails))
            small.save(folder / f"{name}.jpg", quality=85)
    print(f"{done.images} pictures, {done.masks} masks in {args.out / 'annotations.json'}")
    return 1 if done.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
