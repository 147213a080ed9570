"""MaskCut from files to files: a folder of pictures becomes COCO annotations, without labels.

The method is that of CutLER (CVPR 2023, sec. 3.2): patch descriptors, normalised cuts of their
thresholded cosine graph with found objects removed (`foveate.maskcut`), masks at image size.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import foveate
from foveate._checks import integer, one_of
from foveate.methods import parts
from foveate.methods._optional import optional
from foveate.methods.checkpoints import load_vit
from foveate.methods.descriptors import (
    FACETS,
    color_features,
    normalized,
    patch_size,
    read_features,
    vit_features,
)
from foveate.methods.images import (
    ImageFile,
    find_images,
    overlay,
    read_image,
    resize_image,
)
from foveate.methods.maskcut_work import AnnotateSummary, Job, Ready, Refine, work

__all__ = [
    "AnnotateSummary",
    "annotate",
    "color_features",
    "load_vit",
    "overlay",
    "vit_features",
]

StrPath = str | os.PathLike[str]


def annotate(
    images: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    features: StrPath = "color",
    model: str | nn.Module | None = None,
    weights: StrPath | None = None,
    facet: str = "key",
    size: int = 480,
    patch: int = 8,
    keep_aspect: bool = False,
    n_masks: int = 3,
    tau: float = 0.15,
    eps: float = 1e-5,
    iou_threshold: float = 0.5,
    min_area: float = 0.01,
    on_reject: str = "retry",
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    backend: str = "auto",
    shard: tuple[int, int] = (0, 1),
    resume: bool = False,
    overwrite: bool = False,
    overlay: StrPath | None = None,
    refine: Refine | None = None,
    compat: str | None = None,
    progress: bool = True,
) -> AnnotateSummary:
    """COCO annotations `out` with the MaskCut masks of every picture, found without labels.

    An image that cannot be read or described never stops the run: `out`.failed.tsv lists file
    name, exception type and message. `out`.parts/ holds a line per finished image, from which a
    killed run resumes; it stays, so that `resume` can retry failures.

    Args:
        images: folders (recursive; jpg, jpeg, png, bmp, webp, tif, tiff, ppm) and files. An
            image's `file_name` is its path relative to the folder given.
        out: the JSON file. Its `images[].id` is the place in the sorted list of all names.
        features: "color" for `color_features`, or a folder with `<name without suffix>.npy` or
            `.safetensors` (key `features`): [h, w, c], or [n, c] with n a square.
        model: a timm name with local `weights`, or a module with `blocks[-1].attn.qkv`, in place
            of `features`. It brings its patch size, mean and standard deviation.
        weights: a .pth, .pt or .safetensors file, see `load_vit`.
        facet: what of the model's last attention describes a patch: "query", "key", "value", "kqv".
        size: images are resampled (LANCZOS) to round(size / patch) patches a side.
        patch: side of a patch in pixels.
        keep_aspect: the longer side is that long, the shorter the nearest multiple of `patch`.
        n_masks, tau, eps, iou_threshold, min_area, on_reject, backend: as in `foveate.maskcut`.
        batch_size: images cut in one launch. Results do not depend on it.
        device: where descriptors are computed and cut.
        shard: (i, n): take every n-th image from the i-th. The shard that sees the last image
            finished writes `out`.
        resume: go on from the parts of any sharding; failures are tried again.
        overwrite: replace `out` and its parts.
        overlay: a folder for pictures of the masks, `<file_name>.png`.
        refine: called with (image [H, W, 3] uint8, mask [H, W] bool), returns a mask; its holes
            are filled, and it is dropped if its IoU with the given one is below 0.5.
        compat: "cutler" swaps width and height in `images`, as CutLER's trainer expects.
        progress: a bar on stderr.

    Returns:
        AnnotateSummary of this shard.

    Raises:
        ValueError: no images, a name twice, arguments outside what they allow, parts with other
            settings.
        FileNotFoundError: a path of `images`, `features` or `weights` is missing.
        FileExistsError: `out` or parts exist without `resume` or `overwrite`; nothing is touched.
        OSError: `out` or `overlay` cannot be written.
        ImportError: a package of the extra foveate[methods] is missing.
    """
    return work(
        prepare(
            images,
            out,
            features=features,
            model=model,
            weights=weights,
            facet=facet,
            size=size,
            patch=patch,
            keep_aspect=keep_aspect,
            n_masks=n_masks,
            tau=tau,
            eps=eps,
            iou_threshold=iou_threshold,
            min_area=min_area,
            on_reject=on_reject,
            batch_size=batch_size,
            device=device,
            backend=backend,
            shard=shard,
            resume=resume,
            overwrite=overwrite,
            overlay=overlay,
            refine=refine,
            compat=compat,
            progress=progress,
        )
    )


def prepare(
    images: StrPath | Sequence[StrPath],
    out: StrPath,
    *,
    features: StrPath,
    model: str | nn.Module | None,
    weights: StrPath | None,
    facet: str,
    size: int,
    patch: int,
    keep_aspect: bool,
    n_masks: int,
    tau: float,
    eps: float,
    iou_threshold: float,
    min_area: float,
    on_reject: str,
    batch_size: int,
    device: str | torch.device,
    backend: str,
    shard: tuple[int, int],
    resume: bool,
    overwrite: bool,
    overlay: StrPath | None,
    refine: Refine | None,
    compat: str | None,
    progress: bool,
) -> Job:
    """The job that `annotate` was called for, checked, its part opened; raises what it raises."""
    for module in ("PIL.Image", "pycocotools.mask"):
        optional(module)
    if progress:
        optional("tqdm")
    if refine is not None:
        optional("scipy.ndimage")
    cut: dict[str, Any] = {
        "n_masks": n_masks,
        "tau": tau,
        "eps": eps,
        "iou_threshold": iou_threshold,
        "min_area": min_area,
        "on_reject": on_reject,
    }
    one_of("facet", facet, FACETS)
    one_of("compat", compat, (None, "cutler"))
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other, got both")
    place = _device(device)
    foveate.maskcut(torch.zeros(1, 9, 1, device=place), (3, 3), backend=backend, **cut)
    network, origin = _network(features, model, weights, place)
    batch_size = integer("batch_size", batch_size, 1)
    count = integer("shard's count", shard[1], 1)
    part_of = parts.Shard(integer("shard's index", shard[0], 0, count - 1), count)
    folder = None if overlay is None else Path(overlay)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"overlay must be a folder, got {folder}")
    given = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    files = find_images(given, skip=folder)
    if not files:
        raise ValueError(f"images must hold at least one picture, got none in {_listing(given)}")

    saved = None if network is not None or features == "color" else Path(features)
    if saved is not None:
        load, layout = _from_folder(saved), {}
    else:
        patch = integer("patch", patch, 1) if network is None else patch_size(network)
        size = integer("size", size, 1)
        side = round(size / patch)
        least = 3 if keep_aspect else 2
        if side < least:
            raise ValueError(f"size must be at least {least} patches of {patch}, got {size}")
        load = _from_pixels(network, side, patch, keep_aspect)
        layout = {"size": size, "patch": patch, "keep_aspect": bool(keep_aspect)}
    settings = {
        **origin,
        **layout,
        **({"facet": facet} if network is not None else {}),
        **cut,
        "refine": None if refine is None else _qualified_name(refine),
        "compat": compat,
    }
    target = Path(out)
    parts.check(target, part_of, settings, resume=resume, overwrite=overwrite)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return Job(
        files=files,
        out=target,
        load=load,
        model=network,
        facet=facet,
        cut={**cut, "backend": backend},
        device=place,
        batch_size=batch_size,
        shard=part_of,
        resume=resume,
        settings=settings,
        part=parts.open_part(target, part_of, settings, overwrite=overwrite),
        overlay=folder,
        refine=refine,
        compat=compat,
        progress=progress,
    )


def _listing(given: list[StrPath]) -> str:
    return ", ".join(os.fspath(path) for path in given) or "an empty list"


def _qualified_name(function: Any) -> str:
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{owner.__qualname__}"


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device must be one that torch can use, got {device!r}: {reason}"
        ) from error
    return place


def _network(
    features: StrPath, model: str | nn.Module | None, weights: StrPath | None, device: torch.device
) -> tuple[nn.Module | None, dict[str, Any]]:
    """The model, if there is one, and the settings that say where descriptors come from."""
    if model is None:
        if weights is not None:
            raise ValueError("weights need a model, got weights without model")
        if features == "color":
            return None, {"features": "color"}
        folder = Path(features)
        if not folder.is_dir():
            raise FileNotFoundError(f'features must be "color" or an existing folder, got {folder}')
        return None, {"features": str(folder.resolve())}
    if features != "color":
        raise ValueError(f"features and model exclude each other, got features {features} too")
    if isinstance(model, nn.Module):
        if weights is not None:
            raise ValueError("a model that is a module has its weights, got weights too")
        return model, {"model": _qualified_name(model), "weights": _fingerprint(model)}
    if weights is None:
        raise ValueError(f"a model's name needs weights, a local file, got model {model!r} alone")
    network = load_vit(model, weights, device=device)
    return network, {"model": model, "weights": _fingerprint(network)}


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _from_folder(folder: Path) -> Callable[[ImageFile], Ready]:
    def load(file: ImageFile) -> Ready:
        return Ready(file, read_image(file.path), *read_features(folder, file.name))

    return load


def _from_pixels(
    model: nn.Module | None, side: int, patch: int, keep_aspect: bool
) -> Callable[[ImageFile], Ready]:
    def load(file: ImageFile) -> Ready:
        image = read_image(file.path)
        height, width = image.shape[:2]
        h = w = side
        if keep_aspect:
            longer = max(height, width)
            h, w = (max(1, round(side * length / longer)) for length in (height, width))
        resized = resize_image(image, h * patch, w * patch)
        if model is None:
            return Ready(file, image, color_features(resized, (h, w)), (h, w))
        return Ready(file, image, normalized(resized, model), (h, w))

    return load
