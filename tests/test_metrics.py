"""Scores: right on cases worked out by hand, high for the truth and low for what is wrong."""

import numpy as np
import pytest
import torch
from PIL import Image
from support import TOY

from minidiffuser import metrics
from minidiffuser.metrics import Gallery, evaluate, mean_interval, small, token_f1, wilson

# ---- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("successes, n, low, high", [
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
])
def test_wilson_against_published_values(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("successes, n", [(0, 1), (1, 1), (3, 7), (64, 128), (127, 128)])
def test_wilson_ends_are_where_the_score_test_turns(successes, n):
    low, high = wilson(successes, n)
    share = successes / n
    assert 0 <= low <= share <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(share - end) == pytest.approx(1.96 * (end * (1 - end) / n) ** 0.5)
    assert wilson(n - successes, n) == pytest.approx((1 - high, 1 - low))


def test_interval_of_a_mean():
    low, high = mean_interval([0.2, 0.4, 0.6, 0.8])  # mean 0.5, variance 1/15
    assert (low, high) == pytest.approx((0.5 - 1.96 / 60**0.5, 0.5 + 1.96 / 60**0.5))
    assert mean_interval([0, 1]) == (0.0, 1.0)  # clipped
    assert mean_interval([0.5, 0.5]) == (0.5, 0.5)


def test_intervals_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        mean_interval([1.0])


# ---- tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("generated, own, f1", [
    ("red apple", "red apple", 1.0),
    ("apple red", "red apple", 1.0),  # a bag has no order
    ("red apple", "green car", 0.0),
    ("red apple", "red car", 0.5),
    ("red red red", "red", 0.5),      # a token counts as often as it is shared
    ("red apple pie", "red", 0.5),
    ("", "red", 0.0), ("", "", 1.0),
])
def test_token_f1(generated, own, f1):
    assert token_f1(generated.split(), own.split()) == pytest.approx(f1)
    assert token_f1(own.split(), generated.split()) == pytest.approx(f1)


# ---- the gallery ---------------------------------------------------------------------------------


def plain(*greys, side=64):
    return np.stack([np.full((side, side, 3), g, np.uint8) for g in greys])


def test_scores_look_at_32_by_32_colours():
    x = plain(0, 255)
    x[0, :2, :2, 1] = (0, 100), (100, 200)
    points = small(x).view(2, 3, 32, 32)
    assert points[0, 1, 0, 0] == pytest.approx(100 / 255) and points[0].count_nonzero() == 1
    assert (points[1] == 1).all()
    assert np.allclose(small(plain(7, side=32)), 7 / 255)


def test_the_nearest_image_is_found_by_its_pixels():
    gallery = Gallery(plain(0, 100, 200), ["black", "grey", "white"])
    assert gallery.captions_of_nearest(plain(40, 60, 151, 255)) == [
        {"black"}, {"grey"}, {"white"}, {"white"}]


def test_nearest_is_by_squares():
    """Far off in a sixteenth of the image is further than a little off in all of it."""
    grey = plain(100)
    patch = grey.copy()
    patch[:, :16, :16] += 100
    gallery = Gallery(np.concatenate([patch, grey + 10]), ["patch", "all"])
    assert gallery.captions_of_nearest(grey) == [{"all"}]


def test_identical_drawings_answer_to_each_others_captions():
    gallery = Gallery(plain(0, 100, 100, 101), ["black", "grey", "gray", "almost"])
    assert gallery.captions_of_nearest(plain(90, 100, 255)) == [
        {"grey", "gray"}, {"grey", "gray"}, {"almost"}]


# ---- evaluate ------------------------------------------------------------------------------------


class Stub:
    """A pipeline that looks up the row ``shift`` places after the one it is asked for."""

    def __init__(self, tables, codecs, shift=0):
        self.cfg, self.codecs, self.asked = TOY, codecs, []
        self.pixels = np.concatenate([t[0] for t in tables.values()])
        self.captions = [c for t in tables.values() for c in t[1]]
        self.by_caption = {c: i for i, c in enumerate(self.captions)}
        self.by_pixels = {p.tobytes(): i for i, p in enumerate(self.pixels)}
        self.shift = shift

    def _row(self, i):
        return (i + self.shift) % len(self.captions)

    def sample(self, sampled, given, n, **how):
        self.asked.append((tuple(sampled), n, how))
        if set(sampled) == {"image", "text"}:
            rows = np.random.default_rng(how["seed"]).integers(0, len(self.captions), n)
            return {"image": [Image.fromarray(self.pixels[i]) for i in rows],
                    "text": [self.captions[self._row(i)] for i in rows]}
        if tuple(sampled) == ("image",):
            rows = [self._row(self.by_caption[c]) for c in given["text"]]
            return {"image": [Image.fromarray(self.pixels[i]) for i in rows]}
        rows = [self._row(self.by_pixels[np.asarray(i).tobytes()]) for i in given["image"]]
        return {"text": [self.captions[i] for i in rows]}


@pytest.fixture(scope="module")
def some(tables):
    """A part of the shipped table, small enough to search in no time."""
    every = {"train": 12, "test": 2}
    return {split: (images[::every[split]], captions[::every[split]])
            for split, (images, captions) in tables.items()}


@pytest.fixture(autouse=True)
def _read_once(some, monkeypatch):
    monkeypatch.setattr(metrics, "training_arrays", lambda cfg, split: some[split])


def proportions(result):
    return {**{(s, k): result[s][k] for s in ("train", "test") for k in ("t2i_top1", "i2t_exact")},
            "joint": result["joint_top1"]}


def all_scores(result):
    return [*proportions(result).values(),
            *(result[s]["i2t_token_f1"] for s in ("train", "test"))]


def test_the_truth_scores_1(some, codecs):
    result = evaluate(Stub(some, codecs), n=50)
    for entry in all_scores(result):
        assert entry["value"] == 1 and entry["n"] == 50
    for entry in proportions(result).values():
        assert entry["interval"] == pytest.approx((50 / (50 + 1.96**2), 1))


def test_another_rows_image_and_caption_score_0(some, codecs):
    result = evaluate(Stub(some, codecs, shift=len(some["train"][1]) // 2), n=50)
    assert {k: v["value"] for k, v in proportions(result).items()} == dict.fromkeys(
        proportions(result), 0)
    for split in ("train", "test"):
        entry = result[split]["i2t_token_f1"]
        low, high = entry["interval"]
        assert low <= entry["value"] <= high < 0.5  # not 0: neighbours share "flag", ":"


class Echo:
    """A CLIP that knows: an image's vector is that of the row it is of, and so is a caption's."""

    name = "echo"

    def __init__(self, stub):
        self.stub, self.axes = stub, torch.eye(len(stub.captions))

    def images(self, images):
        return self.axes[[self.stub.by_pixels[np.asarray(i).tobytes()] for i in images]]

    def texts(self, texts):
        return self.axes[[self.stub.by_caption[t] for t in texts]]


@pytest.mark.parametrize("shift, made", [(0, 1.0), (7, 0.0)])
def test_similarity_is_of_what_was_made_and_what_it_was_made_from(some, codecs, shift, made):
    few = {split: (np.unique(images, axis=0), captions[:len(np.unique(images, axis=0))])
           for split, (images, captions) in some.items()}  # every image another, to be known by
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "training_arrays", lambda cfg, split: few[split])
        stub = Stub(few, codecs, shift)
        result = evaluate(stub, n=20, clip=Echo(stub))
    for split in ("train", "test"):
        values = {k: v["value"] for k, v in result[split].items() if k.endswith("similarity")}
        assert values == {"t2i_similarity": made, "i2t_similarity": made, "own_similarity": 1.0,
                          "other_similarity": 0.0}
    assert result["joint_similarity"]["value"] == made
    assert result["settings"]["clip"] == "echo"


def test_without_a_clip_there_is_no_similarity(some, codecs):
    result = evaluate(Stub(some, codecs), n=5)
    assert "joint_similarity" not in result and "clip" not in result["settings"]
    assert not any("similarity" in name for name in result["test"])


def test_an_interval_of_cosines_reaches_below_0():
    low, high = mean_interval([-0.4, 0.1, -0.2, 0.3], least=-1.0)
    assert -1 < low < -0.05 < high
    assert mean_interval([-1.0, -0.9], least=-1.0)[0] == -1.0


def test_a_mean_similarity_below_0_has_its_interval_there(some, codecs):
    stub = Stub(some, codecs)

    class Contrary(Echo):
        def texts(self, texts):
            return -super().texts(texts) * torch.linspace(0.4, 0.6, len(texts))[:, None]

    found = metrics.mean_similarity(Contrary(stub), stub.pixels[:9], stub.captions[:9])
    low, high = found["interval"]
    assert found["value"] == pytest.approx(-0.5) and -0.6 < low < -0.5 < high < -0.4


def test_half_right_scores_half(some, codecs):
    class Half(Stub):
        def _row(self, i):
            return i if i % 2 else (i + 131) % len(self.captions)

    result = evaluate(Half(some, codecs), n=50)
    for entry in all_scores(result):
        low, high = entry["interval"]
        assert 0.25 < low < entry["value"] < high < 0.75 or 0.5 < entry["value"] < 0.9


def test_rows_are_spread_over_the_split_and_no_more_than_it_has(some, codecs, monkeypatch):
    few = {split: (images[:40], captions[:40]) for split, (images, captions) in some.items()}
    monkeypatch.setattr(metrics, "training_arrays", lambda cfg, split: few[split])
    stub = Stub(few, codecs)
    asked, sample = [], stub.sample

    def noted(sampled, given, n, **how):
        asked.extend(given.get("text", []))
        return sample(sampled, given, n, **how)

    stub.sample = noted
    result = evaluate(stub, n=50)
    assert result["test"]["t2i_top1"]["n"] == result["train"]["i2t_exact"]["n"] == 40
    assert asked == few["test"][1] + few["train"][1]
    asked.clear()
    evaluate(stub, n=3)
    assert asked == [few[s][1][i] for s in ("test", "train") for i in (0, 20, 39)]


def test_batches_are_asked_for_with_seeds_of_their_own(some, codecs):
    stub = Stub(some, codecs)
    result = evaluate(stub, n=90, seed=3, steps=7, guidance_scale=1.5)
    assert result["settings"] == {"seed": 3, "steps": 7, "guidance_scale": 1.5,
                                  "spacing": "time"}
    assert all(how["steps"] == 7 and how["guidance_scale"] == 1.5 for *_, how in stub.asked)
    for task in (("image",), ("text",), ("image", "text")):
        batches = [(n, how["seed"]) for sampled, n, how in stub.asked if sampled == task]
        for (n, seed), (rest, other) in zip(batches[::2], batches[1::2], strict=True):
            assert (n, rest) == (64, 26) and seed != other
    seeds = {how["seed"] for *_, how in stub.asked}
    second = Stub(some, codecs)
    evaluate(second, n=90, seed=4)
    assert seeds.isdisjoint(how["seed"] for *_, how in second.asked)


def test_a_seed_gives_the_same_scores(pipe):
    how = {"n": 4, "steps": 2}
    assert evaluate(pipe, seed=1, **how) == evaluate(pipe, seed=1, **how)
    for entry in all_scores(evaluate(pipe, **how)):
        low, high = entry["interval"]
        assert 0 <= low <= entry["value"] <= high <= 1


@pytest.mark.parametrize("n", [1, 0, -5])
def test_too_few_rows_are_refused(pipe, n):
    with pytest.raises(ValueError, match=f"at least 2 rows of each split, got n={n}"):
        evaluate(pipe, n=n)
