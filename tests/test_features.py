"""Features: the same bytes however often stopped and however many took part; read as a stream."""

import gc
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import Counter

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from support import TOY
from test_train import assert_same, run, weights

from minidiffuser.codecs import PixelCodec
from minidiffuser.data import features, load_table, save_table
from minidiffuser.data.features import encode, read_index
from minidiffuser.data.stream import FeatureSource, ShardOrder, TableSource, open_source
from minidiffuser.images import to_uint8
from minidiffuser.pipeline import UniDiffuser, training_arrays
from minidiffuser.train import Trainer

ROWS = 230
CFG = TOY.replace(steps=12, save_every=4, sample_every=100, precision="no", log_every=4)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """230 rows of emoji, of which 5 cannot be used: a torn image, two without caption, ..."""
    folder = tmp_path_factory.mktemp("table")
    some = load_table("emoji").select(range(ROWS))
    rows = some.cast_column("image", datasets.Image(decode=False)).to_list()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:200]
    rows[100]["image"] = None
    rows[120]["TEXT"], rows[121]["TEXT"] = "", None
    rows[229]["TEXT"] = " ".join(["word"] * 40)
    features_of = load_table("emoji").features
    save_table(datasets.Dataset.from_list(rows, features=features_of), folder, "train")
    return folder


@pytest.fixture(scope="module")
def encoded(table, tmp_path_factory):
    """The table as features, in shards of 32 rows, and the report."""
    out = tmp_path_factory.mktemp("features") / "out"
    return out, encode(table, out, CFG, shard_rows=32)


def fingerprints(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())
            if not f.name.startswith(".")}


# ---- what is written -----------------------------------------------------------------------------


def test_every_row_is_written_or_counted(encoded):
    _, report = encoded
    assert (report.read, report.written, report.shards) == (ROWS, ROWS - 5, 8)
    assert report.reasons == {"not a readable image": 2, "no caption": 2, "caption too long": 1}
    assert "2 no caption" in str(report)


def test_latents_are_the_codecs(encoded, table):
    """Every row of every shard, against the table encoded here."""
    out, _ = encoded
    source = FeatureSource(CFG.replace(data=str(out)))
    rows = [row for i, row in enumerate(load_table(table).cast_column(
        "image", datasets.Image(decode=False))) if i not in (3, 100, 120, 121, 229)]
    z = source.codecs["image"].encode([features.filters.open_image(r["image"]) for r in rows])
    ids = source.codecs["text"].encode_ids([r["TEXT"] for r in rows])
    places = [(s, r) for s, size in enumerate(source.sizes) for r in range(size)]
    assert len(places) == len(rows)
    for i, place in enumerate(places):
        row = source.row(*place)
        assert torch.equal(row["image.latents"], z[i].half())
        assert torch.equal(row["text.ids"], ids[i].int())


def test_each_row_keeps_its_url_and_caption(encoded, table):
    """By which a row can be traced, and taken out."""
    out, _ = encoded
    source = FeatureSource(CFG.replace(data=str(out)))
    urls = {row["URL"]: row["TEXT"] for row in load_table("emoji").select(range(ROWS))}
    for number, size in enumerate(source.sizes):
        rows = parquet.read_table(out / f"shard_{number:05d}.parquet").to_pylist()
        ids = torch.stack([source.row(number, i)["text.ids"] for i in range(size)])
        assert [r["TEXT"] for r in rows] == source.codecs["text"].decode(
            source.codecs["text"].codes[ids.long()])
        assert all(urls[r["URL"]] == r["TEXT"] for r in rows)


def img2dataset_folder(folder, columns):
    """60 rows of emoji in two shards under other names for the columns."""
    folder.mkdir()
    some = load_table("emoji").cast_column("image", datasets.Image(decode=False))
    for k in range(2):
        rows = some.select(range(30 * k, 30 * k + 30))
        values = {"jpg": [r["image"]["bytes"] for r in rows], "caption": rows["TEXT"],
                  "url": rows["URL"], "key": [f"{k}{i:04d}" for i in range(30)]}
        values["jpg"][7] = None  # it could not be downloaded
        parquet.write_table(pa.table({c: values[c] for c in columns}), folder / f"{k:05d}.parquet")
    return folder


@pytest.mark.parametrize("columns", [("jpg", "caption", "url", "key"), ("caption", "jpg")])
def test_any_folder_of_parquet_is_read_file_by_file(tmp_path, columns):
    report = encode(img2dataset_folder(tmp_path / "in", columns), tmp_path / "out", TOY)
    assert (report.read, report.written, report.shards) == (60, 58, 2)
    assert report.reasons == {"not a readable image": 2}
    kept = parquet.read_table(tmp_path / "out" / "shard_00001.parquet").to_pylist()
    expected = load_table("emoji").select([30])[0]
    assert kept[0]["TEXT"] == expected["TEXT"]
    assert kept[0]["URL"] == (expected["URL"] if "url" in columns else None)


def test_a_folder_without_captions_or_with_filters_is_refused(tmp_path):
    folder = img2dataset_folder(tmp_path / "in", ("jpg", "url"))
    with pytest.raises(ValueError, match=r"has no column TEXT \(or text, caption"):
        encode(folder, tmp_path / "out", TOY)
    with pytest.raises(ValueError, match="read shard by shard"):
        encode(folder, tmp_path / "out", TOY.replace(filters="readable"))


def test_a_decoder_that_breaks_and_a_caption_that_names_the_end_are_counted(tmp_path, monkeypatch):
    some = load_table("emoji").select(range(20)).cast_column("image", datasets.Image(decode=False))
    rows = some.to_list()
    rows[4]["TEXT"] = "red [end] apple"
    rows[9]["image"]["bytes"] = b"breaks"
    save_table(datasets.Dataset.from_list(rows, features=some.features), tmp_path / "t", "train")
    real = features.filters.open_image

    def fragile(value):
        if value["bytes"] == b"breaks":
            raise RuntimeError("Failed to decode image")
        return real(value)

    monkeypatch.setattr(features.filters, "open_image", fragile)
    report = encode(tmp_path / "t", tmp_path / "out", TOY)
    assert report.reasons == {"not a readable image": 1, "unknown words": 1}
    assert report.written == 18


def test_no_more_originals_are_held_than_are_encoded_at_once(pipe, monkeypatch):
    opened, alive, real = [], [], features.filters.open_image

    def counted(value):
        image = real(value)
        opened.append(weakref.ref(image))
        alive.append(sum(seen() is not None for seen in opened))
        return image

    monkeypatch.setattr(features.filters, "open_image", counted)
    gc.collect()
    rows = load_table("emoji").select(range(200)).cast_column("image", datasets.Image(decode=False))
    _, kept, _ = features.encode_rows(rows.select_columns(["image", "TEXT"]), pipe.codecs)
    assert len(kept) == len(opened) == 200
    assert features.BATCH <= max(alive) <= features.BATCH + 1


def test_codecs_are_fitted_to_so_many_images_and_to_all_captions(table, monkeypatch):
    shards = features.source_shards(table, 32)
    fitted = features.fit_codecs(CFG, shards)
    monkeypatch.setattr(features, "FIT_BYTES", 3 * 16 * 16 * 10)
    few = features.fit_codecs(CFG, shards)
    images = [features.open_image(row["image"]) for row in shards[0]().select(range(11))]
    ten = to_uint8([image for image in images if image], 16)
    assert len(ten) == 10 and few["image"].mean == PixelCodec.fit(ten).mean
    assert few["text"].words == fitted["text"].words


def test_a_second_run_writes_nothing(encoded, table):
    out, report = encoded
    before = {f: f.stat().st_mtime_ns for f in out.glob("shard_*")}
    assert encode(table, out, CFG, shard_rows=32) == report
    assert {f: f.stat().st_mtime_ns for f in out.glob("shard_*")} == before


def test_a_shard_that_is_not_whole_is_written_again(encoded, table, tmp_path):
    out = shutil.copytree(encoded[0], tmp_path / "out")
    shard = out / "shard_00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    (out / "shard_00004.json").write_text('{"rows": ')
    (out / "shard_00005.parquet").unlink()
    flip(out / "shard_00006.safetensors", -1)
    (out / "index.json").unlink()
    (out / ".shard_00003.safetensors.writing_1").write_bytes(b"half")  # of a run that was killed
    encode(table, out, CFG, shard_rows=32)
    assert fingerprints(out) == fingerprints(encoded[0])
    assert not list(out.glob(".*"))


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


SCRIPT = """
import json
import sys
from minidiffuser.config import PRESETS
from minidiffuser.data import features
from minidiffuser.data.stream import FeatureSource
source, out, rows = sys.argv[1:]
wrote, write = [], features.write_shard
features.write_shard = lambda out, number, *rest: wrote.append(number) or write(out, number, *rest)
cfg = PRESETS["toy"].replace(data=out)
features.encode(source, out, cfg, shard_rows=int(rows))
stream, state = FeatureSource(cfg), features.processes()
places = [stream.order(step, state.process_index, state.num_processes)
          for step in range(stream.order.rows)]  # as many epochs as a batch has rows
with open(f"{out}.rank{state.process_index}.json", "w") as file:
    json.dump([wrote, sum(places, [])], file)
"""


@pytest.mark.slow
def test_killed_half_way_and_resumed_the_bytes_are_the_same(table, tmp_path):
    whole = tmp_path / "whole"
    encode(table, whole, TOY, shard_rows=2)
    out = tmp_path / "killed"
    run = subprocess.Popen([sys.executable, "-c", SCRIPT, str(table), str(out), "2"],
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    waiting = time.monotonic() + 300
    while len(list(out.glob("shard_*.json"))) < 5 and time.monotonic() < waiting:
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert not (out / "index.json").exists(), "it was not killed half-way"
    with pytest.raises(ValueError, match="not complete: run the same `data encode` again"):
        FeatureSource(TOY.replace(data=str(out)))
    encode(table, out, TOY, shard_rows=2)
    assert fingerprints(out) == fingerprints(whole)


@pytest.mark.slow
def test_two_workers_write_the_same_bytes_as_one_and_share_the_rows(encoded, table, tmp_path):
    script = tmp_path / "encode.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(script), str(table),
               str(tmp_path / "two"), "32"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert fingerprints(tmp_path / "two") == fingerprints(encoded[0])
    seen = [json.loads((tmp_path / f"two.rank{i}.json").read_text()) for i in range(2)]
    assert [shards for shards, _ in seen] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert len({len(places) for _, places in seen}) == 1
    count = Counter(tuple(place) for _, places in seen for place in places)
    assert len(count) == ROWS - 5 and set(count.values()) == {TOY.batch_size}


def test_a_models_own_codecs_can_be_used(pipe, tmp_path):
    report = encode("emoji", tmp_path / "out", pipe.cfg, codecs=pipe.codecs, shard_rows=2000)
    kept = features.load_codecs(tmp_path / "out", CFG.pretrained)
    assert torch.equal(kept["text"].codes, pipe.codecs["text"].codes)
    assert report.written == report.read == 3447


def test_words_a_given_codec_does_not_know_are_counted(pipe, tmp_path):
    report = encode("clipart", tmp_path / "out", pipe.cfg, codecs=pipe.codecs, shard_rows=4000)
    assert report.reasons["unknown words"] > 1000
    assert report.read == report.written + report.reasons.total()


# ---- what is refused -----------------------------------------------------------------------------


def test_other_features_do_not_go_into_the_same_folder(encoded, table):
    with pytest.raises(ValueError, match="holds other features.*'image_size': 16"):
        encode(table, encoded[0], CFG.replace(image_size=32), shard_rows=32)


def test_nor_do_those_of_other_codecs_or_of_a_source_that_has_changed(
    encoded, table, tmp_path, codecs
):
    with pytest.raises(ValueError, match="the codecs are not those given"):
        encode(table, encoded[0], CFG, codecs=codecs, shard_rows=32)
    changed = shutil.copytree(table, tmp_path / "t")
    encode(changed, tmp_path / "out", CFG, shard_rows=32)
    rows = load_table(changed).cast_column("image", datasets.Image(decode=False))
    save_table(rows.select(range(1, ROWS)), changed, "train")  # as many shards, other rows
    with pytest.raises(ValueError, match="the source has changed"):
        encode(changed, tmp_path / "out", CFG, shard_rows=32)


def test_codecs_that_were_not_the_encoders_are_refused(encoded, tmp_path):
    out = shutil.copytree(encoded[0], tmp_path / "out")
    flip(out / "codecs.safetensors", -1)
    with pytest.raises(ValueError, match="are not those that encoded it"):
        FeatureSource(CFG.replace(data=str(out)))


def test_features_of_other_settings_are_refused_by_training(encoded, tmp_path):
    cfg = CFG.replace(data=str(encoded[0]), image_size=32)
    with pytest.raises(ValueError, match=r"do not fit this run \(image_size is 16 there"):
        Trainer(cfg, tmp_path / "run", cpu=True)


def test_features_that_were_not_filtered_as_the_run_asks_are_refused(encoded, table, tmp_path):
    """Else `train clipart --data F` would train on the noise that its filters are there for."""
    asks = CFG.replace(filters="-punsafe readable")
    with pytest.raises(ValueError, match="made with filters='', and not with '-punsafe readable'"):
        FeatureSource(asks.replace(data=str(encoded[0])))
    encode(table, tmp_path / "f", asks, shard_rows=100)
    for cfg in (asks, CFG):  # without filters they are taken as they are
        FeatureSource(cfg.replace(data=str(tmp_path / "f")))


def test_scores_on_train_are_of_the_rows_that_features_were_made_of(tmp_path):
    cfg = CFG.replace(filters="-punsafe caption_words=1,2")
    encode("emoji", tmp_path / "f", cfg, shard_rows=4000)
    _, captions = training_arrays(CFG.replace(data=str(tmp_path / "f")))
    assert captions and max(len(c.split()) for c in captions) == 2


def test_a_damaged_shard_is_named(encoded, tmp_path):
    out = shutil.copytree(encoded[0], tmp_path / "out")
    (out / "shard_00000.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="shard_00000.safetensors is damaged or missing"):
        FeatureSource(CFG.replace(data=str(out))).row(0, 0)


def test_a_table_without_a_usable_row_is_refused(tmp_path):
    none = load_table("emoji").select([0]).map(lambda row: {"TEXT": ""})
    save_table(none, tmp_path / "t", "train")
    with pytest.raises(ValueError, match="no row has an image that can be read and a caption"):
        encode(tmp_path / "t", tmp_path / "out", CFG)


# ---- the order of a stream -----------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[5, 7, 3, 9, 1, 0, 6], [40], [3] * 30])
def test_each_epoch_has_every_row_once_over_all_processes(sizes, world):
    order = ShardOrder(sizes, batch=4, seed=1, window=3)
    rows = [(s, r) for s, size in enumerate(sizes) for r in range(size)]
    seen = []
    for step in range(3 * len(rows) // 4 + 1):
        shares = [order(step, rank, world) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        seen += [place for places in zip(*shares, strict=True) for place in places]
    for epoch in range(3):
        assert sorted(seen[epoch * len(rows) : (epoch + 1) * len(rows)]) == rows


def test_processes_share_out_the_batch_of_one():
    alone = ShardOrder([5, 7, 3, 9], 4, 1, window=2)
    for step in range(30):
        shares = [ShardOrder([5, 7, 3, 9], 4, 1, window=2)(step, rank, 2) for rank in range(2)]
        assert alone(step)[0::2] == shares[0] and alone(step)[1::2] == shares[1]


def test_the_position_is_the_step_and_epochs_differ():
    order = ShardOrder([20, 20, 20], 10, 0, window=2)
    through = [order(step) for step in range(12)]
    assert [ShardOrder([20, 20, 20], 10, 0, window=2)(step) for step in (11, 3, 7)] == [
        through[11], through[3], through[7]]
    assert through[:6] != through[6:]
    assert through[0] != ShardOrder([20, 20, 20], 10, 1, window=2)(0)


def test_rows_are_mixed_within_a_window_and_not_beyond():
    order = ShardOrder([10] * 12, batch=30, seed=0, window=3)
    windows = [{shard for shard, _ in order(step)} for step in range(4)]
    assert all(len(shards) == 3 for shards in windows)
    assert set.union(*windows) == set(range(12))
    first = [shard for shard, _ in order(0)]
    assert len(set(first[:10])) > 1  # not shard by shard


def test_no_more_shards_are_open_than_a_window_holds(encoded):
    source = FeatureSource(CFG.replace(data=str(encoded[0])), window=2)
    for step in range(30):
        source.batch(step)
        assert len(source.open) <= 2
    assert len(source.sizes) == 8


def test_the_shard_that_was_not_used_for_longest_is_closed(encoded):
    source = FeatureSource(CFG.replace(data=str(encoded[0])), window=2)
    for shard in (0, 1, 0, 2):
        source.row(shard, 0)
    assert list(source.open) == [0, 2]


def test_a_process_reads_its_own_rows_only(encoded, monkeypatch):
    source = FeatureSource(CFG.replace(data=str(encoded[0])))
    read, real = [], source.row
    monkeypatch.setattr(source, "row", lambda *where: read.append(where) or real(*where))
    source.batch(0, rank=1, world=4)
    assert len(read) == CFG.batch_size // 4


# ---- training on it ------------------------------------------------------------------------------


def test_a_batch_of_features_is_the_batch_of_the_table(encoded, table):
    """The same rows give the same latents, but for float16."""
    stream = FeatureSource(CFG.replace(data=str(encoded[0])))
    batch = stream.batch(0)
    assert batch["image"].dtype == torch.float32 and batch["image"].shape == (16, 3, 16, 16)
    text = stream.codecs["text"]
    captions = text.decode(batch["text"])
    own = {row["TEXT"]: row["image"] for row in load_table("emoji").select(range(ROWS))}
    z = stream.codecs["image"].encode([own[c] for c in captions])
    np.testing.assert_allclose(batch["image"], z, atol=2e-3)


def test_a_run_stopped_at_any_step_ends_with_the_same_weights(encoded, tmp_path):
    cfg = CFG.replace(data=str(encoded[0]))
    run(cfg, tmp_path / "whole")
    for step in Trainer(cfg, tmp_path / "cut", cpu=True):
        if step.index == 6:  # two steps after a checkpoint: they are taken again
            break
    trainer = Trainer(cfg, tmp_path / "cut", cpu=True)
    assert trainer.step == 4
    for _ in trainer:
        pass
    for name in ("model", "ema"):
        assert_same(weights(tmp_path / "whole", name), weights(tmp_path / "cut", name))
    assert UniDiffuser.from_pretrained(tmp_path / "cut").text_to_image(
        trainer.source.prompts(1)[0], steps=2)


def test_a_run_does_not_go_on_with_features_in_another_order(encoded, table, tmp_path):
    """Its step would be a place among other rows: some seen again, others never."""
    out = shutil.copytree(encoded[0], tmp_path / "f")
    cfg = CFG.replace(data=str(out))
    run(cfg, tmp_path / "run", until=5)
    assert Trainer(cfg, tmp_path / "run", cpu=True).step == 4
    shutil.rmtree(out)
    encode(table, out, CFG, shard_rows=25)
    with pytest.raises(ValueError, match="step_0000004 was trained on other features"):
        Trainer(cfg, tmp_path / "run", cpu=True)


def test_data_names_a_table_or_features(encoded, table):
    assert isinstance(open_source(CFG.replace(data=str(encoded[0]))), FeatureSource)
    assert isinstance(open_source(CFG), TableSource)


def test_scores_of_a_model_of_features_use_the_table_they_came_from(tmp_path):
    encode("emoji", tmp_path / "out", CFG, shard_rows=2000)
    images, captions = training_arrays(CFG.replace(data=str(tmp_path / "out")), "test")
    assert len(images) == len(captions) == 188
    assert read_index(tmp_path / "out")["source"] == "emoji"


def test_the_command_encodes_and_trains(cli, table, tmp_path):
    ran = cli("data", "encode", table, "--out", tmp_path / "f", "--preset", "toy",
              "--image-size", "16", "--shard-rows", "100")
    assert ran.code == 0, ran.err
    assert "225 written to 3 shards" in ran.out
    ran = cli("train", "toy", "--data", tmp_path / "f", "--out", tmp_path / "run", "--steps", "3",
              "--cpu")
    assert ran.code == 0, ran.err
    log = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert log["step"] == 3
