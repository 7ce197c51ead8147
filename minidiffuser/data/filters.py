"""Filters: named steps that clean a table of images and captions, and say what they threw away.

    clean, report = apply(table, [language("en"), min_size(512), punsafe(0.1), near_duplicates()])
    print(report)                  # per step: rows kept, and why the others went

A step decides row by row, in batches, so the same steps run over a table in memory and over a
stream of two billion rows (``datasets.IterableDataset``).  Those that need to see the whole table
first (:func:`caption_repeats`) say so.  ``SUBSETS`` has the three of LAION-5B (Schuhmann et al.,
arXiv:2210.08402) that Stable Diffusion and UniDiffuser were trained on.
"""

import hashlib
import inspect
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..errors import choose
from ..images import fit_square, load_image

if TYPE_CHECKING:
    import datasets

Batch = dict[str, list]                        # canonical column -> values
Decide = Callable[[Batch], list[str | None]]   # why each row goes, or None where it stays

# What LAION-400M, LAION-5B, LAION-aesthetics, Re-LAION and img2dataset call the same things, in
# lower case: capitals differ between releases.
ALIASES = {
    "URL": ("url", "image_url"),
    "TEXT": ("text", "caption", "top_caption", "alt_text"),
    "WIDTH": ("original_width", "width"),    # img2dataset's `width` is that of the resized file
    "HEIGHT": ("original_height", "height"),
    "LANGUAGE": ("language", "lang"),
    "similarity": ("similarity", "clip_similarity"),
    "pwatermark": ("pwatermark", "watermark_score"),
    "punsafe": ("punsafe",),
    "aesthetic": ("aesthetic", "aesthetic_score", "score"),
    "image": ("image", "jpg", "png", "webp"),
}


def columns_of(table: "datasets.Dataset | datasets.IterableDataset") -> dict[str, str]:
    """Canonical name -> the table's own, for those it has."""
    present = {name.lower(): name for name in table.column_names or ()}
    return {name: next(present[a] for a in aliases if a in present)
            for name, aliases in ALIASES.items() if any(a in present for a in aliases)}


def columns_needed(table: Any, needed: Sequence[str], where: Any) -> dict[str, str]:
    """Canonical name -> the table's own. Raises ValueError naming the first that is missing."""
    names = columns_of(table)
    for name in needed:
        if name not in names:
            raise ValueError(f"{where} has no column {name} (or {', '.join(ALIASES[name])}); it "
                             f"has: {', '.join(table.column_names)}")
    return names


@dataclass(frozen=True)
class Step:
    """One named filter.

    Args:
        name: what the report and the command line call it.
        columns: canonical names of the columns it reads.
        start: makes a fresh decision function, with a memory of its own where it needs one.
        survey: called with every batch of the table first; only for a table that can be read twice.
    """

    name: str
    columns: tuple[str, ...]
    start: Callable[[], Decide]
    survey: Callable[[Decide, Batch], None] | None = None


# ---- the steps that read a number or a word ------------------------------------------------------


def language(*codes: str) -> Step:
    """Keep captions in these languages: ISO 639-1 codes, or ``nolang`` where none was certain."""
    return _per_row("language", "LANGUAGE",
                    lambda code: None if code in codes else f"in {code!r}")


def other_language(*codes: str) -> Step:
    """Keep captions in any language but these."""
    return _per_row("language", "LANGUAGE",
                    lambda code: f"in {code!r}" if code is None or code in codes else None)


def min_size(side: int) -> Step:
    """Keep images whose shorter side has at least ``side`` pixels, as it was on the web."""

    def decide(batch: Batch) -> list[str | None]:
        return ["size unknown" if not (w and h) else
                f"a side below {side} pixels" if min(w, h) < side else None
                for w, h in zip(batch["WIDTH"], batch["HEIGHT"], strict=True)]

    return Step("min_size", ("WIDTH", "HEIGHT"), lambda: decide)


def aesthetic(least: float) -> Step:
    """Keep images that LAION's aesthetic predictor gives at least this, of 1 to 10."""
    return _threshold("aesthetic", least, below=True)


def similarity(least: float) -> Step:
    """Keep pairs whose CLIP embeddings have at least this cosine (LAION-5B: 0.28 for English)."""
    return _threshold("similarity", least, below=True)


def watermark(most: float) -> Step:
    """Keep images whose probability of a watermark is at most this."""
    return _threshold("pwatermark", most, below=False)


def punsafe(most: float = 0.1) -> Step:
    """Keep images whose probability of being unsafe is at most this; 0.1 is Stable Diffusion 2's.

    A row without a score goes too: nobody has looked at it.
    """
    return _threshold("punsafe", most, below=False)


def _threshold(column: str, limit: float, below: bool) -> Step:
    def why(value: float | None) -> str | None:
        if value is None or value != value:
            return "no score"
        if below and value < limit:
            return f"below {limit:g}"
        return f"above {limit:g}" if not below and value > limit else None

    return _per_row(column, column, why)


def _per_row(name: str, column: str, why: Callable[[Any], str | None]) -> Step:
    return Step(name, (column,), lambda: lambda batch: [why(v) for v in batch[column]])


# ---- the steps that read captions ----------------------------------------------------------------


def caption_words(least: int = 1, most: int = 77) -> Step:
    """Keep captions of so many words (split at spaces)."""

    def why(text: str | None) -> str | None:
        count = len((text or "").split())
        if count == 0:
            return "no caption"
        return "too short" if count < least else "too long" if count > most else None

    return _per_row("caption_words", "TEXT", why)


def caption_repeats(most: int) -> Step:
    """Drop every row whose caption stands at more than ``most`` rows: it describes none of them.

    Captions are compared without case and surrounding space.  Needs the whole table.
    """

    class Count:
        def __init__(self):
            self.seen = Counter()

        def look(self, batch: Batch) -> None:
            self.seen.update(map(_folded, batch["TEXT"]))

        def __call__(self, batch: Batch) -> list[str | None]:
            return [f"its caption stands at more than {most} rows"
                    if self.seen[_folded(t)] > most else None for t in batch["TEXT"]]

    return Step("caption_repeats", ("TEXT",), Count, survey=Count.look)


def _folded(text: str | None) -> str:
    return " ".join((text or "").casefold().split())


# ---- the steps that read images ------------------------------------------------------------------


def readable(contrast: float = 2.0) -> Step:
    """Drop images that cannot be decoded, and blank ones.

    Args:
        contrast: least standard deviation of the pixels, of 255.
    """

    def why(value: Any) -> str | None:
        image = open_image(value)
        if image is None:
            return "not a readable image"
        spread = np.asarray(fit_square(image, 32), dtype=np.float32).std((0, 1)).max()
        return "blank" if spread < contrast else None

    return _per_row("readable", "image", why)


def exact_duplicates() -> Step:
    """Keep the first of images that are the same file, byte for byte."""

    def start() -> Decide:
        seen: set[bytes] = set()

        def why(value: Any) -> str | None:
            data = _bytes_of(value)
            if data is None:  # no file is no other row's file
                return None
            digest = hashlib.sha256(data).digest()
            if digest in seen:
                return "the same file as an earlier row"
            seen.add(digest)
            return None

        return lambda batch: [why(v) for v in batch["image"]]

    return Step("exact_duplicates", ("image",), start)


def near_duplicates(bits: int = 3, difference: float = 12.0) -> Step:
    """Keep the first of images that look the same: resized, recompressed or barely retouched.

    Candidates are those whose :func:`perceptual_hash` differs in at most ``bits``, found through
    ``bits + 1`` pieces of it of which one must be equal; a candidate is a duplicate when its
    16 x 16 thumbnail is within ``difference`` (root mean square, of 255), colour included.
    """

    def start() -> Decide:
        near = Lookalikes(bits, difference)
        return lambda batch: [None if near.find(open_image(v)) is None else
                              "looks like an earlier row" for v in batch["image"]]

    return Step("near_duplicates", ("image",), start)


class Lookalikes:
    """Images seen so far, found again by pieces of their hash (the pigeonhole principle).

    Args: as of :func:`near_duplicates`.
    """

    def __init__(self, bits: int, difference: float):
        self.bits, self.difference = bits, difference
        self.pieces = np.array_split(np.arange(64), bits + 1)
        self.buckets: dict[tuple[int, bytes], list[int]] = {}
        self.hashes: list[np.ndarray] = []
        self.thumbs: list[np.ndarray] = []

    def find(self, image: Image.Image | None) -> int | None:
        """Which image, counted in the order they were new, this one looks like; None if it is new.

        A new one is remembered; None for an image (an unreadable one) is never like another.
        """
        if image is None:
            return None
        code, thumb = perceptual_hash(image), np.asarray(fit_square(image, 16), dtype=np.float32)
        keys = [(i, code[piece].tobytes()) for i, piece in enumerate(self.pieces)]
        for other in sorted({n for key in keys for n in self.buckets.get(key, ())}):
            close = np.count_nonzero(code != self.hashes[other]) <= self.bits
            if close and np.sqrt(((thumb - self.thumbs[other]) ** 2).mean()) <= self.difference:
                return other
        for key in keys:
            self.buckets.setdefault(key, []).append(len(self.hashes))
        self.hashes.append(code)
        self.thumbs.append(thumb.astype(np.uint8))
        return None


def perceptual_hash(image: Image.Image) -> np.ndarray:
    """(64,) bool: which of an image's lowest 8 x 8 frequencies are above their median.

    The cosine transform of the 32 x 32 grey image (Zauner, 2010, sec. 3.2.1, known as pHash); it
    hardly changes when an image is scaled or compressed.
    """
    grey = np.asarray(fit_square(image, 32).convert("L"), dtype=np.float32)
    low = _COSINES @ grey @ _COSINES.T                                            # (8, 8)
    return (low > np.median(low)).ravel()


_COSINES = np.cos(np.pi / 32 * np.arange(8)[:, None] * (np.arange(32)[None] + 0.5))


def open_image(value: Any) -> Image.Image | None:
    """A table's image cell (PIL image, bytes, or bytes in a struct) as RGB; None if unreadable."""
    data = value if isinstance(value, Image.Image) else _bytes_of(value)
    if data is None:
        return None
    try:
        return load_image(data if isinstance(data, Image.Image) else Image.open(io.BytesIO(data)))
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        return None


def _bytes_of(value: Any) -> bytes | None:
    if isinstance(value, Image.Image):
        return value.mode.encode() + repr(value.size).encode() + value.tobytes()
    return value.get("bytes") if isinstance(value, dict) else value


# ---- applying them -------------------------------------------------------------------------------


@dataclass
class StepReport:
    """What one step did: rows it saw, rows it kept, and how many went for which reason."""

    name: str
    seen: int = 0
    dropped: Counter = field(default_factory=Counter)

    @property
    def kept(self) -> int:
        return self.seen - self.dropped.total()


@dataclass
class Report:
    """What became of a table, step by step; for a stream it fills as the stream is read."""

    steps: list[StepReport]

    @property
    def seen(self) -> int:
        return self.steps[0].seen if self.steps else 0

    @property
    def kept(self) -> int:
        return self.steps[-1].kept if self.steps else 0

    def to_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "kept": self.kept,
                "steps": [{"name": s.name, "seen": s.seen, "kept": s.kept,
                           "dropped": dict(s.dropped.most_common())} for s in self.steps]}

    def __str__(self) -> str:
        lines = [f"{'step':18s} {'rows kept':>10s}  why the others went",
                 f"{'':18s} {self.seen:10,d}"]
        for s in self.steps:
            why = [f"{n:,} {reason}" for reason, n in s.dropped.most_common(4)]
            rest = s.dropped.total() - sum(n for _, n in s.dropped.most_common(4))
            why += [f"{rest:,} for other reasons"] if rest else []
            lines.append(f"{s.name:18s} {s.kept:10,d}  {'; '.join(why)}".rstrip())
        return "\n".join(lines)


def apply(
    table: "datasets.Dataset | datasets.IterableDataset", steps: Sequence[Step]
) -> tuple["datasets.Dataset | datasets.IterableDataset", Report]:
    """Run the steps one after another.

    Args:
        table: in memory or on disk (``Dataset``), or a stream (``IterableDataset``).

    Returns:
        The rows that all steps keep, in order, and the report.

    Raises:
        ValueError: a column that a step reads is missing (before anything is read), or a step that
            needs the whole table is given a stream.
    """
    import datasets

    names = check_columns(table, steps)
    stream = isinstance(table, datasets.IterableDataset)
    report = Report([StepReport(step.name) for step in steps])
    for step, entry in zip(steps, report.steps, strict=True):
        if stream and step.survey:
            raise ValueError(f"the filter {step.name!r} counts over the whole table first and "
                             "cannot run on a stream: take a part of it with --limit")
        decide = step.start()
        own = [names[c] for c in step.columns]
        if stream:
            # A stream hands over whole rows; a table is read only where a step looks.
            look = partial(_keep, decide, step.columns, own, entry)
            table = raw_images(table, names).filter(look, batched=True)
            continue
        part = raw_images(table.select_columns(own), names)
        batches = [part[i : i + 256] for i in range(0, len(part), 256)]
        if step.survey:
            for batch in batches:
                step.survey(decide, dict(zip(step.columns, map(batch.get, own), strict=True)))
        keep = [k for batch in batches for k in _keep(decide, step.columns, own, entry, batch)]
        table = table.select(np.flatnonzero(keep))
    return table, report


def check_columns(table: Any, steps: Sequence[Step]) -> dict[str, str]:
    """Canonical name -> the table's own; ValueError naming the first column that is missing."""
    names = columns_of(table)
    for step in steps:
        for column in step.columns:
            if column not in names:
                there = ", ".join(table.column_names or ())
                raise ValueError(
                    f"the filter {step.name!r} reads the column {column!r} (also "
                    f"{', '.join(ALIASES[column])}), which this table lacks; it has: {there}. "
                    f"Score the table first, or leave the filter out with --without {step.name}")
    return names


def _keep(decide, columns, own, entry: StepReport, batch: Batch) -> list[bool]:
    reasons = decide({c: batch[name] for c, name in zip(columns, own, strict=True)})
    entry.seen += len(reasons)
    entry.dropped.update(r for r in reasons if r)
    return [r is None for r in reasons]


def raw_images(table: Any, names: dict[str, str]) -> Any:
    """The table with images as the bytes they are: one that is damaged must not stop the reader."""
    import datasets

    name = names.get("image")
    if name in (table.column_names or ()) and table.features and isinstance(
            table.features[name], datasets.Image):
        return table.cast_column(name, datasets.Image(decode=False))
    return table


STEPS: dict[str, Callable[..., Step]] = {
    f.__name__: f for f in (
        language, other_language, min_size, aesthetic, similarity, watermark, punsafe,
        caption_words, caption_repeats, readable, exact_duplicates, near_duplicates)}


# ---- steps by name -------------------------------------------------------------------------------

# Sizes and scores are those their publishers state: LAION's pages of the subsets, and Stable
# Diffusion's model cards (v1: improved-aesthetics; v2: punsafe 0.1).
SUBSETS: dict[str, tuple[Step, ...]] = {
    "all": (),
    "laion2B-en": (language("en"),),
    "laion2B-multi": (other_language("en", "nolang"),),
    "laion1B-nolang": (language("nolang"),),
    "laion-high-resolution": (min_size(1024),),
    "laion-improved-aesthetics": (language("en"), min_size(512), aesthetic(5.0), watermark(0.5)),
    "laion-aesthetics-v2-5+": (language("en"), aesthetic(5.0)),
}


def subset_steps(name: str = "all", without: Sequence[str] = ()) -> list[Step]:
    """The steps of a subset, and ``punsafe`` with every one of them unless switched off by name.

    Args:
        name: one of ``SUBSETS``. without: names of steps to leave out.

    Raises:
        ValueError: an unknown subset, or a step in ``without`` that the subset does not have.
    """
    steps = [*choose("subset", name, SUBSETS), punsafe()]
    known = {step.name: step for step in steps}
    for left_out in without:
        choose(f"filter of {name}", left_out, known)
    return [step for step in steps if step.name not in without]


def parse(text: str) -> Step:
    """A step from the command line: ``name`` or ``name=value``, values divided by commas.

    Raises:
        ValueError: an unknown step, or values that it does not take.
    """
    name, _, given = text.partition("=")
    make = choose("filter", name.strip(), STEPS)
    words = [v.strip() for v in given.split(",") if v.strip()]
    takes = inspect.signature(make)
    try:
        if "codes" in takes.parameters:  # any number of them, but at least one
            return make(words[0], *words[1:])
        bound = takes.bind(*words).arguments
        return make(**{key: takes.parameters[key].annotation(v) for key, v in bound.items()})
    except (IndexError, TypeError, ValueError):
        needs = str(takes).split(" ->")[0]
        raise ValueError(f"the filter {text!r} does not fit {name}{needs}") from None


def parse_all(text: str) -> list[Step]:
    """Steps divided by spaces, in order, after ``punsafe``, which ``-punsafe`` switches off.

    ``""`` is no step at all: a table is taken as it is.

    Raises:
        ValueError: as of :func:`parse`, or another step with a minus.
    """
    words = text.split()
    off = [w for w in words if w.startswith("-")]
    if set(off) - {"-punsafe"}:
        raise ValueError(f"only punsafe is on by itself and can be switched off, not {off}")
    steps = [parse(w) for w in words if w not in off]
    return steps if off or not words else [punsafe(), *steps]
