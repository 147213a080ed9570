"""COCO annotation files: run-length masks, and records written one by one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from foveate.methods._optional import optional

LICENSES = [{"id": 1, "name": "unknown", "url": ""}]
CATEGORIES = [{"id": 1, "name": "fg", "supercategory": "fg"}]


def encode_mask(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The fields of an annotation that follow from its mask [H, W]: area, bbox, segmentation.

    The box is [x, y, w, h]; the segmentation a compressed RLE whose counts are ASCII.
    """
    rle_module = optional("pycocotools.mask")
    rle = rle_module.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "area": int(rle_module.area(rle)),
        "bbox": [float(side) for side in rle_module.toBbox(rle)],
        "segmentation": {
            "size": [int(side) for side in rle["size"]],
            "counts": rle["counts"].decode("ascii"),
        },
    }


def image_record(image_id: int, file_name: str, width: int, height: int) -> dict[str, Any]:
    """An entry of `images`."""
    return {
        "id": image_id,
        "file_name": file_name,
        "width": width,
        "height": height,
        "date_captured": "",
        "license": 1,
        "coco_url": "",
        "flickr_url": "",
    }


def annotation_record(annotation_id: int, image_id: int, mask: dict[str, Any]) -> dict[str, Any]:
    """An entry of `annotations` from what `encode_mask` returned."""
    height, width = mask["segmentation"]["size"]
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": 1,
        "iscrowd": 0,
        **mask,
        "width": width,
        "height": height,
    }


def write_coco(
    file: TextIO,
    info: dict[str, Any],
    images: Iterable[dict[str, Any]],
    annotations: Iterable[dict[str, Any]],
) -> None:
    """A whole annotation file, one record a line; the records are consumed as they are written."""
    file.write("{")
    for key, value in (("info", info), ("licenses", LICENSES), ("categories", CATEGORIES)):
        file.write(f"{json.dumps(key)}: {json.dumps(value)},\n")
    for key, records, end in (("images", images, ",\n"), ("annotations", annotations, "}\n")):
        file.write(f"{json.dumps(key)}: [")
        for i, record in enumerate(records):
            file.write(("\n" if i == 0 else ",\n") + json.dumps(record))
        file.write("]" + end)
