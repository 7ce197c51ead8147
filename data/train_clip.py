"""Train the tiny CLIP on the shipped tables, and measure its retrieval on held-out pairs.

    python data/train_clip.py

About 20 minutes on two CPU cores.  Writes data/checkpoints/clip and benchmarks/clip.json, which has
the retrieval of the same network untrained, trained on clipart as it is, and trained on clipart
after cleaning, all for as many steps; the last is the one that is shipped.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minidiffuser.clip import ClipConfig, TinyCLIP, fit_tokenizer, retrieval, train_clip
from minidiffuser.data import filters, load_table
from minidiffuser.images import to_uint8

ROOT = Path(__file__).resolve().parents[1]
CLEAN = (filters.readable(), filters.min_size(32), filters.language("en", "nolang"),
         filters.caption_repeats(4), filters.exact_duplicates(), filters.near_duplicates())


def examples(table, titles_only: bool) -> tuple[np.ndarray, list[list[str]]]:
    """Images (N, 64, 64, 3), and for each the texts that training draws from."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=ROOT / "data/checkpoints/clip")
    parser.add_argument("--report", type=Path, default=ROOT / "benchmarks/clip.json")
    args = parser.parse_args()
    emoji = examples(load_table("emoji"), titles_only=True)
    clipart = load_table("clipart")
    raw = examples(clipart, titles_only=True)
    clean = examples(filters.apply(clipart, CLEAN)[0], titles_only=False)
    # One tokenizer for all, so that only the training differs.
    tokenizer = fit_tokenizer([t for x in (emoji, clean, raw) for row in x[1] for t in row],
                              ClipConfig().vocabulary)
    tests = {name: load_table(name, "test") for name in ("clipart", "emoji")}
    report = {"steps": args.steps, "retrieval": {}}
    for label, own in (("untrained", None), ("raw", raw), ("clean", clean)):
        torch.manual_seed(0)
        model = TinyCLIP(ClipConfig(), tokenizer)
        if own:
            pixels = np.concatenate([emoji[0], own[0]])
            texts = emoji[1] + own[1]
            epochs = args.steps // (len(pixels) // 256)
            bar = tqdm(train_clip(model, pixels, texts, epochs=epochs), mininterval=10,
                       total=epochs * (len(pixels) // 256), desc=label)
            for _, loss in bar:
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        model.eval()
        report["retrieval"][label] = {
            name: retrieval(model, table["image"][:], table["TEXT"][:])
            for name, table in tests.items()}
        print(label, json.dumps(report["retrieval"][label]), flush=True)
    model.save(args.out)
    report["parameters"] = sum(p.numel() for p in model.parameters())
    report["bytes"] = sum(f.stat().st_size for f in args.out.iterdir())
    args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
