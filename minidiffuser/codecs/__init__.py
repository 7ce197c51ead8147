"""Codecs: between data as people see it and the tensors the network reads.

A codec has ``encode(list of data) -> (B, *shape)``, ``decode(tensor) -> list of data``, and
``state() / from_state(...)`` so that a checkpoint holds it whole.

Images default to **pixels**: with large patches and x_0 prediction a transformer needs no
autoencoder at 64 x 64, and pixels are what the image scores are measured in.  Captions default to
**words**: each word has a fixed code, decoding is the nearest code, so that a round trip is exact
and nothing has to be trained first.  ``benchmarks/recipes.md`` measures both against alternatives.
"""

from ..images import load_image
from .captions import WordCodec
from .pixels import PCACodec, PixelCodec

__all__ = ["PCACodec", "PixelCodec", "WordCodec", "load_image"]
