"""Real inputs for benchmarks: photographs, their segments, digits; at the sizes of real models.

No weights are needed: the networks here are two fixed random layers, whose outputs keep the
structure of the image (neighbours and segments resemble each other, textures differ). Every
function gives the same values in every run, is cached, and returns a copy that may be written.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

_PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket")
_HIDDEN = 384  # width between the two random layers


@functools.cache
def photographs() -> tuple[np.ndarray[tuple[int, int, int], np.dtype[np.uint8]], ...]:
    """The colour photographs that scikit-image ships, `[h, w, 3]` uint8."""
    from skimage import data

    return tuple(getattr(data, name)() for name in _PHOTOGRAPHS)


@functools.cache
def _panoptic_map(index: int, size: int) -> torch.Tensor:
    from skimage import color, segmentation, transform

    image = transform.resize(photographs()[index % len(photographs())], (size, size), order=1)
    instance = segmentation.slic(image, n_segments=100, compactness=10, start_label=1)
    lightness = color.rgb2gray(image)
    means = np.array([lightness[instance == i].mean() for i in range(1, instance.max() + 1)])
    label = np.concatenate([[0], 1 + (means * 131).astype(np.int64)])[instance]
    return torch.from_numpy(np.stack([label, instance], -1).astype(np.int32))


def panoptic_maps(batch: int, size: int) -> torch.Tensor:
    """Label maps of photographs: ids [batch, size, size, 2] int32, (class, instance) below 256.

    Instances are SLIC segments; the class of a segment is its mean lightness in 133 levels.
    """
    return torch.stack([_panoptic_map(i % 4, size) for i in range(batch)])


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(value * 1009**i for i, value in enumerate(key)))


@functools.lru_cache(maxsize=8)
def _images(batch: int, size: int) -> torch.Tensor:
    sources = [
        torch.from_numpy(photo).permute(2, 0, 1).unsqueeze(0).float() / 255
        for photo in photographs()
    ]
    views = []
    for index in range(batch):
        image = sources[index % len(sources)]
        height, width = image.shape[-2:]
        # The first of each photograph is its central square; the others are random squares.
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        if index >= len(sources):
            share, *where = torch.rand(3, generator=_generator(1, index)).tolist()
            side = int(side * (0.5 + 0.5 * share))
            top, left = (
                int(w * (extent - side)) for w, extent in zip(where, (height, width), strict=True)
            )
        square = image[..., top : top + side, left : left + side]
        view = F.interpolate(square, (size, size), mode="bilinear", antialias=True)
        views.append(view)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (torch.cat(views) - mean) / deviation


def images(batch: int, size: int) -> torch.Tensor:
    """Square crops of the photographs `[batch, 3, size, size]` float32, ImageNet-normalised."""
    return _images(batch, size).clone()


def patches(batch: int, grid: int, patch: int) -> torch.Tensor:
    """Pixels of each patch, row by row: `[batch, grid * grid, 3 * patch * patch]` float32."""
    return F.unfold(_images(batch, grid * patch), patch, stride=patch).transpose(1, 2).contiguous()


def _features(batch: int, grid: int, channels: int, patch: int, seed: int) -> torch.Tensor:
    """Two random layers over patches and their surroundings, `[batch, grid * grid, channels]`."""
    pixels = patches(batch, grid, patch)
    maps = F.avg_pool2d(_images(batch, grid * patch), patch)
    context = F.avg_pool2d(maps, 5, stride=1, padding=2, count_include_pad=False)
    surround = torch.cat([maps, context], 1).flatten(2).transpose(1, 2)
    # Colour of the surroundings and texture of the patch have equal shares.
    texture = pixels - pixels.mean(-1, keepdim=True)
    texture = texture / texture.square().mean().sqrt()
    surround = surround / surround.square().mean().sqrt()
    generator = _generator(2, seed, channels)
    from_texture = torch.randn(texture.shape[-1], _HIDDEN, generator=generator)
    from_surround = torch.randn(surround.shape[-1], _HIDDEN, generator=generator)
    out = torch.randn(_HIDDEN, channels, generator=generator) / math.sqrt(_HIDDEN)
    hidden = texture @ (from_texture / math.sqrt(texture.shape[-1]))
    hidden += surround @ (from_surround / math.sqrt(surround.shape[-1]))
    return F.gelu(hidden) @ out


@functools.lru_cache(maxsize=8)
def _tokens(
    batch: int, grid: int, channels: int, patch: int, prefix: int, seed: int
) -> torch.Tensor:
    features = _features(batch, grid, channels, patch, seed)
    features = features - features.mean(1, keepdim=True)
    features = features / features.square().mean().sqrt()
    if prefix == 0:
        return features
    pooled = features.abs().mean(1, keepdim=True)
    scales = torch.randn(prefix, 1, generator=_generator(3, seed))
    return torch.cat([pooled * scales, features], 1)


def tokens(
    batch: int, grid: int, channels: int, *, patch: int = 8, prefix: int = 0, seed: int = 0
) -> torch.Tensor:
    """Patch tokens of photographs: `[batch, prefix + grid * grid, channels]` float32.

    Mean 0 over an image's patches, mean square 1 over all: cosines of both signs, high within an
    object, so that a normalized cut finds segments.

    Args:
        batch: images; the first four are whole photographs, the others crops of them.
        grid: patches along each side: 60 is a 480 pixel image in patches of 8 (n = 3600).
        channels: width of the model.
        patch: pixels along a side of a patch.
        prefix: tokens before the patches (class token, registers), pooled from the image.
        seed: chooses the random layers, which stand for a model.
    """
    return _tokens(batch, grid, channels, patch, prefix, seed).clone()


@functools.lru_cache(maxsize=8)
def _activation_maps(batch: int, channels: int, size: int, seed: int) -> torch.Tensor:
    grid = size if size <= 128 else size // 2  # larger maps are smooth in real networks
    features = _features(batch, grid, channels, 8 if size <= 64 else 2, seed)
    spread = 0.3 * torch.randn(channels, generator=_generator(4, seed, channels))
    thresholds = features.mean((0, 1)) + spread * features.std((0, 1))
    maps = (features - thresholds).transpose(1, 2).unflatten(2, (grid, grid))
    if grid != size:
        maps = F.interpolate(maps, (size, size), mode="bilinear")
    return F.relu(maps).contiguous()


def activation_maps(batch: int, channels: int, size: int, *, seed: int = 0) -> torch.Tensor:
    """Units of a layer on photographs: `[batch, channels, size, size]` float32, after a ReLU.

    A unit is silent on about half of the positions. `seed` chooses the network: layers of two
    networks see the same images, so their units correlate.
    """
    return _activation_maps(batch, channels, size, seed).clone()


@functools.lru_cache(maxsize=8)
def _unit_samples(samples: int, units: int, seed: int) -> torch.Tensor:
    grid = 56
    batch = math.ceil(samples / grid**2)
    return F.gelu(_features(batch, grid, units, 8, seed).flatten(0, 1)[:samples]).contiguous()


def unit_samples(samples: int, units: int, *, seed: int = 0) -> torch.Tensor:
    """Activations of units at patches of photographs, `[samples, units]` float32.

    `seed` chooses the network; the rows of two networks are the same patches.
    """
    return _unit_samples(samples, units, seed).clone()


class PairedEmbeddings(NamedTuple):
    """Two towers on the same items: unit rows, and the class of each item."""

    image: torch.Tensor  # [n, d] float32
    text: torch.Tensor  # [n, d] float32
    label: torch.Tensor  # [n] int64, 0..9


@functools.cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's handwritten digits: images [1797, 8, 8] float32 in [0, 1], labels [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float() / 16, torch.from_numpy(data.target).long()


@functools.lru_cache(maxsize=8)
def _paired_embeddings(n: int, dim: int, seed: int) -> PairedEmbeddings:
    all_images, all_labels = digits()
    generator = _generator(5, seed)
    pick = torch.randperm(len(all_images), generator=generator).repeat(n // len(all_images) + 1)[:n]
    images, label = all_images[pick], all_labels[pick]
    # Repeated digits differ like augmentations of one image.
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    # What a caption tells: the class, and coarsely how it was written.
    coarse = F.avg_pool2d(images.unsqueeze(1), 4).flatten(1)
    caption = torch.cat([F.one_hot(label, 10).float(), coarse], 1)
    shared = torch.randn(_HIDDEN, dim, generator=generator) / math.sqrt(_HIDDEN)

    def tower(features: torch.Tensor) -> torch.Tensor:
        features = features - features.mean(0)
        features = features / features.square().sum(1).mean().sqrt()
        hidden = features @ torch.randn(features.shape[1], _HIDDEN, generator=generator)
        return F.gelu(hidden)

    image_hidden, text_hidden = tower(images.flatten(1)), tower(caption)
    # A least-squares map from pixels to captions stands for contrastive training.
    fit = torch.linalg.lstsq(image_hidden[: 4 * _HIDDEN], text_hidden[: 4 * _HIDDEN]).solution
    aligned = 0.5 * image_hidden + image_hidden @ fit

    def unit(hidden: torch.Tensor) -> torch.Tensor:
        return F.normalize((hidden - hidden.mean(0)) @ shared)

    return PairedEmbeddings(unit(aligned), unit(text_hidden), label)


def paired_embeddings(n: int, dim: int, *, seed: int = 0) -> PairedEmbeddings:
    """Embeddings of digits by an image tower and a caption tower, rows of norm 1.

    Row i of both is one digit: paired rows have the larger cosines, rows of one class resemble
    each other, as in a batch of image-text pairs.
    """
    made = _paired_embeddings(n, dim, seed)
    return PairedEmbeddings(*(tensor.clone() for tensor in made))
