"""The shipped clipart table: LAION's columns, honest noise, a clean held-out split, and credits."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minidiffuser.data import EXTRA_COLUMNS, LAION_COLUMNS, filters, load_table
from minidiffuser.data.filters import Lookalikes, open_image, raw_images

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tables():
    return {split: load_table("clipart", split) for split in ("train", "test")}


@pytest.fixture(scope="module")
def counts():
    return json.loads((ROOT / "data/clipart/counts.json").read_text())


def words(caption):
    return set(re.findall(r"\w+", caption.casefold()))


def test_columns_are_laions_and_documented(tables):
    extra = {"image", "description", "keywords", "author"}
    for table in tables.values():
        assert set(table.column_names) == {*LAION_COLUMNS, *extra}
        assert set(table["punsafe"]) == set(table["pwatermark"]) == {None}  # nobody scored them
    assert extra <= set(EXTRA_COLUMNS)


def test_counts_are_those_of_the_tables(tables, counts):
    assert counts["rows"] == {split: len(t) for split, t in tables.items()}
    both = [t for table in tables.values() for t in table["TEXT"]]
    repeated = {c: n for c, n in Counter(both).items() if n > 20}
    assert counts["captions that stand at more than 20 rows"] == repeated
    languages = Counter(c for table in tables.values() for c in table["LANGUAGE"])
    assert counts["languages"] == languages
    assert counts["image is null: a decompression bomb"] == 3 == sum(
        image is None for image in tables["train"]["image"])


def test_every_row_has_an_author_to_credit(tables, counts):
    authors = {a for table in tables.values() for a in table["author"]}
    assert counts["authors"] == len(authors) > 500
    unknown = sum(not a for table in tables.values() for a in table["author"])
    assert unknown < 0.05 * sum(map(len, tables.values()))


def test_the_noise_is_there(tables):
    train = tables["train"]
    _, report = filters.apply(train, [filters.readable(), filters.exact_duplicates()])
    assert report.steps[0].dropped["blank"] > 100
    assert report.steps[0].dropped["not a readable image"] == 3
    assert report.steps[1].dropped.total() > 1000
    assert min(min(w, h) for w, h in zip(train["WIDTH"], train["HEIGHT"], strict=True)) < 5
    assert {"fr", "it", "es", "de", "nolang"} <= set(train["LANGUAGE"])
    assert "" in train["TEXT"]


def test_the_held_out_split_is_clean_and_has_no_twin_in_train(tables):
    test = tables["test"]
    kept, report = filters.apply(test, [
        filters.readable(), filters.min_size(32), filters.language("en", "nolang"),
        filters.caption_words(1, 12)])
    assert len(kept) == len(test) == 177, report
    assert not set(test["TEXT"]) & set(tables["train"]["TEXT"])
    near = Lookalikes(3, 12.0)
    for value in raw_images(tables["train"], {"image": "image"})["image"]:
        near.find(open_image(value))
    assert all(near.find(image) is None for image in test["image"])


def test_every_word_of_a_held_out_caption_occurs_in_train(tables):
    known = set.union(*map(words, tables["train"]["TEXT"]))
    assert all(words(t) <= known for t in tables["test"]["TEXT"])


def test_pictures_are_thumbnails_and_scores_are_cosines(tables):
    for table in tables.values():
        assert {image.size for image in table["image"] if image} == {(64, 64)}
        scores = np.array([s for s in table["similarity"] if s is not None])
        assert len(scores) > 0.99 * len(table) and (np.abs(scores) <= 1).all()
