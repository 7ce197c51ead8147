"""Build data/emoji from two Debian packages: Noto Color Emoji drawings, captioned by Unicode CLDR.

    apt-get install fonts-noto-color-emoji unicode-cldr-core
    python data/build_emoji.py

Writes train.parquet and test.parquet in LAION's schema, and counts.json with what was kept and why
the rest was not.  The same packages give the same rows on every run; data/README.md describes them.
"""

import argparse
import hashlib
import io
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

import datasets
from PIL import Image, ImageDraw, ImageFont, features

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
CLDR = Path("/usr/share/unicode/cldr/common")
LANGUAGES = ("en", "zh", "ar", "de", "es", "fr", "hi", "ja")

GLYPH_SIZE = 109           # the one size this bitmap font has
CANVAS = 136               # pixels: the glyphs' width at that size
SIDE = 64                  # pixels of the shipped images
HELD_OUT = 0.10            # share of the tone and gender variants that go to test
PER_GROUP = 5              # at most one in so many variants of the same thing is held out

VARIATION = "\ufe0f"       # asks for the coloured form of a character that also has a black one
TONES = ("light skin tone", "medium-light skin tone", "medium skin tone", "medium-dark skin tone",
         "dark skin tone")
GENDERS = ("man", "woman", "person", "men", "women", "people")


def read_captions(language: str) -> dict[str, str]:
    """Emoji -> its CLDR short name ("text to speech" name) in a language."""
    captions = {}
    for folder in ("annotations", "annotationsDerived"):
        for entry in ElementTree.parse(CLDR / folder / f"{language}.xml").iter("annotation"):
            # Arrows mean "as in the parent language": no name of its own.
            if entry.get("type") == "tts" and entry.text and "↑" not in entry.text:
                captions[entry.get("cp").replace(VARIATION, "")] = entry.text.strip()
    return captions


def draw(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The emoji on white, SIDE x SIDE, or None where the font has no single drawing of it."""
    for text in (emoji, emoji + VARIATION):
        _, top, _, bottom = font.getbbox(text)
        # A sequence the font cannot join comes out as several drawings side by side.
        if not 0.75 * CANVAS <= font.getlength(text) <= 1.05 * CANVAS:
            continue
        canvas = Image.new("RGB", (CANVAS, CANVAS), "white")
        place = (0, (CANVAS - (bottom - top)) // 2 - top)
        ImageDraw.Draw(canvas).text(place, text, font=font, embedded_color=True)
        if canvas.getextrema() != ((255, 255),) * 3:
            return canvas.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return None


def encode(image: Image.Image) -> bytes:
    """A picture as lossless WebP, a quarter smaller than PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def build_rows() -> tuple[list[dict], Counter]:
    """All rows in the order of their code points, and why others were left out."""
    font = ImageFont.truetype(str(FONT), GLYPH_SIZE, layout_engine=ImageFont.Layout.RAQM)
    names = {language: read_captions(language) for language in LANGUAGES}
    rows, dropped, seen = [], Counter(), set()
    for emoji, caption in sorted(names["en"].items()):
        image = draw(emoji, font)
        if image is None:
            dropped["the font has no single drawing of it"] += 1
            continue
        if caption in seen:
            dropped["another emoji has the same caption"] += 1
            continue
        seen.add(caption)
        points = "-".join(f"{ord(c):x}" for c in emoji)
        rows.append({
            "URL": f"emoji:{points}",
            "TEXT": caption,
            "WIDTH": SIDE,
            "HEIGHT": SIDE,
            "LANGUAGE": "en",
            "similarity": None,
            "pwatermark": 0.0,
            "punsafe": 0.0,
            "image": {"bytes": encode(image), "path": f"{points}.webp"},
            "captions": {language: names[language].get(emoji) for language in LANGUAGES},
        })
    return rows, dropped


# ---- the held-out split ------------------------------------------------------------------------


def base_of(caption: str) -> str:
    """What a variant is a variant of: "woman mechanic: dark skin tone" -> "woman mechanic"."""
    return caption.split(":")[0]


def is_variant(caption: str) -> bool:
    """Whether a caption names a skin tone of something, or someone's gender."""
    return (caption.endswith("skin tone") and ":" in caption) or caption.split()[0] in GENDERS


def words(caption: str) -> list[str]:
    """A caption's words, without the marks around them."""
    for mark in ",:()":
        caption = caption.replace(mark, " ")
    return caption.split()


def choose_test(rows: list[dict]) -> set[int]:
    """Numbers of the rows to hold out: combinations whose parts all stay in train."""
    pictures = Counter(row["image"]["bytes"] for row in rows)
    left = Counter(w for row in rows for w in words(row["TEXT"]))
    # Chinese has no spaces: its parts are characters.
    left_zh = Counter(c for row in rows for c in row["captions"]["zh"] or "")
    group_size = Counter(base_of(row["TEXT"]) for row in rows)
    variants = [i for i, row in enumerate(rows) if is_variant(row["TEXT"])]
    in_order = sorted(variants, key=lambda i: hashlib.sha256(rows[i]["URL"].encode()).digest())
    taken: dict[str, int] = defaultdict(int)
    test: set[int] = set()
    for i in in_order:
        row, base = rows[i], base_of(rows[i]["TEXT"])
        enough = all(left[w] > 3 for w in words(row["TEXT"])) and all(
            left_zh[c] > 3 for c in row["captions"]["zh"] or ""
        )
        share = (taken[base] + 1) * PER_GROUP <= group_size[base]
        if len(test) >= HELD_OUT * len(variants):
            break
        if pictures[row["image"]["bytes"]] == 1 and enough and share:
            test.add(i)
            taken[base] += 1
            left.subtract(words(row["TEXT"]))
            left_zh.subtract(row["captions"]["zh"] or "")
    return test


def schema() -> datasets.Features:
    """The columns and their types."""
    text, number = datasets.Value("string"), datasets.Value("float64")
    return datasets.Features({
        "URL": text, "TEXT": text,
        "WIDTH": datasets.Value("int64"), "HEIGHT": datasets.Value("int64"),
        "LANGUAGE": text, "similarity": number, "pwatermark": number, "punsafe": number,
        "image": datasets.Image(), "captions": dict.fromkeys(LANGUAGES, text),
    })


def check_sources() -> None:
    """Stop with the package to install where a source is missing."""
    needs = {FONT: "fonts-noto-color-emoji", CLDR: "unicode-cldr-core"}
    for path, package in needs.items():
        if not path.exists():
            raise SystemExit(f"{path} is missing: apt-get install {package}")
    if not features.check("raqm"):
        raise SystemExit("this Pillow lacks raqm, without which joined emoji fall apart: install "
                         "Pillow's own wheel, or libraqm0")


def sources() -> dict[str, str]:
    """SHA-256 of what the table is built from: another version gives other rows."""
    files = [FONT, *(CLDR / folder / "en.xml" for folder in ("annotations", "annotationsDerived"))]
    return {str(Path(*f.parts[-2:])): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    """Build both splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "emoji")
    out = parser.parse_args().out
    check_sources()
    rows, dropped = build_rows()
    test = choose_test(rows)
    splits = {"train": [row for i, row in enumerate(rows) if i not in test],
              "test": [rows[i] for i in sorted(test)]}
    out.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        datasets.Dataset.from_list(part, features=schema()).to_parquet(out / f"{name}.parquet")
    pictures = Counter(row["image"]["bytes"] for row in rows)
    counts = {
        "rows": {name: len(part) for name, part in splits.items()},
        "variants": sum(is_variant(row["TEXT"]) for row in rows),
        "rows that share their drawing with another": sum(n for n in pictures.values() if n > 1),
        "left out": dict(dropped),
        "captions": {x: sum(row["captions"][x] is not None for row in rows) for x in LANGUAGES},
        "sources": sources(),
    }
    (out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
