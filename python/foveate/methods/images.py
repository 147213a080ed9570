"""Pictures on disk: finding, naming, reading, resizing, and masks drawn over them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foveate.methods._optional import optional

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"})

# Tints of the first masks: distinct to colour-blind eyes too (Okabe & Ito 2008), no black.
_TINTS = np.array(
    [
        (230, 159, 0),
        (86, 180, 233),
        (204, 121, 167),
        (0, 158, 115),
        (213, 94, 0),
        (240, 228, 66),
        (0, 114, 178),
    ],
    dtype=np.float64,
)
_TINT_WEIGHT = 0.55


class ImageFile(NamedTuple):
    """A picture: `name` is its path relative to the folder given, with `/` separators."""

    name: str
    path: Path


def find_images(
    paths: Iterable[str | os.PathLike[str]], *, skip: Path | None = None
) -> list[ImageFile]:
    """The pictures of folders (recursively, by suffix in any case) and single files, by name.

    Symbolic links are followed; a link to a folder that contains it is not entered again.

    Args:
        paths: folders and files. A file is named by its last component, whatever its suffix.
        skip: a folder whose pictures are left out (where results are written).

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: two pictures have one name, or `skip` is one of the folders given.
    """
    found: dict[str, Path] = {}
    for given in paths:
        root = Path(given)
        if root.is_dir():
            if skip is not None and skip.resolve() == root.resolve():
                raise ValueError(f"results must not go into a folder of images, got {skip} twice")
            files: Iterable[Path] = _walk(root, (), skip.resolve() if skip else None)
            named = [(path.relative_to(root).as_posix(), path) for path in files]
        elif os.path.lexists(root):
            named = [(root.name, root)]
        else:
            raise FileNotFoundError(f"images must be existing folders and files, got {root}")
        for name, path in named:
            if name in found:
                raise ValueError(
                    f"every image needs its own name, got {name} for {found[name]} and {path}"
                )
            found[name] = path
    return [ImageFile(name, found[name]) for name in sorted(found)]


def _walk(folder: Path, above: tuple[Path, ...], skip: Path | None) -> Iterator[Path]:
    here = folder.resolve()
    if here in above or here == skip:
        return
    with os.scandir(folder) as entries:
        listing = sorted(entries, key=lambda entry: entry.name)
    for entry in listing:
        path = folder / entry.name
        if path.is_dir():
            yield from _walk(path, (*above, here), skip)
        elif path.suffix.lower() in SUFFIXES:
            yield path


def read_image(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """The picture as [H, W, 3] uint8 RGB.

    Colours are Pillow's conversion to RGB (alpha is dropped, CMYK and palettes are converted);
    16-bit grey is divided by 257; the EXIF orientation is not applied; of several frames the
    first is read.

    Raises:
        Exception: the file is no picture, is truncated, or too large; Pillow's own exceptions.
    """
    image_module = optional("PIL.Image")
    file = Path(path)
    if file.exists() and not file.is_file():  # a pipe would block for ever
        raise OSError(f"an image must be a regular file, got {file}")
    with image_module.open(file) as picture:
        if picture.width < 1 or picture.height < 1:
            raise ValueError(f"an image must have pixels, got {picture.width} x {picture.height}")
        if picture.mode.startswith("I"):
            return _grey16(np.asarray(picture))
        return np.array(picture.convert("RGB"), dtype=np.uint8)


def _grey16(levels: NDArray[Any]) -> NDArray[np.uint8]:
    if levels.min() < 0 or levels.max() > 65535:
        raise ValueError(
            f"an integer grey image must hold 0..65535, got {levels.min()}..{levels.max()}"
        )
    grey = (levels.astype(np.int64) // 257).astype(np.uint8)  # [H, W]
    return np.repeat(grey[..., None], 3, axis=2)


def resize_image(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """`image` [H, W, 3] resampled to [height, width, 3] with Pillow's LANCZOS filter."""
    image_module = optional("PIL.Image")
    picture = image_module.fromarray(image)
    resized = picture.resize((width, height), image_module.Resampling.LANCZOS)
    return np.array(resized, dtype=np.uint8)


def resize_masks(masks: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """`masks` [..., h, w] by nearest at [..., height, width]: source row floor(y h / height)."""
    h, w = masks.shape[-2:]
    rows = np.arange(height) * h // height
    columns = np.arange(width) * w // width
    return masks[..., rows[:, None], columns]


def overlay(image: Any, masks: Any) -> NDArray[np.uint8]:
    """The picture with each mask tinted in its own colour and drawn round by a solid line.

    Args:
        image: [H, W, 3] uint8.
        masks: [m, H, W] bool; where masks overlap, the last one shows.

    Returns:
        [H, W, 3] uint8; pixels in no mask are the image's.

    Raises:
        ValueError: the shapes do not fit.
    """
    pixels = np.array(image)
    masks = np.asarray(masks)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"image must be [H, W, 3] uint8, got {pixels.dtype} {pixels.shape}")
    if masks.ndim != 3 or masks.shape[1:] != pixels.shape[:2]:
        raise ValueError(
            f"masks must be [m, H, W] with the image's {pixels.shape[:2]}, got {masks.shape}"
        )
    width = max(1, round(max(pixels.shape[:2]) / 300))  # of the line, in pixels
    for i, mask in enumerate(masks.astype(bool)):
        tint = _TINTS[i % len(_TINTS)]
        pixels[mask] = np.rint((1 - _TINT_WEIGHT) * pixels[mask] + _TINT_WEIGHT * tint)
        pixels[mask & ~_eroded(mask, width)] = tint
    return pixels


def _eroded(mask: NDArray[np.bool_], steps: int) -> NDArray[np.bool_]:
    inner = mask
    for _ in range(steps):
        wide = np.pad(inner, 1, mode="edge")
        inner = inner & wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    return inner


def write_png(folder: Path, name: str, image: NDArray[np.uint8]) -> None:
    """`image` as `folder/<name>.png`, making the folders that lie between.

    Raises:
        ValueError: `name` would lead out of `folder`.
    """
    target = Path(os.path.normpath(folder / f"{name}.png"))
    if not target.is_relative_to(os.path.normpath(folder)):
        raise ValueError(f"an image's name must stay inside the folder {folder}, got {name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    optional("PIL.Image").fromarray(image).save(target)
