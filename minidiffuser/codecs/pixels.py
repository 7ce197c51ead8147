"""Image codecs: pixels, scaled to mean 0 and standard deviation 1, and a linear autoencoder.

    pixels   z = (x - mean) / std                              of the training set, one of each
    pca      z = V^T (patch - mean) / scale                    V: the leading components of patches

The second is the best *linear* autoencoder of 8 x 8 patches under squared error, in closed form.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..images import ImageLike, to_uint8
from .base import Codec


class PixelCodec(Codec):
    """Pixels: (B, 3, size, size), of mean 0 and standard deviation 1 over the training set."""

    kind = "pixels"

    def __init__(self, size: int, mean: float = 0.5, std: float = 0.5):
        self.size, self.mean, self.std = size, mean, std

    @classmethod
    def fit(cls, pixels: np.ndarray) -> "PixelCodec":
        """Measure mean and standard deviation of training images (N, size, size, 3) uint8."""
        return cls(pixels.shape[1], float(pixels.mean() / 255), float(pixels.std() / 255))

    @property
    def shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    def encode(self, images: Sequence[ImageLike]) -> Tensor:
        """Images -> (B, 3, size, size) float32."""
        return self.encode_pixels(torch.from_numpy(to_uint8(images, self.size)))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, size, size, 3) uint8 -> (B, 3, size, size) float32."""
        return (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def decode_pixels(self, z: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, size, size, 3) uint8."""
        x = (z.float() * self.std + self.mean).clamp(0, 1) * 255
        return x.round().to(torch.uint8).permute(0, 2, 3, 1).cpu()

    def decode(self, z: Tensor) -> list[Image.Image]:
        """(B, 3, size, size) -> RGB images; values outside the range are clipped."""
        return [Image.fromarray(x.numpy()) for x in self.decode_pixels(z)]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint stores: JSON values, and tensors."""
        return {"size": self.size, "mean": self.mean, "std": self.std}, {}

    @classmethod
    def from_state(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> "PixelCodec":
        return cls(**config)


class PCACodec(PixelCodec):
    """A linear autoencoder of 8 x 8 patches: (B, dim, size / 8, size / 8).

    One scale for all components, so that the latents' variance stays where the image's is.
    """

    kind = "pca"
    side = 8

    def __init__(self, size: int, components: Tensor, mean: Tensor, scale: float):
        self.size, self.scale = size, scale
        self.components, self.patch_mean = components, mean  # (192, dim), (192,)

    @classmethod
    def fit(cls, pixels: np.ndarray, dim: int = 64) -> "PCACodec":
        """Components of training images (N, size, size, 3) uint8."""
        limit = 3 * cls.side**2
        if not 1 <= dim <= limit:
            raise ValueError(f"pca_dim must lie in [1, {limit}], got {dim}")
        patches = _cut(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255, cls.side)
        flat = patches.flatten(0, 2).double()                                  # (N h w, 192)
        mean = flat.mean(0)
        values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / len(flat))
        components = vectors.flip(1)[:, :dim].float()
        scale = math.sqrt(float(values.flip(0)[:dim].mean()))
        return cls(pixels.shape[1], components, mean.float(), scale)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.components.shape[1], self.size // self.side, self.size // self.side)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        patches = _cut(pixels.permute(0, 3, 1, 2).float() / 255, self.side)    # (B, h, w, 192)
        z = (patches - self.patch_mean) @ self.components / self.scale
        return z.permute(0, 3, 1, 2)                                           # (B, dim, h, w)

    def decode_pixels(self, z: Tensor) -> Tensor:
        z = z.float().cpu().permute(0, 2, 3, 1) * self.scale
        patches = z @ self.components.T + self.patch_mean                      # (B, h, w, 192)
        b, h, w, _ = patches.shape
        x = patches.reshape(b, h, w, 3, self.side, self.side).permute(0, 1, 4, 2, 5, 3)
        x = x.reshape(b, h * self.side, w * self.side, 3)
        return (x.clamp(0, 1) * 255).round().to(torch.uint8)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return ({"size": self.size, "scale": self.scale},
                {"components": self.components.contiguous(), "mean": self.patch_mean})

    @classmethod
    def from_state(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> "PCACodec":
        return cls(components=tensors["components"], mean=tensors["mean"], **config)


def _cut(x: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) -> patches (B, H / side, W / side, 3 side^2)."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // side, side, w // side, side).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, h // side, w // side, c * side * side)
