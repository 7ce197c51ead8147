"""What every codec can be asked for; most need only ``encode``, ``decode``, ``shape`` and state."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Codec:
    """Between the data of one modality and its latents.

    A codec has ``kind``, ``shape`` (of latents, without the batch), ``encode(items)``,
    ``decode(latents)``, ``state()`` and ``from_state(...)``.  What stands here is for codecs whose
    latents are one part, called as the modality is; one that makes several, such as
    ``pretrained.StableDiffusionCodec``, says so by the methods that take ``name``.
    """

    kind: str
    random = False  # whether an item's latents are a distribution, to be drawn from

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Part -> shape without the batch, as the codec of the modality ``name``."""
        return {name: self.shape}

    def encode_parts(
        self, name: str, items: Sequence[Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Items -> latents by part, (B, *shape); ``generator`` draws where there is a choice."""
        return {name: self.encode(items)}

    def decode_parts(self, name: str, latents: dict[str, Tensor]) -> list:
        """Latents by part -> items."""
        return self.decode(latents[name])

    def to_disk(self, items: Sequence[Any]) -> dict[str, Tensor]:
        """What features keep of items; floats will be rounded to float16."""
        return {"latents": self.encode(items)}

    def from_disk(
        self, name: str, stored: dict[str, Tensor],
        generators: Sequence[torch.Generator] | None = None,
    ) -> dict[str, Tensor]:
        """Latents by part, float32, of what :meth:`to_disk` made; one generator for each row."""
        return {name: stored["latents"].float()}

    def refuses(self, item: Any) -> str | None:
        """Why an item cannot be encoded, in two or three words; None where it can."""
        return None

    def to(self, device: str | torch.device) -> None:
        """Run on another device from now on, where there is a network to run."""

    def load(self) -> None:
        """Read now what is read when first needed. Raises ValueError where that cannot be done."""
