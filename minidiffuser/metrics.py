"""Scores of an image-caption model on a table small enough to search whole.

    t2i_top1      share of captions whose generated image is nearest, among all images of train and
                  test (L2 between 32 x 32 RGB), to the caption's own image
    i2t_exact     share of images whose generated caption is the image's own, word for word
    i2t_token_f1  mean F1 of the tokens of generated and own caption, as bags
    joint_top1    share of generated pairs whose caption is that of the image nearest to the image

They are comparable between models on the same table, and with nothing else: not with FID or CLIP
score, and not across tables.  Identical drawings under two captions count as each other's own.

With a CLIP (``clip="tiny"``) the mean cosine of image and text comes beside them, for those scores
where nothing has to be found again word for word:

    t2i_similarity    of generated images and the captions they were made for
    i2t_similarity    of generated captions and the images they were written for
    own_similarity    of the table's own pairs; other_similarity, of each image and the next one's
                      caption: what is good, and what is chance
    joint_similarity  of generated pairs

It is that CLIP's own scale: the tiny one's numbers say nothing beside those of another.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .clip import load_scorer, similarity
from .pipeline import UniDiffuser, training_arrays

if TYPE_CHECKING:
    from .clip import Scorer

SCORE_SIDE = 32


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """A 95% interval of a proportion (Wilson, JASA 1927), sound for few samples and near 0 or 1."""
    if n < 1:
        raise ValueError(f"an interval needs at least 1 sample, got {n}")
    p, shrink = successes / n, 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(
    values: Sequence[float], z: float = 1.96, least: float = 0.0
) -> tuple[float, float]:
    """A 95% interval of a mean of values in [least, 1], by the normal approximation, clipped."""
    if len(values) < 2:
        raise ValueError(f"an interval of a mean needs at least 2 samples, got {len(values)}")
    middle = sum(values) / len(values)
    error = z * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return max(least, middle - error), min(1.0, middle + error)


def proportion(successes: int, n: int) -> dict:
    """A score: a share of n, with its 95% interval."""
    return {"value": successes / n, "interval": wilson(successes, n), "n": n}


def mean(values: Sequence[float], least: float = 0.0) -> dict:
    """A score: the mean of values in [least, 1], with its 95% interval."""
    return {"value": sum(values) / len(values), "interval": mean_interval(values, least=least),
            "n": len(values)}


def token_f1(generated: Sequence, own: Sequence) -> float:
    """F1 of two bags of tokens: 1 for the same bag, 0 for nothing in common."""
    common = sum((Counter(generated) & Counter(own)).values())
    return 2 * common / (len(generated) + len(own)) if common else float(not generated and not own)


def small(pixels: np.ndarray) -> Tensor:
    """(N, S, S, 3) uint8 -> (N, 32 * 32 * 3) float32, by averaging squares."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return torch.nn.functional.adaptive_avg_pool2d(x, SCORE_SIDE).flatten(1)


class Gallery:
    """All images of a table, searched by L2 distance.

    Args:
        pixels: (N, S, S, 3) uint8; captions: N.
    """

    def __init__(self, pixels: np.ndarray, captions: Sequence[str]):
        self.points, self.captions = small(pixels), list(captions)

    def captions_of_nearest(self, pixels: np.ndarray, slack: float = 1e-4) -> list[set[str]]:
        """For each image, the captions of the nearest one and of those identical to it."""
        distance = torch.cdist(small(pixels), self.points,
                               compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distance <= distance.min(1, keepdim=True).values + slack
        return [{self.captions[i] for i in row.nonzero()[:, 0].tolist()} for row in nearest]


def evaluate(
    pipe: UniDiffuser, n: int = 188, seed: int = 0, steps: int = 25, guidance_scale: float = 1.0,
    spacing: str = "time", clip: "str | Scorer | None" = None,
) -> dict:
    """Score a model on ``n`` captions of the held-out split, and on as many of train.

    Args:
        n: rows of each split, evenly spaced through it (all of it where it has fewer); at least 2.
        spacing: of the solver's times; see ``UniDiffuser.sample_latents``.
        clip: what measures similarity: a scorer, or a name for ``clip.load_scorer``; None for none.

    Returns:
        ``{"test": {score: {"value", "interval", "n"}}, "train": ..., "joint_top1": ...,
        "settings"}``; joint samples belong to no split.

    Raises:
        ValueError: too small an ``n``, or a CLIP that cannot be loaded.
    """
    if n < 2:
        raise ValueError(f"scores with intervals need at least 2 rows of each split, got n={n}")
    scorer = load_scorer(clip) if isinstance(clip, str) else clip
    tables = {split: training_arrays(pipe.cfg, split) for split in ("train", "test")}
    gallery = Gallery(np.concatenate([t[0] for t in tables.values()]),
                      [c for t in tables.values() for c in t[1]])
    how = {"steps": steps, "guidance_scale": guidance_scale, "seed": seed, "spacing": spacing}
    scores = {split: _score_split(pipe, gallery, *tables[split], n, how, scorer)
              for split in ("test", "train")}
    images, captions = _in_batches(pipe, ("image", "text"), {}, n, how)
    nearest = gallery.captions_of_nearest(images)
    hits = sum(c in found for c, found in zip(captions, nearest, strict=True))
    scores["joint_top1"] = proportion(hits, n)
    if scorer:
        scores["joint_similarity"] = mean_similarity(scorer, images, captions)
        how["clip"] = scorer.name
    return {**scores, "settings": how}


def mean_similarity(scorer: "Scorer", images: Sequence, captions: Sequence[str]) -> dict:
    """Mean cosine of images (PIL, or (S, S, 3) uint8) and their captions, with its interval."""
    pictures = [Image.fromarray(i) if isinstance(i, np.ndarray) else i for i in images]
    return mean(similarity(scorer, pictures, captions).tolist(), least=-1.0)


def _score_split(pipe, gallery, pixels, captions, n, how, scorer) -> dict:
    rows = np.unique(np.linspace(0, len(captions) - 1, min(n, len(captions))).round().astype(int))
    pixels, captions = pixels[rows], [captions[i] for i in rows]
    images, _ = _in_batches(pipe, ("image",), {"text": captions}, len(rows), how)
    nearest = gallery.captions_of_nearest(images)
    top1 = sum(c in found for c, found in zip(captions, nearest, strict=True))
    given = {"image": [Image.fromarray(p) for p in pixels]}
    _, texts = _in_batches(pipe, ("text",), given, len(rows), how)
    # An image drawn under two captions may be called by either.
    right = gallery.captions_of_nearest(pixels)
    exact = sum(t in names for t, names in zip(texts, right, strict=True))
    split = pipe.codecs["text"].split
    f1 = [max(token_f1(split(t), split(name)) for name in names)
          for t, names in zip(texts, right, strict=True)]
    scores = {"t2i_top1": proportion(top1, len(rows)), "i2t_exact": proportion(exact, len(rows)),
              "i2t_token_f1": mean(f1)}
    if scorer:
        pairs = {"t2i": (images, captions), "i2t": (pixels, texts), "own": (pixels, captions),
                 "other": (pixels, [*captions[1:], captions[0]])}
        scores |= {f"{k}_similarity": mean_similarity(scorer, *v) for k, v in pairs.items()}
    return scores


def _in_batches(pipe, sampled, given, n, how, size: int = 64) -> tuple[np.ndarray, list[str]]:
    """Sample n items in batches, each with a seed of its own: (n, S, S, 3) uint8 and captions."""
    images, texts = [], []
    for start in range(0, n, size):
        stop = min(start + size, n)
        batch = {k: v[start:stop] for k, v in given.items()}
        made = pipe.sample(sampled, batch, stop - start,
                           **{**how, "seed": how["seed"] * 1_000_003 + start})
        images += [np.asarray(i) for i in made.get("image", [])]
        texts += made.get("text", [])
    return np.stack(images) if images else np.zeros(0), texts
