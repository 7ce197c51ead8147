"""The shipped emoji table: LAION's schema, honest splits, and a loader that says what is wrong."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minidiffuser.data import EXTRA_COLUMNS, LAION_COLUMNS, load_table, shipped_tables

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def tables():
    return {split: load_table("emoji", split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def pixels(tables):
    return {split: np.stack([np.asarray(image) for image in table["image"]])
            for split, table in tables.items()}


def words(caption):
    for mark in ",:()":
        caption = caption.replace(mark, " ")
    return caption.split()


def test_columns_are_documented_and_typed(tables):
    for table in tables.values():
        assert set(table.column_names) == {*LAION_COLUMNS, "image", "captions"}
        assert {"image", "captions"} <= set(EXTRA_COLUMNS)
        assert set(table["LANGUAGE"]) == {"en"} and set(table["similarity"]) == {None}
        assert set(table["WIDTH"]) == set(table["HEIGHT"]) == {64}
        assert len(set(table["URL"])) == len(table)
        assert all(row["en"] == text for row, text in
                   zip(table["captions"], table["TEXT"], strict=True))


def test_every_row_has_a_caption_in_english_and_chinese(tables):
    for table in tables.values():
        assert all(text.strip() for text in table["TEXT"])
        chinese = [row["zh"] for row in table["captions"]]
        assert all(any("\u4e00" <= c <= "\u9fff" for c in text) or text.isascii()
                   for text in chinese)


def test_images_are_drawings_of_the_stated_size(pixels):
    for images in pixels.values():
        assert images.shape[1:] == (64, 64, 3) and images.dtype == np.uint8
        assert (images.reshape(len(images), -1).std(1) > 5).all()  # none is blank


def test_a_tenth_of_the_variants_is_held_out(tables):
    counts = json.loads((DATA / "emoji" / "counts.json").read_text())
    assert counts["rows"] == {split: len(table) for split, table in tables.items()}
    assert len(tables["test"]) == pytest.approx(0.1 * counts["variants"], abs=1)


def test_every_part_of_a_held_out_caption_is_seen_in_training(tables):
    seen = Counter(w for text in tables["train"]["TEXT"] for w in words(text))
    seen_zh = Counter(c for row in tables["train"]["captions"] for c in row["zh"])
    for row in tables["test"]:
        assert min(seen[w] for w in words(row["TEXT"])) >= 2, row["TEXT"]
        assert min(seen_zh[c] for c in row["captions"]["zh"]) >= 2, row["captions"]["zh"]


def test_a_held_out_combination_has_its_relatives_in_training(tables):
    """Each is a variant (a tone or a gender) of something that training has in other variants."""
    bases = Counter(text.split(":")[0].replace("woman", "").replace("man", "").strip()
                    for text in tables["train"]["TEXT"])
    for text in tables["test"]["TEXT"]:
        base = text.split(":")[0].replace("woman", "").replace("man", "").strip()
        base = base.replace("person", "").strip()
        related = sum(n for b, n in bases.items() if b.replace("person", "").strip() == base)
        assert related >= 4, text


def test_no_caption_and_no_drawing_is_in_both_splits(tables, pixels):
    assert not set(tables["train"]["TEXT"]) & set(tables["test"]["TEXT"])
    train = {image.tobytes() for image in pixels["train"]}
    assert not any(image.tobytes() in train for image in pixels["test"])


def test_datasets_loads_the_folder_offline(monkeypatch, tmp_path):
    code = (f"import datasets; d = datasets.load_dataset('data/emoji', cache_dir=r'{tmp_path}');"
            "print({k: len(v) for k, v in d.items()}, d['test'][0]['image'].size)")
    done = subprocess.run([sys.executable, "-c", code], cwd=DATA.parent, text=True,
                          capture_output=True, env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)})
    assert "{'train': 3447, 'test': 188} (64, 64)" in done.stdout, done.stderr


def test_licences_are_beside_the_data():
    assert "OPEN FONT LICENSE" in (DATA / "emoji" / "LICENSE-drawings.txt").read_text()
    assert "UNICODE" in (DATA / "emoji" / "LICENSE-captions.txt").read_text()


# ---- the loader ----------------------------------------------------------------------------------


def test_a_table_is_found_by_name_or_folder():
    assert "emoji" in shipped_tables()
    by_name, by_folder = load_table("emoji", "test"), load_table(DATA / "emoji", "test")
    assert by_name["TEXT"] == by_folder["TEXT"]


def test_columns_can_be_chosen():
    assert load_table("emoji", "test", columns=["TEXT"]).column_names == ["TEXT"]


@pytest.mark.parametrize("arguments, message", [
    (("emojy",), "no table 'emojy'.*mean 'emoji'"),
    (("emoji", "trian"), "no split 'trian'.*mean 'train'"),
    (("emoji", "test", ["text"]), "no column 'text'"),
])
def test_what_is_not_there_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_table(*arguments)


def test_a_damaged_file_is_named(tmp_path):
    good = (DATA / "emoji" / "test.parquet").read_bytes()
    for damaged in (b"", b"no parquet", good[: len(good) // 2]):
        (tmp_path / "train.parquet").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train.parquet is not a readable parquet file"):
            load_table(tmp_path)


def test_a_plain_parquet_of_bytes_reads_as_images(tmp_path):
    """A table made by other tools, without Hugging Face's metadata."""
    row = pq.read_table(DATA / "emoji" / "test.parquet", columns=["TEXT", "image"]).slice(0, 1)
    pq.write_table(pa.table(row.columns, names=row.column_names), tmp_path / "train.parquet")
    assert load_table(tmp_path)[0]["image"].size == (64, 64)


@pytest.mark.slow
def test_the_build_script_gives_the_shipped_table(tables, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(DATA)
    build = pytest.importorskip("build_emoji")
    counts = json.loads((DATA / "emoji" / "counts.json").read_text())
    try:
        if build.sources() != counts["sources"]:
            pytest.skip("other versions of fonts-noto-color-emoji or unicode-cldr-core are here")
    except FileNotFoundError:
        pytest.skip("needs the Debian packages fonts-noto-color-emoji and unicode-cldr-core")
    done = subprocess.run([sys.executable, DATA / "build_emoji.py", "--out", tmp_path],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for split, table in tables.items():
        again = load_table(tmp_path, split)
        assert again["URL"] == table["URL"] and again["captions"] == table["captions"]
        assert all(np.array_equal(np.asarray(a), np.asarray(b))
                   for a, b in zip(again["image"], table["image"], strict=True))
