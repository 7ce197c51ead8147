"""Build data/clipart from two Debian packages: 8,000 public-domain drawings with uploaders' titles.

    apt-get download openclipart-png openclipart-svg
    for f in openclipart-*.deb; do dpkg -x $f clipart-source; done
    pip install -e '.[build-data]'
    python data/build_clipart.py --source clipart-source
    python -m minidiffuser data score clipart          # fills the column similarity

Writes train.parquet and test.parquet in LAION's schema, and counts.json.  Nothing is cleaned but
what may not be shipped: titles stand as uploaded, and images that cannot be opened are null.
"""

import argparse
import hashlib
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import datasets
from PIL import Image
from tqdm import tqdm

from minidiffuser.data import filters
from minidiffuser.images import fit_square

SIDE = 64          # pixels of the thumbnails
QUALITY = 75       # of their WebP
CERTAIN = 0.5      # below this probability a caption's language is "nolang", as in LAION-5B
HELD_OUT = 0.10    # share of the clean rows that go to test
SPOKEN = ("ENGLISH", "GERMAN", "FRENCH", "SPANISH", "ITALIAN", "PORTUGUESE", "DUTCH", "POLISH")

DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
LICENCE = "{http://web.resource.org/cc/}license"
PUBLIC_DOMAIN = ("http://web.resource.org/cc/PublicDomain",
                 "http://creativecommons.org/licenses/publicdomain/")


def read_metadata(path: Path) -> dict:
    """Title, description, keywords, author and licence that an SVG states about itself."""
    root = ElementTree.fromstring(path.read_bytes())

    def text_of(tag: str) -> str:
        found = next(root.iter(DC + tag), None)
        return " ".join("".join(found.itertext()).split()) if found is not None else ""

    licence = next(root.iter(LICENCE), None)
    keywords = [li.text.strip() for li in root.iter(RDF + "li") if li.text and li.text.strip()]
    return {
        "TEXT": text_of("title"),
        "description": text_of("description"),
        "keywords": sorted(set(keywords)),
        "author": text_of("creator"),
        "licence": licence.get(RDF + "resource") if licence is not None else "",
    }


def thumbnail(path: Path) -> tuple[tuple[int, int], bytes | None, str]:
    """Size of a PNG, its thumbnail as WebP, and why there is none."""
    try:
        with Image.open(path) as image:
            size = image.size
            picture = image.convert("RGBA")
    except Image.DecompressionBombError:
        width, height = (int.from_bytes(path.read_bytes()[i : i + 4], "big") for i in (16, 20))
        return (width, height), None, "a decompression bomb"
    except OSError as error:
        return (0, 0), None, type(error).__name__
    white = Image.new("RGBA", size, "white")
    white.alpha_composite(picture)
    file = io.BytesIO()
    fit_square(white.convert("RGB"), SIDE).save(file, "WEBP", quality=QUALITY, method=6)
    return size, file.getvalue(), ""


def build_rows(source: Path) -> tuple[list[dict], Counter]:
    """All rows that may be shipped, sorted by path, and what was left out or is null."""
    folder = source / "usr/share/openclipart"
    if not (folder / "png").is_dir() or not (folder / "svg").is_dir():
        raise SystemExit(f"{folder} has no folders png and svg: unpack openclipart-png and "
                         "openclipart-svg there (see the top of this file)")
    detect, rows, counts = language_detector(), [], Counter()
    for path in tqdm(sorted((folder / "png").rglob("*.png")), mininterval=10):
        name = path.relative_to(folder / "png").with_suffix("")
        about = read_metadata(folder / "svg" / f"{name}.svg")
        if about.pop("licence") not in PUBLIC_DOMAIN:
            counts["left out: its own metadata does not say public domain"] += 1
            continue
        size, data, why = thumbnail(path)
        if why:
            counts[f"image is null: {why}"] += 1
        image = {"bytes": data, "path": f"{name.name}.webp"} if data else None
        rows.append({"URL": f"openclipart:{name}", **about, "WIDTH": size[0], "HEIGHT": size[1],
                     "LANGUAGE": detect(about["TEXT"]), "similarity": None, "pwatermark": None,
                     "punsafe": None, "image": image})
    return rows, counts


def language_detector():
    """Caption -> ISO 639-1 code, or "nolang" where no language is likelier than not."""
    try:
        from lingua import Language, LanguageDetectorBuilder
    except ImportError:
        raise SystemExit("pip install 'minidiffuser[build-data]'") from None
    spoken = [getattr(Language, name) for name in SPOKEN]
    detector = LanguageDetectorBuilder.from_languages(*spoken).build()

    def detect(text: str) -> str:
        best = detector.compute_language_confidence_values(text)[0]
        certain = best.value >= CERTAIN
        return best.language.iso_code_639_1.name.lower() if certain else "nolang"

    return detect


def words(caption: str) -> set[str]:
    """A caption's words, without case and marks."""
    return set(re.findall(r"\w+", caption.casefold()))


def choose_test(table: datasets.Dataset) -> set[int]:
    """Numbers of the rows to hold out.

    They are clean ones (a readable image of 32 pixels or more, a caption of their own, not in
    another language than English), of which no other row has a lookalike, and whose words all occur
    in other clean rows too.
    """
    numbered = table.add_column("row", range(len(table)))
    clean, _ = filters.apply(numbered, [
        filters.readable(), filters.min_size(32), filters.language("en", "nolang"),
        filters.caption_words(1, 12), filters.caption_repeats(1)])
    near, first, alike = filters.Lookalikes(3, 12.0), [], Counter()
    for i, row in enumerate(table.cast_column("image", datasets.Image(decode=False))):
        image = filters.open_image(row["image"])
        found = near.find(image)
        if image is not None and found is None:
            first.append(i)
        alike[i if found is None else first[found]] += 1
    left = Counter(w for text in clean["TEXT"] for w in words(text))
    candidates = sorted(((hashlib.sha256(url.encode()).digest(), i, text) for url, i, text in
                         zip(clean["URL"], clean["row"], clean["TEXT"], strict=True)))
    test: set[int] = set()
    for _, i, text in candidates:
        if len(test) >= HELD_OUT * len(clean):
            break
        if alike[i] == 1 and all(left[w] > 1 for w in words(text)):
            test.add(i)
            left.subtract(words(text))
    return test


def schema() -> datasets.Features:
    """The columns and their types."""
    text, number = datasets.Value("string"), datasets.Value("float64")
    return datasets.Features({
        "URL": text, "TEXT": text,
        "WIDTH": datasets.Value("int64"), "HEIGHT": datasets.Value("int64"),
        "LANGUAGE": text, "similarity": number, "pwatermark": number, "punsafe": number,
        "image": datasets.Image(), "description": text, "keywords": datasets.List(text),
        "author": text,
    })


def main() -> None:
    """Build both splits."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="the packages, unpacked")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "clipart")
    args = parser.parse_args()
    rows, counts = build_rows(args.source)
    table = datasets.Dataset.from_list(rows, features=schema())
    test = choose_test(table)
    args.out.mkdir(parents=True, exist_ok=True)
    splits = {"train": [i for i in range(len(table)) if i not in test], "test": sorted(test)}
    for name, chosen in splits.items():
        table.select(chosen).to_parquet(args.out / f"{name}.parquet")
    captions = Counter(row["TEXT"] for row in rows)
    report = {
        "rows": {name: len(chosen) for name, chosen in splits.items()},
        **counts,
        "captions that stand at more than 20 rows": {
            c: n for c, n in captions.most_common() if n > 20},
        "languages": dict(Counter(row["LANGUAGE"] for row in rows).most_common()),
        "authors": len({row["author"] for row in rows}),
    }
    (args.out / "counts.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
