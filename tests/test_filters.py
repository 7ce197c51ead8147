"""Filters: each step keeps what it says, tells why the rest went, and runs on streams too."""

import io
import itertools
import json

import datasets
import numpy as np
import pytest
from PIL import Image, ImageDraw

from minidiffuser.data import filters, load_table
from minidiffuser.data.filters import SUBSETS, apply, columns_of, subset_steps


def table_of(**columns):
    return datasets.Dataset.from_dict(columns)


def kept(steps, **columns):
    """Row numbers that the steps keep, and why the others went."""
    n = len(next(iter(columns.values())))
    steps = steps if isinstance(steps, list) else [steps]
    table, report = apply(table_of(row=list(range(n)), **columns), steps)
    return list(table["row"]), report


def encoded(image, kind="PNG", **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def drawing(seed, size=96):
    """A few coloured shapes on white."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = (rng.uniform(0, 0.7, 2) * size).tolist() + (rng.uniform(0.1, 0.5, 2) * size
                                                                 ).tolist()
        draw.ellipse((x, y, x + w, y + h), fill=tuple(rng.integers(0, 255, 3).tolist()))
    return image


# ---- column names -------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [
    ["URL", "TEXT", "WIDTH", "HEIGHT", "LANGUAGE", "similarity", "pwatermark", "punsafe",
     "AESTHETIC_SCORE"],
    ["url", "caption", "width", "height", "language", "similarity", "pwatermark", "punsafe",
     "aesthetic"],
    ["Url", "top_caption", "original_width", "original_height", "LANGUAGE", "similarity",
     "pwatermark", "punsafe", "aesthetic_score"],
])
def test_the_names_of_every_release_are_understood(names):
    table = table_of(hash=[1], **{name: [None] for name in names})
    canonical = ["URL", "TEXT", "WIDTH", "HEIGHT", "LANGUAGE", "similarity", "pwatermark",
                 "punsafe", "aesthetic"]
    assert columns_of(table) == dict(zip(canonical, names, strict=True))


def test_the_size_on_the_web_comes_before_that_of_the_resized_file():
    found = columns_of(table_of(width=[64], original_width=[900], height=[64],
                                original_height=[700]))
    assert found["WIDTH"] == "original_width" and found["HEIGHT"] == "original_height"


def test_a_missing_column_is_named_before_anything_is_read():
    table = table_of(TEXT=["a"], link=["b"])
    with pytest.raises(ValueError, match=r"'aesthetic' reads the column 'aesthetic'.*_score.*"
                                         r"it has: TEXT, link.*--without aesthetic"):
        apply(table, [filters.caption_words(), filters.aesthetic(5)])


# ---- the steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step, column, values, stay", [
    (filters.language("en", "nolang"), "LANGUAGE", ["en", "fr", None, "nolang"], [0, 3]),
    (filters.other_language("en"), "LANGUAGE", ["en", "fr", None, "zh"], [1, 3]),
    (filters.aesthetic(5.0), "AESTHETIC_SCORE", [4.99, 5.0, 6.5, None, float("nan")], [1, 2]),
    (filters.similarity(0.28), "similarity", [0.27, 0.28, 0.4, None], [1, 2]),
    (filters.watermark(0.5), "pwatermark", [0.0, 0.5, 0.51, None], [0, 1]),
    (filters.punsafe(0.1), "punsafe", [0.0, 0.1, 0.11, None, float("nan")], [0, 1]),
    (filters.caption_words(2, 3), "TEXT", ["one", "one two", "a b c", "a b c d", "", None], [1, 2]),
    (filters.caption_repeats(2), "TEXT", ["Icon", "dog", " icon", "cat", "ICON", "dog"], [1, 3, 5]),
])
def test_a_step_keeps_what_it_says(step, column, values, stay):
    rows, report = kept(step, **{column: values})
    assert rows == stay
    assert report.seen == len(values) and report.kept == len(stay)
    assert report.steps[0].dropped.total() == len(values) - len(stay)


def test_size_is_that_of_the_shorter_side():
    rows, report = kept(filters.min_size(512), WIDTH=[512, 511, 2000, None, 0],
                        HEIGHT=[512, 900, 500, 800, 800])
    assert rows == [0]
    assert report.steps[0].dropped == {"a side below 512 pixels": 2, "size unknown": 2}


def test_unreadable_and_blank_images_go():
    whole = encoded(drawing(0))
    images = [whole, whole[:300], b"<svg/>", None, encoded(Image.new("RGB", (40, 40), "white")),
              encoded(Image.new("RGBA", (40, 40), (0, 0, 0, 0))), encoded(drawing(1), "WEBP")]
    rows, report = kept(filters.readable(), image=images)
    assert rows == [0, 6]
    assert report.steps[0].dropped == {"not a readable image": 3, "blank": 2}


def test_blank_is_what_has_hardly_any_contrast():
    faint, clear = (Image.new("RGB", (32, 32), "white") for _ in range(2))
    ImageDraw.Draw(faint).rectangle((0, 0, 15, 31), fill=(254, 254, 252))  # deviation: 1.5 of 255
    ImageDraw.Draw(clear).rectangle((0, 0, 15, 31), fill=(255, 255, 245))  # 5
    assert kept(filters.readable(), image=[encoded(faint), encoded(clear)])[0] == [1]
    assert kept(filters.readable(contrast=1.0), image=[encoded(faint)])[0] == [0]


def test_only_the_first_of_identical_files_stays():
    a, b = encoded(drawing(0)), encoded(drawing(1))
    assert kept(filters.exact_duplicates(), image=[a, b, a, a, b])[0] == [0, 1]
    assert kept(filters.exact_duplicates(), image=[None, a, None, a])[0] == [0, 1, 2]


def test_a_scaled_or_recompressed_copy_is_a_near_duplicate():
    image = drawing(3)
    copies = [encoded(image), encoded(image.resize((60, 60), Image.Resampling.LANCZOS)),
              encoded(image, "JPEG", quality=60), encoded(image, "WEBP", quality=40)]
    others = [encoded(drawing(i)) for i in range(10, 30)]
    assert kept(filters.near_duplicates(), image=copies + others)[0] == [0, *range(4, 24)]


def test_the_same_shape_in_another_colour_is_not_a_duplicate():
    red, green = (Image.new("RGB", (64, 64), "white") for _ in range(2))
    ImageDraw.Draw(red).rectangle((16, 8, 48, 50), fill=(200, 40, 40))
    ImageDraw.Draw(green).rectangle((16, 8, 48, 50), fill=(10, 122, 40))
    a, b = filters.perceptual_hash(red), filters.perceptual_hash(green)
    assert np.count_nonzero(a != b) <= 3  # alike in grey
    assert kept(filters.near_duplicates(), image=[encoded(red), encoded(green)])[0] == [0, 1]


def test_pieces_of_the_hash_miss_no_pair_that_comparing_all_finds():
    rng = np.random.default_rng(0)
    near = filters.Lookalikes(bits=3, difference=255.0)
    codes = rng.random((40, 64)) < 0.5
    codes = np.concatenate([codes, codes])
    for i, flips in enumerate(rng.integers(0, 6, 40)):
        codes[40 + i, rng.choice(64, flips, replace=False)] ^= True
    thumb = Image.new("RGB", (16, 16))
    with pytest.MonkeyPatch.context() as patch:
        for i, code in enumerate(codes):
            patch.setattr(filters, "perceptual_hash", lambda _, code=code: code)
            distance = (codes[:i] != code).sum(1)
            assert (near.find(thumb) is not None) == bool((distance <= 3).any()), i


# ---- together -----------------------------------------------------------------------------------


def test_steps_follow_one_another_and_the_report_adds_up():
    rows, report = kept([filters.caption_words(), filters.language("en"), filters.min_size(10)],
                        TEXT=["a", "", "b", "c"], LANGUAGE=["en", "en", "fr", "en"],
                        WIDTH=[20, 20, 20, 5], HEIGHT=[20, 20, 20, 20])
    assert rows == [0]
    assert [(s.seen, s.kept) for s in report.steps] == [(4, 3), (3, 2), (2, 1)]
    text = str(report)
    assert "1 in 'fr'" in text and "1 a side below 10 pixels" in text
    assert json.loads(json.dumps(report.to_dict()))["kept"] == 1


def test_a_stream_gives_the_rows_and_the_report_of_a_table():
    table = load_table("clipart").select(range(3000, 3700))
    steps = [filters.readable(), filters.min_size(64), filters.language("en", "nolang"),
             filters.exact_duplicates(), filters.near_duplicates()]
    whole, report = apply(table, steps)
    stream, filling = apply(table.to_iterable_dataset(num_shards=3), steps)
    assert filling.seen == 0
    assert [row["URL"] for row in stream] == list(whole["URL"])
    assert filling.to_dict() == report.to_dict()


def test_a_step_that_counts_the_whole_table_refuses_a_stream():
    stream = table_of(TEXT=["a"]).to_iterable_dataset()
    with pytest.raises(ValueError, match="'caption_repeats' counts over the whole table"):
        apply(stream, [filters.caption_repeats(1)])


def test_images_are_not_decoded_where_no_step_looks_at_them():
    table = load_table("clipart").select(range(20))
    clean, _ = apply(table, [filters.min_size(1)])
    assert clean.features["image"].decode
    assert clean[0]["image"].size == (64, 64)


@pytest.mark.parametrize("name", SUBSETS)
def test_punsafe_is_on_with_every_subset_unless_switched_off_by_name(name):
    assert [s.name for s in subset_steps(name)][-1] == "punsafe"
    assert "punsafe" not in [s.name for s in subset_steps(name, without=["punsafe"])]


def test_a_misspelt_name_does_not_switch_a_filter_off():
    with pytest.raises(ValueError, match="unknown filter of all 'unsafe'.*'punsafe'"):
        subset_steps("all", without=["unsafe"])
    with pytest.raises(ValueError, match="unknown subset 'laion2b-en'.*'laion2B-en'"):
        subset_steps("laion2b-en")


def test_the_three_subsets_of_stable_diffusion():
    rows = {"LANGUAGE": ["en", "en", "de", "en"], "WIDTH": [1024, 600, 2000, 1100],
            "HEIGHT": [1100, 600, 2000, 1100], "aesthetic": [4.0, 6.0, 7.0, 6.5],
            "pwatermark": [0.9, 0.1, 0.0, 0.6], "punsafe": [0.0, 0.0, 0.0, 0.5]}
    expected = {"laion2B-en": [0, 1], "laion-high-resolution": [0, 2],
                "laion-improved-aesthetics": [1], "laion-aesthetics-v2-5+": [1]}
    for name, stay in expected.items():
        assert kept(subset_steps(name), **rows)[0] == stay, name
    assert kept(subset_steps("laion2B-en", ["punsafe"]), **rows)[0] == [0, 1, 3]


@pytest.mark.parametrize("text, name", [
    ("min_size=32", "min_size"), ("language=en, nolang", "language"), ("readable", "readable"),
    ("similarity=0.28", "similarity"), ("near_duplicates=2,8", "near_duplicates")])
def test_steps_can_be_written_as_text(text, name):
    assert filters.parse(text).name == name


@pytest.mark.parametrize("text, message", [
    ("min_sise=32", "unknown filter 'min_sise'.*'min_size'"),
    ("min_size", r"'min_size' does not fit min_size\(side"),
    ("readable=1,2,3", "does not fit readable"),
    ("min_size=big", "does not fit min_size"),
    ("language", "does not fit language"),
])
def test_a_step_that_cannot_be_read_is_explained(text, message):
    with pytest.raises(ValueError, match=message):
        filters.parse(text)


# ---- on the command line ------------------------------------------------------------------------

CLEAN = ["readable", "min_size=32", "language=en,nolang", "caption_words=1,12", "caption_repeats=4",
         "exact_duplicates", "near_duplicates"]


def options(steps):
    return list(itertools.chain(*(("--step", s) for s in steps)))


def test_the_command_cleans_a_table_and_writes_it(cli, tmp_path):
    ran = cli("data", "filter", "clipart", "--without", "punsafe", *options(CLEAN),
              "--out", tmp_path / "clean")
    assert ran.code == 0, ran.err
    assert "its caption stands at more than 4 rows" in ran.out
    written = load_table(tmp_path / "clean")
    assert f"{len(written):,} rows" in ran.out
    assert 1500 < len(written) < 3000 and written.features == load_table("clipart").features


def test_the_command_says_why_a_table_without_scores_is_emptied(cli):
    ran = cli("data", "filter", "clipart", "--json")
    report = json.loads(ran.out)
    assert report["kept"] == 0
    assert report["steps"][-1]["dropped"] == {"no score": report["seen"]}


def test_the_command_knows_columns(cli):
    ran = cli("data", "info", "clipart")
    assert "7,879 rows" in ran.out and "7,879 null" in ran.out
    assert cli("data", "filter", "nothing").err.startswith("error: there is no table 'nothing'")


# ---- steps as a configuration has them -----------------------------------------------------------


def test_a_configurations_steps_are_in_order_and_punsafe_is_on():
    assert [s.name for s in filters.parse_all("readable min_size=32")] == [
        "punsafe", "readable", "min_size"]
    assert [s.name for s in filters.parse_all("min_size=32 -punsafe readable")] == [
        "min_size", "readable"]
    assert [s.name for s in filters.parse_all("readable")] == ["punsafe", "readable"]
    assert filters.parse_all("") == filters.parse_all("-punsafe") == []


def test_nothing_else_is_on_by_itself():
    with pytest.raises(ValueError, match="only punsafe is on by itself.*-readable"):
        filters.parse_all("min_size=32 -readable")


@pytest.mark.parametrize("subset, least", [
    ("laion-high-resolution", {"size": 1024}),
    ("laion-improved-aesthetics", {"size": 512, "aesthetic": 5.0, "pwatermark": 0.5}),
    ("laion-aesthetics-v2-5+", {"aesthetic": 5.0}),
])
def test_limits_of_the_subsets_are_those_published(subset, least):
    """A row at the limits stays, and one just beyond any of them goes."""
    good = {"WIDTH": 2000, "HEIGHT": least.get("size", 10), "LANGUAGE": "en", "punsafe": 0.1,
            "aesthetic": 5.0, "pwatermark": 0.5}
    changes = [{}, {"punsafe": 0.101}]
    changes += [{"HEIGHT": least["size"] - 1}] if "size" in least else []
    changes += [{"aesthetic": 4.99}] if "aesthetic" in least else []
    changes += [{"pwatermark": 0.501}] if "pwatermark" in least else []
    rows = [good | change for change in changes]
    assert kept(subset_steps(subset), **{c: [row[c] for row in rows] for c in good})[0] == [0]
