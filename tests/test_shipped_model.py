"""The shipped model: small, whole, trained, and described by numbers that were measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minidiffuser import UniDiffuser
from minidiffuser.data import load_table
from minidiffuser.demo import run

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "data" / "checkpoints" / "emoji"
SCORES = json.loads((ROOT / "benchmarks" / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def pipe():
    return UniDiffuser.from_pretrained("emoji")


def test_it_fits():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 20_000_000
    names = {"model.safetensors", "codecs.safetensors", "config.json", "README.md"}
    assert {f.name for f in FOLDER.iterdir()} == names


def test_it_is_the_preset_of_its_name(pipe):
    from minidiffuser.checkpoints import FREE
    from minidiffuser.config import PRESETS

    # How long it was trained, and where in the square, is told by its card.
    own, preset = pipe.cfg.to_dict(), PRESETS["emoji"].to_dict()
    assert {k: v for k, v in own.items() if k not in FREE} == {
        k: v for k, v in preset.items() if k not in FREE}


def test_every_shipped_caption_round_trips(pipe):
    codec = pipe.codecs["text"]
    for split in ("train", "test"):
        captions = list(load_table("emoji", split, columns=["TEXT"])["TEXT"])
        assert codec.decode(codec.encode(captions)) == captions


def test_it_tells_a_right_caption_from_a_wrong_one(pipe):
    """Given a held-out image, one call at t = 900 predicts the words of its own caption."""
    import torch

    rows = load_table("emoji", "test").select(range(0, 188, 6))
    codec, image = pipe.codecs["text"], pipe.codecs["image"].encode(list(rows["image"]))
    ids = codec.encode_ids(list(rows["TEXT"]))
    n = len(ids)
    noise = torch.randn((n, *codec.shape), generator=torch.Generator().manual_seed(0))
    x = pipe.schedule.perturb(codec.encode(list(rows["TEXT"])), 900, noise)
    with torch.no_grad():
        t = {"image": torch.zeros(n), "text": torch.full((n,), 900.0)}
        right = pipe.net({"image": image, "text": x}, t)["text"]
        wrong = pipe.net({"image": image.roll(1, 0), "text": x}, t)["text"]

    def accuracy(out):
        nearest = torch.cdist(out.flatten(0, 1), codec.codes).argmin(1).view_as(ids)
        return float((nearest == ids)[ids > 0].float().mean())

    assert accuracy(right) > 0.5
    assert accuracy(right) > accuracy(wrong) + 0.2


@pytest.mark.parametrize("document", ["README.md", "data/checkpoints/emoji/README.md"])
def test_documents_quote_what_was_measured(document):
    text = (ROOT / document).read_text()
    for split in ("test", "train"):
        for name, score in SCORES[split].items():
            low, high = score["interval"]
            cell = f"{score['value']:.2f} [{low:.2f}, {high:.2f}]"
            assert cell in text, f"{document} does not give {split} {name} as {cell}"
    for name in ("joint_top1", "joint_similarity"):
        low, high = SCORES[name]["interval"]
        assert f"{SCORES[name]['value']:.2f} [{low:.2f}, {high:.2f}]" in text


def test_the_readme_quotes_the_speeds_measured():
    speed = json.loads((ROOT / "benchmarks" / "speed.json").read_text())
    text = (ROOT / "README.md").read_text()
    ratios = {name: f"{entry['ratio']:.2f}" for name, entry in speed.items()
              if isinstance(entry, dict)}
    assert len(ratios) == 4
    for name, ratio in ratios.items():
        assert f"| {name} |" in text and ratio in text.split(f"| {name} |")[1].split("\n")[0], name


def test_the_readme_quotes_what_filtering_bought():
    found = json.loads((ROOT / "benchmarks" / "filtering.json").read_text())
    text = (ROOT / "README.md").read_text().split("**What filtering buys**")[1]
    for model in ("raw", "filtered"):
        assert f"{found[model]['rows']:,}" in text
    rows = {"drawings to their captions": ("text_to_image", "similarity"),
            "captions to their drawings": ("image_to_text", "similarity"),
            "name a collection": ("image_to_text", "collection_names"),
            "own caption (F1)": ("image_to_text", "token_f1"),
            "generated pairs": ("joint", "similarity")}
    for row, (task, score) in rows.items():
        cells = []
        for model in ("raw", "filtered"):
            entry = found[model][task][score]
            low, high = entry["interval"]
            cells.append(f"{entry['value']:.2f} [{low:.2f}, {high:.2f}]")
        assert f"{row} | {cells[0]} | {cells[1]} |" in text
    for pairs in found["reference"].values():
        assert f"{pairs['value']:.2f}" in text


def test_the_readme_quotes_what_the_tiny_clip_retrieves():
    found = json.loads((ROOT / "benchmarks" / "clip.json").read_text())["retrieval"]
    text = (ROOT / "README.md").read_text()
    for table in ("emoji", "clipart"):
        before, after = (found[model][table]["image_to_text"]["recall@1"]
                         for model in ("untrained", "keywords"))
        n = found["keywords"][table]["n"]
        assert f"| {table}, {n} pairs | {before:.2f} | {after:.2f} |" in text
    card = (ROOT / "data" / "checkpoints" / "clip" / "README.md").read_text()
    for model in found.values():
        cells = [f"{model[table][way]['recall@1']:.2f}, {model[table][way]['recall@5']:.2f}"
                 for table in ("emoji", "clipart") for way in ("image_to_text", "text_to_image")]
        assert f"| {' | '.join(cells)} |" in card


def test_the_readmes_picture_is_what_the_demo_makes(tmp_path):
    """But for rounding, which differs between processors."""
    run("emoji", tmp_path / "demo.png", seed=0, echo=lambda text: None)
    shown, made = (np.asarray(Image.open(path).convert("RGB"), dtype=int)
                   for path in (ROOT / "docs/demo.png", tmp_path / "demo.png"))
    assert shown.shape == made.shape
    assert (np.abs(shown - made).max(2) > 30).mean() < 0.05
