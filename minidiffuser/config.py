"""What a model is and how it is trained, as data: parts, networks, and one table of presets.

``PRESETS`` goes from ``toy``, which trains in seconds, to the official 952M-parameter UniDiffuser.
Every value can be changed from the command line: ``python -m minidiffuser train emoji --dim 240``.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from .errors import choose, suggest

if TYPE_CHECKING:
    from torch import Tensor

NORMS = ("pre", "post")


@dataclass(frozen=True)
class Part:
    """One tensor the network reads and predicts.

    Args:
        name: its key in the dictionaries that go in and come out.
        shape: without the batch: ``(L, D)`` for a sequence, ``(C, H, W)`` for an image.
        clock: the timestep it shares.
        patch: side of the square patches an image is cut into; 1 for a sequence.

    Raises:
        ValueError: a shape that is neither, or one that the patch does not divide.
    """

    name: str
    shape: tuple[int, ...]
    clock: str
    patch: int = 1

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))  # JSON brings lists
        if len(self.shape) not in (2, 3) or min(self.shape) < 1:
            raise ValueError(f"part {self.name!r}: shape must be (L, D) or (C, H, W), "
                             f"got {self.shape}")
        if self.is_image and (self.patch < 1 or any(n % self.patch for n in self.shape[1:])):
            raise ValueError(f"part {self.name!r}: patches of {self.patch} do not tile "
                             f"{self.shape[1]} x {self.shape[2]}")

    @property
    def is_image(self) -> bool:
        return len(self.shape) == 3

    @property
    def tokens(self) -> int:
        """How many tokens the part becomes."""
        if not self.is_image:
            return self.shape[0]
        return (self.shape[1] // self.patch) * (self.shape[2] // self.patch)

    @property
    def token_dim(self) -> int:
        """How many numbers one token carries."""
        return self.shape[0] * self.patch**2 if self.is_image else self.shape[1]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to_tokens(self, x: "Tensor") -> "Tensor":
        """(B, *shape) -> (B, tokens, token_dim), patches row by row, each as (p1, p2, C)."""
        if not self.is_image:
            return x
        (c, h, w), p = self.shape, self.patch
        x = x.reshape(-1, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)  # (B, h, w, p, p, C)
        return x.reshape(-1, self.tokens, self.token_dim)

    def from_tokens(self, tokens: "Tensor") -> "Tensor":
        """The inverse of :meth:`to_tokens`."""
        if not self.is_image:
            return tokens
        (c, h, w), p = self.shape, self.patch
        x = tokens.reshape(-1, h // p, w // p, p, p, c).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(-1, c, h, w)


@dataclass(frozen=True)
class UViTConfig:
    """The network's shape. The official model is ``PRESETS["unidiffuser-v1"]``.

    Args:
        parts: in the order in which their tokens stand.
        dim: width, divisible by 2 x heads.  depth: blocks beside the middle one, half before it and
            half after, so an even number.
        norm: ``"post"`` (UniDiffuser: LayerNorm on the stream, after each addition) or ``"pre"``.
        qk_norm: RMS-normalise queries and keys (not in the official model).
        data_types: how many kinds of data a ``data_type`` token tells apart; 0 for no such token.
        checkpoint: recompute activations in the backward pass, trading time for memory.
    """

    parts: tuple[Part, ...]
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    norm: str = "post"
    qkv_bias: bool = False
    qk_norm: bool = False
    data_types: int = 0
    checkpoint: bool = False

    def __post_init__(self):
        parts = tuple(p if isinstance(p, Part) else Part(**p) for p in self.parts)
        object.__setattr__(self, "parts", parts)
        names = [p.name for p in parts]
        if not parts or len(set(names)) < len(names):
            raise ValueError(f"parts must be at least one, with names of their own, got {names}")
        if self.depth < 2 or self.depth % 2:
            raise ValueError(f"depth must be even and at least 2 (two mirrored halves around the "
                             f"middle block), got {self.depth}")
        if self.heads < 1 or self.dim % (2 * self.heads):
            raise ValueError(f"dim={self.dim} must be a multiple of 2 x heads = {2 * self.heads}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {self.norm!r}")

    @property
    def clocks(self) -> tuple[str, ...]:
        """The clocks, i.e. the modalities: images first, then in order of appearance."""
        images = [p.clock for p in self.parts if p.is_image]
        return tuple(dict.fromkeys(images + [p.clock for p in self.parts]))

    @property
    def tokens(self) -> int:
        """Length of the token sequence, a possible data-type token included."""
        return len(self.clocks) + (self.data_types > 0) + sum(p.tokens for p in self.parts)


@dataclass(frozen=True)
class Config:
    """Everything a training run is made of; the defaults are those of ``emoji``.

    In five groups: data and codecs, the network, the objective, the optimiser, and housekeeping.
    """

    # ---- data and codecs ----
    data: str = "emoji"              # a shipped table, or a folder of a table or features
    filters: str = ""                # steps over the training split: see data.filters.parse_all
    image_codec: str = "pixels"      # pixels | pca | sd-vae+clip
    image_size: int = 64             # side of the images, in pixels
    pca_dim: int = 64                # numbers kept per 8 x 8 patch by the codec "pca"
    caption_codec: str = "words"     # words | clip+gpt2
    caption_codes: str = "semantic"  # semantic | random: where the words' codes come from
    caption_length: int = 16         # tokens of a caption
    caption_dim: int = 32            # numbers per token
    pretrained: str = "thu-ml/unidiffuser-v1"  # weights of the codecs sd-vae+clip and clip+gpt2
    # ---- network ----
    dim: int = 320
    depth: int = 6
    heads: int = 5
    patch: int = 16                  # side of the patches, in latent pixels
    norm: str = "pre"                # pre | post
    qk_norm: bool = False
    data_types: int = 0
    checkpoint: bool = False         # recompute activations: less memory, a third more time
    # ---- objective ----
    schedule: str = "cosine"         # scaled-linear | linear | cosine
    prediction: str = "x0"           # eps | x0 | v
    weighting: str = "clipped-v"     # eps | x0 | v | min-snr | clipped-v
    gamma: float = 2.5               # where min-snr and clipped-v stop growing
    square: float = 0.1              # shares of the timestep square: see objective.TimestepMix
    given: float = 0.55
    ignored: float = 0.15
    diagonal: float = 0.2
    noise_bias: float = 2.0          # above 1: the last three are more often very noisy
    favour_image: float = 0.6        # share of the image as the noisy one of given and ignored
    text_weight: float = 1.0         # factor of the text loss
    # ---- optimiser ----
    optimizer: str = "muon"          # muon (matrices of the blocks; adamw for the rest) | adamw
    lr: float = 3e-3                 # of both: see train.make_optimizers
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.01
    warmup: int = 100                # steps of linear warm-up
    cooldown: float = 0.15           # last share of the steps, over which the rate falls to 0
    clip: float = 1.0                # largest gradient norm; 0 for no clipping
    batch_size: int = 128            # over all processes
    steps: int = 9_800
    ema: float = 0.999               # decay of the averaged weights
    precision: str = "bf16"          # bf16 | fp16 (GPU only) | no
    # ---- housekeeping ----
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    sample_every: int = 1000
    keep: int = 2                    # checkpoints kept

    def __post_init__(self):
        positive = ("image_size", "caption_length", "caption_dim", "batch_size", "steps",
                    "log_every", "save_every", "sample_every", "keep", "lr", "gamma")
        for key in positive:
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be above 0, got {getattr(self, key)}")
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise ValueError(f"{key} must be one of {', '.join(known)}; got "
                                 f"{getattr(self, key)!r}.{suggest(getattr(self, key), known)}")
        for key in ("ema", "cooldown", "favour_image"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must lie in [0, 1], got {getattr(self, key)}")

    def parts(self) -> tuple[Part, ...]:
        """The network's parts, in token order."""
        text = Part("text", (self.caption_length, self.caption_dim), clock="text")
        side = self.image_size
        if self.image_codec == "sd-vae+clip":
            return (text, Part("clip_img", (1, 512), clock="image"),
                    Part("z", (4, side // 8, side // 8), clock="image", patch=self.patch))
        if self.image_codec == "pca":
            shape = (self.pca_dim, side // 8, side // 8)
            return (text, Part("image", shape, clock="image", patch=self.patch))
        return (text, Part("image", (3, side, side), clock="image", patch=self.patch))

    def pretrained_codecs(self) -> list[str]:
        """Those of the two codecs that are networks with weights of their own."""
        return [kind for kind in (self.image_codec, self.caption_codec) if kind in PRETRAINED]

    def network(self) -> UViTConfig:
        """The shape of the network."""
        shared = {f.name for f in dataclasses.fields(UViTConfig)} & set(self.keys())
        return UViTConfig(parts=self.parts(), **{key: getattr(self, key) for key in shared})

    # ---- changing and storing -----------------------------------------------------------------

    @classmethod
    def keys(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)]

    def replace(self, **changes: Any) -> "Config":
        """A copy with other values; strings are read as the field's type.

        Raises:
            ValueError: an unknown key (with the nearest ones) or a value of the wrong type.
        """
        hints = get_type_hints(type(self))
        read = {}
        for key, value in changes.items():
            kind = hints[choose("setting", key, dict.fromkeys(self.keys(), key))]
            read[key] = _read(key, value, kind)
        return dataclasses.replace(self, **read)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


PRETRAINED = ("sd-vae+clip", "clip+gpt2")  # codecs that are not fitted to a table
CHOICES = {
    "image_codec": ("pixels", "pca", "sd-vae+clip"),
    "caption_codec": ("words", "clip+gpt2"),
    "caption_codes": ("semantic", "random"),
    "norm": NORMS,
    "schedule": ("scaled-linear", "linear", "cosine"),
    "prediction": ("eps", "x0", "v"),
    "weighting": ("eps", "x0", "v", "min-snr", "clipped-v"),
    "optimizer": ("muon", "adamw"),
    "precision": ("bf16", "fp16", "no"),
}


def _read(key: str, value: Any, kind: type) -> Any:
    """A command line's string as an int, float, bool or str."""
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "1": True, "yes": True,
                    "false": False, "0": False, "no": False}[value.lower()]
        if kind is int and isinstance(value, float) and value != int(value):
            raise ValueError
        return kind(value)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{key} must be {kind.__name__}, got {value!r}") from None


# Nobody has scored clipart's safety (a distribution ships it to everyone), so that is off.
CLEAN_CLIPART = ("-punsafe readable min_size=32 language=en,nolang caption_words=1,12 "
                 "caption_repeats=4 exact_duplicates near_duplicates similarity=0")

_TOY = Config(
    caption_codes="random", dim=32, depth=2, heads=2, image_size=16, patch=8, batch_size=16,
    steps=200, warmup=10, log_every=10, save_every=50, sample_every=100,
)

# What the official model is: network and process from its released configuration; the optimiser's
# numbers are U-ViT's, since UniDiffuser's own were never released.
_OFFICIAL = Config(
    data="laion", image_codec="sd-vae+clip", image_size=512, caption_codec="clip+gpt2",
    caption_length=77, caption_dim=64,
    dim=1536, depth=30, heads=24, patch=2, norm="post", qk_norm=False, checkpoint=True,
    schedule="scaled-linear", prediction="eps", weighting="eps",
    square=1.0, given=0.0, ignored=0.0, diagonal=0.0, noise_bias=1.0, favour_image=0.5,
    optimizer="adamw", lr=2e-4, beta1=0.9, beta2=0.9, weight_decay=0.03, warmup=5000, cooldown=0.0,
    clip=0.0, batch_size=2112, steps=200_000, ema=0.9999, log_every=100, save_every=5000,
    sample_every=5000,
)

PRESETS: dict[str, Config] = {
    #                                                 parameters   tokens  what it is for
    "toy": _TOY,                                      # 55 k             22  tests: seconds on a CPU
    "emoji": Config(),                                # 9.8 M            34  the shipped model
    "clipart": Config(                                # 6.3 M            42  minutes: lesson 07
        data="clipart", dim=256, heads=4, caption_length=24, steps=1200, filters=CLEAN_CLIPART),
    "bench-45m": _OFFICIAL.replace(                   # 44.9 M          336  to compare speed
        image_size=256, dim=512, depth=12, heads=8, checkpoint=False, batch_size=8),
    "unidiffuser-v0": _OFFICIAL,                      # 952,504,912    1104  official, LAION-5B
    "unidiffuser-v1": _OFFICIAL.replace(data_types=2),  # 952,509,520  1105  official, and curated
}


def preset(name: str) -> Config:
    """A row of ``PRESETS``. Raises ValueError, with the nearest names, for an unknown one."""
    return choose("preset", name, PRESETS)


def overrides(words: list[str]) -> dict[str, str]:
    """Settings on a command line: ['--dim', '256', '--lr=1e-3'] -> {'dim': '256', 'lr': '1e-3'}."""
    found, words = {}, list(words)
    while words:
        key, equals, value = words.pop(0).partition("=")
        if not key.startswith("--") or not (equals or words):
            raise ValueError(f"settings are given as --key value, got {key!r}")
        found[key[2:].replace("-", "_")] = value if equals else words.pop(0)
    return found
