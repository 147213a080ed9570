"""The work of a checked `annotate` call: read, describe, cut, record, and merge the parts."""

from __future__ import annotations

import contextlib
import datetime
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import foveate
from foveate.methods import coco, parts
from foveate.methods._optional import MissingPackageError, optional
from foveate.methods.descriptors import require_usable, vit_features
from foveate.methods.images import ImageFile, overlay, resize_masks, write_png

Refine = Callable[[NDArray[np.uint8], NDArray[np.bool_]], Any]


class AnnotateSummary(NamedTuple):
    """What one call of `annotate` did, for the images of its shard."""

    images: int  # of this shard
    masks: int  # in these images, resumed ones included
    failed: int  # images that could not be read or described
    resumed: int  # images taken from the parts of an earlier run
    merged: bool  # whether this call wrote `out`


class Ready(NamedTuple):
    """A picture that was read: what describes it, and its patch grid."""

    file: ImageFile
    image: NDArray[np.uint8]  # [H, W, 3]
    values: Tensor  # descriptors [n, c], or a model's input [3, h patch, w patch]
    grid: tuple[int, int]


class Failed(NamedTuple):
    """A picture that could not be used, and why."""

    file: ImageFile
    error: Exception


class Job(NamedTuple):
    """A call of `annotate` whose arguments are checked and whose part is open."""

    files: list[ImageFile]
    out: Path
    load: Callable[[ImageFile], Ready]
    model: nn.Module | None
    facet: str
    cut: dict[str, Any]  # arguments of foveate.maskcut
    device: torch.device
    batch_size: int
    shard: parts.Shard
    resume: bool
    settings: dict[str, Any]
    part: BinaryIO
    overlay: Path | None
    refine: Refine | None
    compat: str | None
    progress: bool


def work(job: Job) -> AnnotateSummary:
    """Annotate what is left of the job's shard, and write its `out` if nothing of it is left."""
    mine = job.files[job.shard.rank :: job.shard.world]
    with job.part:
        done: dict[str, parts.Place] = {}
        if job.resume:
            done = {
                name: place
                for name, place in parts.places(job.out, job.settings).items()
                if not place.failed
            }
        left = [file for file in mine if file.name not in done]
        resumed = [file.name for file in mine if file.name in done]
        masks = sum(len(record["masks"]) for _, record in parts.records(done, resumed))
        failed = 0
        with _bar(job, len(mine), len(resumed)) as bar:
            for batch in _loaded(job, left):
                for record in _records(job, batch):
                    parts.append(job.part, record)
                    masks += len(record.get("masks", ()))
                    failed += "error" in record
                    bar.update(1)
        merged = _merge(job)
    return AnnotateSummary(len(mine), masks, failed, len(resumed), merged)


def _bar(job: Job, total: int, initial: int) -> Any:
    if not job.progress:
        return contextlib.nullcontext(types.SimpleNamespace(update=lambda _: None))
    bar = optional("tqdm").tqdm
    return bar(total=total, initial=initial, unit="image", file=sys.stderr, desc="maskcut")


def _attempt(load: Callable[[ImageFile], Ready], file: ImageFile) -> Ready | Failed:
    try:
        return load(file)
    except MissingPackageError:
        raise
    except Exception as error:  # whatever a hostile file provokes concerns this file alone
        return Failed(file, error)


def _loaded(job: Job, files: list[ImageFile]) -> Iterator[list[Ready | Failed]]:
    """Batches of `files`, each read while the one before is worked on."""
    batches = [files[i : i + job.batch_size] for i in range(0, len(files), job.batch_size)]
    optional("PIL.Image").init()  # registers the file formats, before there are threads
    with ThreadPoolExecutor(max_workers=4) as pool:

        def start(batch: list[ImageFile]) -> list[Future[Ready | Failed]]:
            return [pool.submit(_attempt, job.load, file) for file in batch]

        waiting = start(batches[0]) if batches else []
        for following in [*batches[1:], []]:
            batch = [future.result() for future in waiting]
            waiting = start(following)
            yield batch


def _records(job: Job, batch: list[Ready | Failed]) -> Iterator[parts.Record]:
    described = _described(job, batch)
    ready = [item for item in described if isinstance(item, Ready)]
    masks = dict(zip((item.file.name for item in ready), _cut(job, ready), strict=True))
    for item in described:
        outcome = item
        if isinstance(outcome, Ready):
            try:
                yield _annotated(job, outcome, masks[outcome.file.name])
                continue
            except Exception as error:  # the picture's refinement or its overlay
                outcome = Failed(outcome.file, error)
        message = str(outcome.error) or repr(outcome.error)
        yield {"file_name": outcome.file.name, "error": [type(outcome.error).__name__, message]}


def _described(job: Job, batch: list[Ready | Failed]) -> list[Ready | Failed]:
    """The batch with descriptors in place of a model's inputs."""
    if job.model is None:
        return batch
    described = list(batch)
    grids = {item.grid for item in batch if isinstance(item, Ready)}
    for grid in sorted(grids):
        places = [
            i for i, item in enumerate(batch) if isinstance(item, Ready) and item.grid == grid
        ]
        inputs = torch.stack([batch[i].values for i in places]).to(job.device)  # type: ignore[union-attr]
        for i, values in zip(places, vit_features(job.model, inputs, facet=job.facet), strict=True):
            item = batch[i]
            try:
                require_usable(values)
                described[i] = item._replace(values=values)  # type: ignore[call-arg]
            except ValueError as error:
                described[i] = Failed(item.file, error)
    return described


def _cut(job: Job, ready: list[Ready]) -> list[NDArray[np.bool_]]:
    """The masks [n_masks, h, w] of each picture."""
    masks: list[NDArray[np.bool_]] = [np.zeros((0, 0, 0), dtype=bool)] * len(ready)
    for dtype in {item.values.dtype for item in ready}:
        places = [i for i, item in enumerate(ready) if item.values.dtype == dtype]
        results = foveate.maskcut(
            [ready[i].values.to(job.device) for i in places],
            [ready[i].grid for i in places],
            **job.cut,
        )
        for i, result in zip(places, results, strict=True):
            masks[i] = result.masks.cpu().numpy()
    return masks


def _annotated(job: Job, item: Ready, masks: NDArray[np.bool_]) -> parts.Record:
    height, width = item.image.shape[:2]
    found: Iterable[NDArray[np.bool_]] = (
        resize_masks(mask, height, width) for mask in masks if mask.any()
    )
    if job.refine is not None:
        found = (_refined(job.refine, item.image, mask) for mask in found)
    full = [mask for mask in found if mask.any()]
    if job.overlay is not None:
        shown = np.array(full).reshape(len(full), height, width)
        write_png(job.overlay, item.file.name, overlay(item.image, shown))
    return {
        "file_name": item.file.name,
        "width": width,
        "height": height,
        "masks": [coco.encode_mask(mask) for mask in full],
    }


def _refined(
    refine: Refine, image: NDArray[np.uint8], mask: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """The refined mask with its holes filled; empty if little of the given one is left."""
    answer = np.asarray(refine(image.copy(), mask.copy()))
    if answer.shape != mask.shape:
        raise ValueError(f"refine must return a mask {mask.shape}, got {answer.shape}")
    filled: NDArray[np.bool_] = optional("scipy.ndimage").binary_fill_holes(answer.astype(bool))
    common, either = np.count_nonzero(filled & mask), np.count_nonzero(filled | mask)
    return filled if common >= 0.5 * either else np.zeros_like(filled)


def _merge(job: Job) -> bool:
    """Write `out` if the parts hold a line for every image; whether they do."""
    names = [file.name for file in job.files]
    found = parts.places(job.out, job.settings)
    if any(name not in found for name in names):
        return False
    ids = {name: i for i, name in enumerate(names, start=1)}
    good = [name for name in names if not found[name].failed]
    bad = [name for name in names if found[name].failed]
    info = {
        "description": "MaskCut: masks found without labels",
        "version": foveate.__version__,
        "date_created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": job.settings,
    }

    def image_records() -> Iterator[parts.Record]:
        for name, record in parts.records(found, good):
            sides = (record["width"], record["height"])
            width, height = sides[::-1] if job.compat == "cutler" else sides
            yield coco.image_record(ids[name], name, width, height)

    def annotation_records() -> Iterator[parts.Record]:
        count = 0
        for name, record in parts.records(found, good):
            for mask in record["masks"]:
                count += 1
                yield coco.annotation_record(count, ids[name], mask)

    def write_failures(file: TextIO) -> None:
        for name, record in parts.records(found, bad):
            file.write("\t".join(map(_cell, (name, *record["error"]))) + "\n")

    failures = parts.failures_of(job.out)
    if bad:
        parts.replace_file(job.out, failures, write_failures)
    else:
        failures.unlink(missing_ok=True)
    parts.replace_file(
        job.out,
        job.out,
        lambda file: coco.write_coco(file, info, image_records(), annotation_records()),
    )
    return True


def _cell(text: str) -> str:
    """`text` on one line without tabs, for a table."""
    return " ".join(text.split()) if any(mark in text for mark in "\t\r\n") else text
