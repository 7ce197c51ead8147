"""Similarity of image and text: a tiny CLIP trained here, and OpenAI's or open_clip's in its place.

    scorer = load_scorer("tiny")
    scorer.similarity(images, captions)          # (N,) cosines in [-1, 1]

CLIP (Radford et al., arXiv:2103.00020) has two encoders whose unit vectors f(image) and g(text) are
pulled together for pairs and pushed apart for all other combinations of a batch:

    loss = mean over the batch of  -log softmax_j( f_i . g_j / tau )_i,  both ways

A score of one model cannot be compared with that of another: the tiny one's least of all with what
papers print.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoints import shipped_folders
from .data import filters
from .errors import first_line
from .images import to_uint8

if TYPE_CHECKING:
    import datasets


class Scorer(Protocol):
    """What measures similarity: two encoders into one space."""

    name: str

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, D) float32 unit vectors."""

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) float32 unit vectors."""


def similarity(
    scorer: Scorer, images: Sequence[Image.Image], texts: Sequence[str], batch: int = 256
) -> Tensor:
    """Cosine of each image with the text of the same number, (N,) in [-1, 1].

    Raises:
        ValueError: not as many texts as images.
    """
    if len(images) != len(texts):
        raise ValueError(f"similarity is of pairs: got {len(images)} images and {len(texts)} texts")
    parts = [(scorer.images(images[i : i + batch]) * scorer.texts(texts[i : i + batch])).sum(1)
             for i in range(0, len(images), batch)]
    return torch.cat(parts) if parts else torch.zeros(0)


def add_similarity(table: "datasets.Dataset", scorer: Scorer, batch: int = 256
                   ) -> "datasets.Dataset":
    """A table with the column ``similarity`` filled; null where image or caption is missing.

    Raises:
        ValueError: the table has no column of images or captions.
    """
    from datasets import Value  # seconds to import

    names = filters.check_columns(table, [filters.readable(), filters.caption_words()])
    values: list[float | None] = []
    raw = filters.raw_images(table, names)
    for start in range(0, len(raw), batch):
        rows = raw[start : start + batch]
        images = [filters.open_image(v) for v in rows[names["image"]]]
        texts = rows[names["TEXT"]]
        whole = [i for i, (im, t) in enumerate(zip(images, texts, strict=True)) if im and t]
        scored = similarity(scorer, [images[i] for i in whole], [texts[i] for i in whole])
        found = dict(zip(whole, scored.tolist(), strict=True))
        values += [found.get(i) for i in range(len(texts))]
    column = names.get("similarity", "similarity")
    kept = table.remove_columns(column) if column in table.column_names else table
    return kept.add_column(column, values, feature=Value("float64")).select_columns(
        list(dict.fromkeys([*table.column_names, column])))


# ---- the tiny model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipConfig:
    """Shape of the tiny CLIP. ``widths``: channels at a quarter, an eighth, ... of the image."""

    side: int = 64                               # pixels
    widths: tuple[int, ...] = (64, 128, 192)
    dim: int = 192                               # of the space both encoders share
    vocabulary: int = 3000                       # word pieces
    length: int = 24                             # word pieces of a text


class TinyCLIP(nn.Module):
    """A convolutional image encoder and a bag-of-word-pieces text encoder.

    Args:
        cfg: its shape. tokenizer: text -> word pieces; see :func:`fit_tokenizer`.
    """

    name = "tiny"

    def __init__(self, cfg: ClipConfig, tokenizer: Tokenizer):
        super().__init__()
        self.cfg, self.tokenizer = cfg, tokenizer
        stages, before = [], 3
        for width in cfg.widths:
            stride = 4 if before == 3 else 2
            stages += [nn.Conv2d(before, width, stride, stride=stride), ConvBlock(width)]
            before = width
        self.image = nn.Sequential(*stages, nn.GroupNorm(1, before), nn.AdaptiveAvgPool2d(2),
                                   nn.Flatten(), nn.Linear(4 * before, cfg.dim))
        self.pieces = nn.Embedding(cfg.vocabulary, cfg.dim, padding_idx=0)
        self.text = nn.Sequential(nn.LayerNorm(cfg.dim), nn.Linear(cfg.dim, 2 * cfg.dim), nn.GELU(),
                                  nn.Linear(2 * cfg.dim, cfg.dim))
        self.log_scale = nn.Parameter(torch.tensor(np.log(1 / 0.07)))  # 1 / tau, as CLIP begins

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """(B, 3, side, side) in [-1, 1] -> (B, dim) unit vectors."""
        return F.normalize(self.image(pixels), dim=-1)

    def encode_ids(self, ids: Tensor) -> Tensor:
        """(B, length) int64, 0 for padding -> (B, dim) unit vectors."""
        known = (ids > 0).sum(1, keepdim=True).clamp(min=1)
        mean = self.pieces(ids).sum(1) / known.sqrt()       # sqrt: a longer text says more
        return F.normalize(mean + self.text(mean), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """(N, length) int64: word pieces, cut or padded with 0."""
        ids = torch.zeros(len(texts), self.cfg.length, dtype=torch.long)
        for row, coded in zip(ids, self.tokenizer.encode_batch([t or "" for t in texts]),
                              strict=True):
            cut = coded.ids[: self.cfg.length]
            row[: len(cut)] = torch.tensor(cut, dtype=torch.long)
        return ids

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        return self.encode_pixels(as_pixels(to_uint8(images, self.cfg.side)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return self.encode_ids(self.tokenize(texts))

    def save(self, folder: str | Path) -> None:
        """Write clip.json (the tokenizer included) and model.safetensors, in float16."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"config": asdict(self.cfg), "tokenizer": json.loads(self.tokenizer.to_str())}
        (folder / "clip.json").write_text(json.dumps(config, ensure_ascii=False))
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()},
                  folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> "TinyCLIP":
        """Read what :meth:`save` wrote. Raises ValueError where it is missing or damaged."""
        folder = Path(folder)
        try:
            stored = json.loads((folder / "clip.json").read_text())
            cfg = stored["config"]
            model = cls(ClipConfig(**{**cfg, "widths": tuple(cfg["widths"])}),
                        Tokenizer.from_str(json.dumps(stored["tokenizer"])))
            weights = load_file(folder / "model.safetensors")
            model.load_state_dict({k: v.float() for k, v in weights.items()})
        except Exception as error:  # tokenizers and safetensors raise errors of many kinds
            raise ValueError(f"{folder} is not a tiny CLIP that can be read: {error}") from None
        return model.eval().requires_grad_(False)


class ConvBlock(nn.Module):
    """x + two 3 x 3 convolutions of the normalised x (ResNet, arXiv:1603.05027)."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, width), nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def as_pixels(pixels: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 3, S, S) float32 in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Word pieces (byte-pair encoding) of lower-cased texts; id 0 is padding."""
    tokenizer = Tokenizer(models.BPE(unk_token="[unk]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    # Titles come as file_names and CamelCase too, and a number is hardly ever part of a word.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("_", "removed"), pre_tokenizers.Whitespace(),
        pre_tokenizers.Digits(individual_digits=False)])
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["[pad]", "[unk]"],
                                  show_progress=False, max_token_length=16)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ---- training it ---------------------------------------------------------------------------------


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, ids: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy; texts that are the same are not told apart.

    Args:
        image, text: (B, D) unit vectors. scale: 1 / tau. ids: (B, L), equal rows for equal texts.
    """
    logits = scale * image @ text.T                                               # (B, B)
    same = (ids[:, None] == ids[None]).all(-1).float()
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(
    model: TinyCLIP, pixels: np.ndarray, texts: Sequence[Sequence[str]], *,
    epochs: int, batch: int = 256, lr: float = 2e-3, seed: int = 0,
) -> Iterator[tuple[int, float]]:
    """Train on images (N, side, side, 3) uint8, each with one or several texts to draw from.

    Yields:
        (step, loss) after each optimiser step; the number of steps is ``epochs * (N // batch)``.

    Raises:
        ValueError: fewer images than a batch, or not as many lists of texts as images.
    """
    if not batch <= len(pixels) == len(texts):
        raise ValueError(f"training needs at least a batch of {batch} images, and texts for each: "
                         f"got {len(pixels)} images and {len(texts)} lists of texts")
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(pixels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train().to(memory_format=torch.channels_last)
    for step in range(steps):
        if step % (len(pixels) // batch) == 0:
            order = torch.randperm(len(pixels), generator=generator)
        start = step % (len(pixels) // batch) * batch
        rows = order[start : start + batch].tolist()
        chosen = [texts[i][int(torch.randint(len(texts[i]), (), generator=generator))]
                  for i in rows]
        ids = model.tokenize(chosen)
        x = jitter(as_pixels(pixels[rows]), generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):  # twice as fast here
            image, text = model.encode_pixels(x), model.encode_ids(ids)
        scale = model.log_scale.exp().clamp(max=100)
        loss = contrastive_loss(image.float(), text.float(), scale, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield step + 1, float(loss.detach())
    model.eval()


def jitter(x: Tensor, generator: torch.Generator, zoom: float = 0.2, shift: float = 0.12) -> Tensor:
    """Each image a little larger or smaller and moved, on white: titles do not depend on it.

    It is not mirrored: arrows, flags and hands would change their meaning.
    """
    b = len(x)
    draw = torch.rand(b, 3, generator=generator) * 2 - 1
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 + zoom * draw[:, 0]
    theta[:, :, 2] = shift * draw[:, 1:]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    # Outside the image grid_sample puts 0, so white is made 0 for a moment.
    return F.grid_sample(x - 1, grid, align_corners=False) + 1


def retrieval(scorer: Scorer, images: Sequence[Image.Image], texts: Sequence[str]) -> dict:
    """Recall at 1 and 5 of a set of pairs, each way.

    Identical texts count as each other's own. Chance is about k / N.
    """
    scores = scorer.images(images) @ scorer.texts(texts).T                        # (N, N)
    own = torch.tensor([[a == b for b in texts] for a in texts])
    result = {"n": len(texts)}
    for way, table in (("image_to_text", scores), ("text_to_image", scores.T)):
        best = table.masked_fill(~own, -2).max(1).values
        rank = (table.masked_fill(own, -2) > best[:, None]).sum(1)
        result[way] = {f"recall@{k}": float((rank < k).float().mean()) for k in (1, 5)}
    return result


# ---- models from elsewhere -----------------------------------------------------------------------


def load_scorer(name: str | os.PathLike = "tiny") -> Scorer:
    """A scorer by name.

    Args:
        name: ``"tiny"`` (shipped), a folder, a Hugging Face CLIP such as
            ``"openai/clip-vit-base-patch32"``, or ``"open_clip:MODEL/WEIGHTS"`` such as
            ``"open_clip:ViT-B-32/laion2b_s34b_b79k"``.

    Raises:
        ValueError: it is not there, cannot be downloaded, or needs a library that is missing.
    """
    name = str(name)
    for folder in (Path(name), *(d / "clip" for d in shipped_folders() if name == "tiny")):
        if (folder / "clip.json").is_file():
            return TinyCLIP.load(folder)
    if name == "tiny":
        raise ValueError("the tiny CLIP is not here: python data/train_clip.py makes it")
    return _open_clip(name[10:]) if name.startswith("open_clip:") else HubCLIP(name)


class HubCLIP:
    """A CLIP of Hugging Face `transformers`, by hub name or folder (extra: clip)."""

    def __init__(self, name: str):
        try:
            from transformers import AutoProcessor, CLIPModel
        except ImportError:
            raise ValueError(f"{name!r} needs `transformers`: pip install 'minidiffuser[clip]'"
                             ) from None
        try:
            self.model = CLIPModel.from_pretrained(name, use_safetensors=True).eval()
            self.processor = AutoProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load {name!r}: it is not the shipped 'tiny', a folder with a "
                             f"CLIP, or a name that can be downloaded now: {first_line(error)}"
                             ) from None
        self.name = name

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor(images=[i.convert("RGB") for i in images], return_tensors="pt")
        return F.normalize(_tensor(self.model.get_image_features(**inputs)).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        inputs = self.processor(text=list(texts), return_tensors="pt", padding=True,
                                truncation=True)
        return F.normalize(_tensor(self.model.get_text_features(**inputs)).float(), dim=-1)


def _tensor(output) -> Tensor:
    """The features: a tensor, or an output that holds them as `transformers` 5 returns it."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _open_clip(name: str) -> Scorer:
    try:
        import open_clip
    except ImportError:
        raise ValueError(f"open_clip:{name} needs `open_clip_torch`: pip install "
                         "'minidiffuser[open-clip]'") from None
    kind, slash, weights = name.partition("/")
    known = open_clip.list_pretrained()
    if not slash or (kind, weights) not in known:
        near = ", ".join(f"{k}/{w}" for k, w in known if k == kind) or "see open_clip's own list"
        raise ValueError(f"open_clip has no {name!r}: give MODEL/WEIGHTS ({near})")
    return OpenCLIP(open_clip, kind, weights)


class OpenCLIP:
    """A CLIP of `open_clip` (extra: open-clip)."""

    def __init__(self, library, kind: str, weights: str):
        self.name = f"open_clip:{kind}/{weights}"
        try:
            self.model, _, self.preprocess = library.create_model_and_transforms(
                kind, pretrained=weights)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"cannot download {self.name}: {first_line(error)}") from None
        self.tokenizer = library.get_tokenizer(kind)
        self.model.eval()

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        x = torch.stack([self.preprocess(i.convert("RGB")) for i in images])
        return F.normalize(self.model.encode_image(x).float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(self.model.encode_text(self.tokenizer(list(texts))).float(), dim=-1)
