"""Codecs: between data as people see it and the tensors the network reads.

A codec has ``encode(list of data) -> (B, *shape)``, ``decode(tensor) -> list of data``, and
``state() / from_state(...)`` so that a checkpoint holds it whole; the rest it has from
``base.Codec``.

Images default to **pixels**: with large patches and x_0 prediction a transformer needs no
autoencoder at 64 x 64, and pixels are what the image scores are measured in.  Captions default to
**words**: each word has a fixed code, decoding is the nearest code, so that a round trip is exact
and nothing has to be trained first.  ``benchmarks/recipes.md`` measures both against alternatives.
The official model's own, pretrained networks, are in ``pretrained``.
"""

from ..images import load_image
from .base import Codec
from .captions import WordCodec
from .pixels import PCACodec, PixelCodec
from .pretrained import CaptionDecoderCodec, Pretrained, StableDiffusionCodec

__all__ = ["CODECS", "CaptionDecoderCodec", "Codec", "PCACodec", "PixelCodec", "Pretrained",
           "StableDiffusionCodec", "WordCodec", "load_image"]

CODECS = {codec.kind: codec for codec in (
    PixelCodec, PCACodec, WordCodec, StableDiffusionCodec, CaptionDecoderCodec)}
