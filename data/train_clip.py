"""Train the tiny CLIP on the shipped tables, measure it, and fill clipart's column similarity.

    python data/train_clip.py             # about 25 minutes on two CPU cores

Two stages, which can be run one by one with --stage:

retrieval    writes data/checkpoints/clip and benchmarks/clip.json: recall on held-out pairs of the
             same network untrained; trained on emoji and the titles of clipart as it is; on those
             that are left after cleaning; and on these with the uploaders' keywords too, for as
             many steps.  The last is the one that is shipped.
similarity   scores each row of clipart by a model that has not seen its picture (four models, each
             trained without a quarter of the pictures): a model's own training pairs all look
             alike to it, good or bad.  The held-out split is scored by the shipped model.
"""

import argparse
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from minidiffuser.clip import (
    ClipConfig,
    TinyCLIP,
    add_similarity,
    fit_tokenizer,
    load_scorer,
    retrieval,
    train_clip,
)
from minidiffuser.data import filters, load_table, save_table
from minidiffuser.images import to_uint8

ROOT = Path(__file__).resolve().parents[1]
CLEAN = (filters.readable(), filters.min_size(32), filters.language("en", "nolang"),
         filters.caption_repeats(4), filters.exact_duplicates(), filters.near_duplicates())
FOLDS = 4
Examples = tuple[np.ndarray, list[list[str]]]  # images (N, 64, 64, 3), and the texts of each


def examples(table: datasets.Dataset, titles_only: bool) -> Examples:
    """Images, and for each the texts that training draws from."""
    images, texts = [], []
    for row in table:
        words = [row["TEXT"]]
        if not titles_only and row.get("keywords"):
            words += [f"{row['TEXT']}, {', '.join(row['keywords'])}", ", ".join(row["keywords"])]
        words = [w for w in words if w]
        if row["image"] is not None and words:
            images.append(row["image"])
            texts.append(words)
    return to_uint8(images, 64), texts


def together(*parts: Examples) -> Examples:
    return np.concatenate([p[0] for p in parts]), [t for p in parts for t in p[1]]


def trained(tokenizer: Tokenizer, data: Examples | None, steps: int, label: str) -> TinyCLIP:
    """A model after so many steps on the data; as it begins where there is none."""
    torch.manual_seed(0)
    model = TinyCLIP(ClipConfig(), tokenizer).eval()
    if data:
        per_epoch = len(data[0]) // 256
        epochs = max(1, steps // per_epoch)
        bar = tqdm(train_clip(model, *data, epochs=epochs), total=epochs * per_epoch, desc=label,
                   mininterval=10)
        for _, loss in bar:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return model


def measure_retrieval(tables: dict, steps: int, out: Path, report: Path) -> None:
    """Train the three models, write recall on held-out pairs, and keep the last model."""
    emoji = examples(load_table("emoji"), titles_only=True)
    raw = examples(tables["train"], titles_only=True)
    kept, _ = filters.apply(tables["train"], CLEAN)
    clean, described = (examples(kept, titles_only=t) for t in (True, False))
    # One tokenizer for all, so that only the training differs.
    tokenizer = fit_tokenizer([t for x in (emoji, described, raw) for row in x[1] for t in row],
                              ClipConfig().vocabulary)
    tests = {"clipart": tables["test"], "emoji": load_table("emoji", "test")}
    found = {"steps": steps, "retrieval": {}}
    for label, own in (("untrained", None), ("raw", raw), ("clean", clean),
                       ("keywords", described)):
        model = trained(tokenizer, own and together(emoji, own), steps, label)
        found["retrieval"][label] = {name: retrieval(model, t["image"][:], t["TEXT"][:])
                                     for name, t in tests.items()}
        print(label, json.dumps(found["retrieval"][label]), flush=True)
    model.save(out)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    found["bytes"] = sum(f.stat().st_size for f in out.iterdir() if f.suffix != ".md")
    report.write_text(json.dumps(found, indent=1) + "\n")


def picture_numbers(table: datasets.Dataset) -> list[int]:
    """The same number for rows whose pictures look alike."""
    near, numbers = filters.Lookalikes(3, 12.0), []
    for value in filters.raw_images(table, {"image": "image"})["image"]:
        found = near.find(filters.open_image(value))
        numbers.append(len(near.hashes) - 1 if found is None else found)
    return numbers


def fill_similarity(tables: dict, steps: int, out: Path) -> None:
    """Score train by models that have not seen the row's picture, and test by the shipped one."""
    shipped = load_scorer(out)
    table = tables["train"].add_column("picture", picture_numbers(tables["train"]))
    clean, _ = filters.apply(table, CLEAN)
    emoji = examples(load_table("emoji"), titles_only=True)
    values: dict[str, float | None] = {}
    for fold in range(FOLDS):
        seen = clean.filter(lambda p, fold=fold: p % FOLDS != fold, input_columns="picture")
        model = trained(shipped.tokenizer, together(emoji, examples(seen, titles_only=False)),
                        steps, f"without part {fold + 1} of {FOLDS}")
        unseen = table.filter(lambda p, fold=fold: p % FOLDS == fold, input_columns="picture")
        scored = add_similarity(unseen, model)
        values |= dict(zip(scored["URL"], scored["similarity"], strict=True))
    column = [values[url] for url in tables["train"]["URL"]]
    whole = tables["train"].remove_columns("similarity").add_column(
        "similarity", column, feature=datasets.Value("float64"))
    save_table(whole.select_columns(tables["train"].column_names), ROOT / "data/clipart", "train")
    save_table(add_similarity(tables["test"], shipped), ROOT / "data/clipart", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=("both", "retrieval", "similarity"), default="both")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=ROOT / "data/checkpoints/clip")
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks/clip.json")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    tables = {split: load_table("clipart", split) for split in ("train", "test")}
    if args.stage != "similarity":
        measure_retrieval(tables, args.steps, args.out, args.report)
    if args.stage != "retrieval":
        fill_similarity(tables, args.steps, args.out)


if __name__ == "__main__":
    main()
