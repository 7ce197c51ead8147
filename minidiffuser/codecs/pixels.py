"""Image codecs: pixels, scaled to mean 0 and standard deviation 1, and a linear autoencoder.

    pixels   z = (x - mean) / std                              of the training set, one of each
    pca      z = V^T (patch - mean) / scale                    V: the leading components of patches

The second is the best *linear* autoencoder of 8 x 8 patches under squared error, in closed form.
"""

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 50_000_000  # more than any camera's frame; a decompression bomb is far above

ImageLike = Image.Image | np.ndarray | str | os.PathLike


def load_image(source: ImageLike, where: str = "image") -> Image.Image:
    """Any image a user may have, as 8-bit RGB, upright, transparency over white.

    Args:
        source: a path, a PIL image, or an array (H, W), (H, W, 3) or (H, W, 4) of uint8 in [0, 255]
            or of floats in [0, 1].
        where: what to call it in an error.

    Raises:
        ValueError: not an image, a truncated one, or one of more than ``MAX_PIXELS`` pixels.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, where)
    if isinstance(source, Image.Image):
        return _to_rgb(source, where)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"{where}: give a PIL image, a path or a NumPy array, got "
                         f"{type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{where}: there is no file {str(path)!r}")
    try:
        with warnings.catch_warnings():
            # Pillow warns of what is refused below: the limit here is the lower one.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return _to_rgb(image, f"{where} {path.name!r}")
    except UnidentifiedImageError:
        raise ValueError(f"{where}: {path.name!r} is not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{where}: {path.name!r} has too many pixels (over {MAX_PIXELS:,}); "
                         "make it smaller first") from None
    except PermissionError:
        raise ValueError(f"{where}: you may not read {str(path)!r}") from None
    except (OSError, SyntaxError) as error:  # a header that is cut off, among others
        raise ValueError(f"{where} {path.name!r} is truncated or corrupt: {error}") from None


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:  # known from the header, before decoding
        raise ValueError(f"{where} is {image.width} x {image.height}, over the {MAX_PIXELS:,} "
                         "pixels allowed; make it smaller first")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{where} is truncated or corrupt: {error}") from None
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit and float greys: Pillow's own conversion clips at 255 instead of scaling.
        grey = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else max(1.0, float(grey.max(initial=0)))
        grey = (grey.clip(0, top) / top * 255).round().astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray, where: str) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not shaped or array.size == 0:
        raise ValueError(f"{where}: an array must be (H, W), (H, W, 3) or (H, W, 4), got "
                         f"{array.shape}")
    if array.dtype != np.uint8:
        low, high = float(array.min()), float(array.max())
        if array.dtype.kind != "f" or not (low >= 0 and high <= 1):  # NaN is refused too
            raise ValueError(f"{where}: an array must be uint8 in [0, 255] or float in [0, 1], "
                             f"got {array.dtype} in [{low:g}, {high:g}]")
        array = (array * 255).round().astype(np.uint8)
    return _to_rgb(Image.fromarray(array), where)


def fit_square(image: Image.Image, side: int) -> Image.Image:
    """RGB of ``side`` x ``side``: the whole picture, on white where it is not square."""
    if image.size == (side, side):
        return image
    scale = side / max(image.size)
    size = tuple(max(1, round(n * scale)) for n in image.size)
    canvas = Image.new("RGB", (side, side), "white")
    canvas.paste(image.resize(size, Image.Resampling.LANCZOS),
                 ((side - size[0]) // 2, (side - size[1]) // 2))
    return canvas


def to_uint8(images: Sequence[ImageLike], side: int) -> np.ndarray:
    """Images -> (B, side, side, 3) uint8."""
    if len(images) == 0:
        raise ValueError("no image was given")
    return np.stack([np.asarray(fit_square(load_image(i), side)) for i in images])


class PixelCodec:
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
