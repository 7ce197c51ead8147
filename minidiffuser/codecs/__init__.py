"""Codecs: between data as people see it and the tensors the network reads.

A codec has ``encode(list of data) -> (B, *shape)``, ``decode(tensor) -> list of data``, and
``state() / from_state(...)`` so that a checkpoint holds it whole.  One that makes several parts of
a modality has ``shapes``, and a dictionary by part where others have a tensor.  What features keep
on disk is float16 latents, unless a codec has ``to_disk`` and ``from_disk`` of its own.

Images default to **pixels**: with large patches and x_0 prediction a transformer needs no
autoencoder at 64 x 64, and pixels are what the image scores are measured in.  Captions default to
**words**: each word has a fixed code, decoding is the nearest code, so that a round trip is exact
and nothing has to be trained first.  ``benchmarks/recipes.md`` measures both against alternatives.
The official model's own, pretrained networks, are in ``pretrained``.
"""

from typing import Any

from torch import Tensor

from ..images import load_image
from .captions import WordCodec
from .pixels import PCACodec, PixelCodec
from .pretrained import CaptionDecoderCodec, Pretrained, StableDiffusionCodec

__all__ = ["CODECS", "CaptionDecoderCodec", "PCACodec", "PixelCodec", "Pretrained",
           "StableDiffusionCodec", "WordCodec", "by_part", "load_image", "shapes_of"]

CODECS = {codec.kind: codec for codec in (
    PixelCodec, PCACodec, WordCodec, StableDiffusionCodec, CaptionDecoderCodec)}


def shapes_of(name: str, codec: Any) -> dict[str, tuple[int, ...]]:
    """Part -> shape without the batch, of the codec of the modality ``name``."""
    return codec.shapes if hasattr(codec, "shapes") else {name: codec.shape}


def by_part(name: str, latents: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """What a codec made, by part: a codec of one part makes a tensor."""
    return latents if isinstance(latents, dict) else {name: latents}
