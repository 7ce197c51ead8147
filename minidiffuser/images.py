"""Opening whatever a user or the web calls an image, safely, as 8-bit RGB.

Needs NumPy and Pillow only, so that tables can be read without loading PyTorch.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

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


def crop_square(image: Image.Image, side: int) -> Image.Image:
    """RGB of ``side`` x ``side``: the largest square in the middle."""
    short = min(image.size)
    left, top = ((n - short) // 2 for n in image.size)
    square = image.crop((left, top, left + short, top + short))
    return square.resize((side, side), Image.Resampling.LANCZOS)


def to_uint8(images: Sequence[ImageLike], side: int) -> np.ndarray:
    """Images -> (B, side, side, 3) uint8."""
    if len(images) == 0:
        raise ValueError("no image was given")
    return np.stack([np.asarray(fit_square(load_image(i), side)) for i in images])
