"""What filtering buys: the preset `clipart` trained on the table as it is and on the clean one.

    python benchmarks/filtering.py            # about 25 minutes on two CPU cores

The same network, steps, batch and seed; only the filters differ ("raw" drops what cannot be read at
all).  Scores are on the 177 held-out pairs, those captions left out that either model cannot read:

    similarity           cosine by the tiny CLIP (its own scale) of what was made and what was given
    collection_names     share of written captions that stand at more than 4 rows of the raw table
    token_f1             words that a written caption has in common with the picture's own

Runs go to --runs and continue where they stopped; the result to benchmarks/filtering.json, and some
drawings to filtering.png: those of the table, then those that the raw and the filtered model made
for their captions.  Which rows are shown as examples depends on their number alone.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import torch
from PIL import Image

from minidiffuser import UniDiffuser
from minidiffuser.clip import load_scorer
from minidiffuser.config import CLEAN_CLIPART, preset
from minidiffuser.data import load_table
from minidiffuser.metrics import mean, mean_similarity, proportion, token_f1
from minidiffuser.pipeline import training_arrays
from minidiffuser.plots import contact_sheet, to_png
from minidiffuser.train import Trainer

FILTERS = {"raw": "-punsafe readable caption_words=1,12", "filtered": CLEAN_CLIPART}
HOW = {"steps": 25, "guidance_scale": 1.0, "seed": 0}


def train(name: str, steps: int, runs: Path) -> tuple[UniDiffuser, int]:
    """The model of one table, and how many rows it saw."""
    cfg = preset("clipart").replace(filters=FILTERS[name], steps=steps)
    for _ in Trainer(cfg, runs / name, cpu=True, progress=True):
        pass
    return UniDiffuser.from_pretrained(runs / name), len(training_arrays(cfg)[1])


def score(
    pipe: UniDiffuser, images: list[Image.Image], captions: list[str], common: set
) -> tuple[dict, list[Image.Image]]:
    """Scores of both directions and of pairs from nothing; and the drawings for the captions."""
    scorer, n = load_scorer("tiny"), len(captions)
    made = pipe.sample(("image",), {"text": captions}, n, **HOW)["image"]
    written = pipe.sample(("text",), {"image": images}, n, **HOW)["text"]
    pairs = pipe.sample(("image", "text"), None, n, **HOW)
    split = pipe.codecs["text"].split
    scores = {
        "text_to_image": {"similarity": mean_similarity(scorer, made, captions)},
        "image_to_text": {
            "similarity": mean_similarity(scorer, images, written),
            "collection_names": proportion(sum(folded(w) in common for w in written), n),
            "token_f1": mean([token_f1(list(map(str.casefold, split(w))),
                                       list(map(str.casefold, split(c))))
                              for w, c in zip(written, captions, strict=True)]),
            "examples": list(zip(captions, written, strict=True))[::13],
        },
        "joint": {
            "similarity": mean_similarity(scorer, pairs["image"], pairs["text"]),
            "collection_names": proportion(sum(folded(t) in common for t in pairs["text"]), n),
        },
    }
    return scores, made


def folded(caption: str) -> str:
    return " ".join(caption.casefold().split())


def readable_by(pipe: UniDiffuser, caption: str) -> bool:
    return pipe.codecs["text"].refuses(caption) is None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=preset("clipart").steps)
    parser.add_argument("--runs", type=Path, default=Path("runs/filtering"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    models = {name: train(name, args.steps, args.runs) for name in FILTERS}
    count = Counter(folded(t) for t in load_table("clipart", columns=["TEXT"])["TEXT"])
    common = {text for text, n in count.items() if n > 4}
    rows = [row for row in load_table("clipart", "test")
            if all(readable_by(pipe, row["TEXT"]) for pipe, _ in models.values())]
    images, captions = [r["image"] for r in rows], [r["TEXT"] for r in rows]
    scorer, turned = load_scorer("tiny"), captions[1:] + captions[:1]
    result = {
        "steps": args.steps, "batch_size": preset("clipart").batch_size, **HOW,
        "reference": {"own captions": mean_similarity(scorer, images, captions),
                      "captions of another": mean_similarity(scorer, images, turned)},
    }
    shown = images[::10]
    for name, (pipe, seen) in models.items():
        torch.manual_seed(0)
        scores, made = score(pipe, images, captions, common)
        result[name] = {"filters": FILTERS[name], "rows": seen, **scores}
        shown += made[::10]
    sheet = contact_sheet(shown, columns=len(images[::10]))
    args.out.with_suffix(".png").write_bytes(to_png(sheet))
    args.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for path in (("text_to_image", "similarity"), ("image_to_text", "similarity"),
                 ("image_to_text", "collection_names"), ("image_to_text", "token_f1"),
                 ("joint", "similarity"), ("joint", "collection_names")):
        both = [result[name][path[0]][path[1]] for name in FILTERS]
        print(f"{' '.join(path):32s}", *(f"{b['value']:7.3f} [{b['interval'][0]:.3f}, "
                                         f"{b['interval'][1]:.3f}]" for b in both))


if __name__ == "__main__":
    main()
