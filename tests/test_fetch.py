"""Fetching, from a server that does what the web does: every row accounted for, nothing let in."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from http.client import HTTPMessage
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

pytest.importorskip("img2dataset", reason="the extra fetch is not installed")

from hostile_server import PRIVATE, HostileServer, crawl_rows

from minidiffuser.data import download as downloads
from minidiffuser.data import load_table
from minidiffuser.data.download import (
    Limits,
    Refused,
    SafeResizer,
    Turn,
    check_address,
    checked_url,
    download_row,
    read_image,
)
from minidiffuser.data.fetch import fetch, prepare, read_shards, shard_table

ROOT = Path(__file__).parents[1]
HOST = "127.0.0.1"
QUICK = {"timeout": 1.5, "deadline": 2.5, "max_bytes": 2_000_000, "image_size": 64,
         "allow_hosts": [HOST], "without": ["punsafe"]}


@pytest.fixture(scope="module")
def server():
    with HostileServer() as server:
        yield server


def write_table(path, urls, texts=None, **more):
    texts = texts or [f"row {i}" for i in range(len(urls))]
    parquet.write_table(pa.table({"URL": urls, "TEXT": texts, **more}), path)
    return path


# ---- the whole of it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def crawl(server, tmp_path_factory):
    """2,200 rows fetched from the hostile server: the folder, the report, what was expected."""
    folder = tmp_path_factory.mktemp("crawl")
    urls, texts, reasons = crawl_rows(server.url)
    source = write_table(folder / "part.parquet", urls, texts, similarity=[0.3] * len(urls))
    before = server.asked.total()
    report = fetch(source, folder / "out", shard_rows=400, threads=24, processes=2, **QUICK)
    return folder, report, urls, texts, reasons, server.asked.total() - before


@pytest.mark.slow
def test_every_row_is_accounted_for_by_its_reason(crawl):
    _, report, _, _, reasons, _ = crawl
    expected = Counter(reasons)
    assert report.asked == len(reasons) and report.unfinished == 0
    assert report.fetched == expected.pop(None)
    assert dict(report.reasons) == dict(expected)


@pytest.mark.slow
def test_the_server_was_asked_more_than_two_thousand_times(crawl):
    assert crawl[-1] >= 2000


@pytest.mark.slow
def test_what_comes_back_is_right_row_by_row(crawl):
    folder, _, urls, texts, reasons, _ = crawl
    table = read_shards(folder / "out")
    own = {row["URL"]: row for row in table}
    assert set(own) == {u for u, why in zip(urls, reasons, strict=True) if why is None}
    for i, (url, text, why) in enumerate(zip(urls, texts, reasons, strict=True)):
        if why is None:
            assert own[url]["TEXT"] == text, i
            assert own[url]["similarity"] == 0.3 and own[url]["row"] == i
            assert own[url]["image"].mode == "RGB"


@pytest.mark.slow
def test_pictures_are_upright_small_and_have_their_colours(crawl):
    folder = crawl[0]
    rows = {row["URL"].split("/")[3]: row for row in read_shards(folder / "out")}
    for case in ("png", "jpeg", "webp", "gif", "cmyk", "palette", "animated", "rotated", "large"):
        pixels = np.asarray(rows[case]["image"]).astype(int)
        height, width, _ = pixels.shape
        assert width > height, case
        red, blue = pixels[2, 2], pixels[-3, -3]
        assert red[0] > 180 > 90 > red[2], (case, red)
        assert blue[2] > 180 > 90 > blue[0], (case, blue)
    assert rows["large"]["image"].size == (96, 64)
    assert (rows["large"]["WIDTH"], rows["large"]["HEIGHT"]) == (900, 600)
    grey = np.asarray(rows["sixteen"]["image"]).astype(int)
    assert grey[2].mean() < 30 and grey[-3].mean() > 225
    assert np.asarray(rows["transparent"]["image"]).min() > 250


@pytest.mark.slow
def test_the_same_command_again_asks_for_nothing(crawl, server):
    folder, report, *_ = crawl
    before = server.asked.total()
    again = fetch(folder / "part.parquet", folder / "out", shard_rows=400, **QUICK)
    assert again == report and server.asked.total() == before
    assert json.loads((folder / "out" / "report.json").read_text()) == report.to_dict()


@pytest.mark.slow
def test_killed_half_way_and_resumed_nothing_is_lost_or_doubled(server, tmp_path):
    urls = [f"{server.url}/{'png' if i % 3 else '404'}/killed{i}" for i in range(600)]
    source = write_table(tmp_path / "a.parquet", urls)
    how = {**QUICK, "shard_rows": 40, "threads": 4, "rate": 150.0}
    script = (f"from minidiffuser.data.fetch import fetch\n"
              f"fetch({str(source)!r}, {str(tmp_path / 'out')!r}, **{how!r})")
    run = subprocess.Popen([sys.executable, "-c", script])
    shards = tmp_path / "out" / "shards"
    waiting = time.monotonic() + 300
    while len(list(shards.glob("*_stats.json"))) < 3 and time.monotonic() < waiting:
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    done = {f.name for f in shards.glob("*_stats.json")}
    assert 3 <= len(done) < 15, "it was not killed half-way"
    (shards / "00014.parquet").write_bytes(b"PAR1 half of a shard")  # what a crash may leave

    report = fetch(source, tmp_path / "out", **how)
    assert (report.asked, report.fetched, report.unfinished) == (600, 400, 0)
    assert report.reasons == {"http 404": 200}
    table = read_shards(tmp_path / "out")
    assert sorted(table["row"]) == [i for i in range(600) if i % 3]
    # Shards that were whole were not asked for again: twice is what a killed shard may be.
    asked = Counter({u: server.asked[u.removeprefix(server.url)] for u in urls})
    whole = {int(name[:5]) for name in done}
    assert all(asked[u] == 1 for i, u in enumerate(urls) if i // 40 in whole)
    assert max(asked.values()) == 2


# ---- one by one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("url", PRIVATE)
def test_a_private_address_is_refused_unless_its_host_is_allowed_by_name(url):
    ask = [(0, url), None, None, None]
    assert download_row(Turn(None), Limits(), *ask)[1:] == (None, "private address")
    other = Limits(allow_hosts=("example.org",))
    assert download_row(Turn(None), other, *ask)[1:] == (None, "private address")


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "64:ff9b::808:808"])
def test_public_addresses_pass(address):
    check_address(address)


def test_a_name_that_resolves_to_a_private_address_is_refused(monkeypatch):
    import socket

    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80)),
             (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    ask = [(0, "http://innocent.example/a"), None, None, None]
    _, _, why = download_row(Turn(None), Limits(), *ask)
    assert why == "private address"


def test_the_checked_address_is_the_one_connected_to(monkeypatch, server):
    """A second answer of the name server (DNS rebinding) is never asked for."""
    import socket

    real, asked = socket.getaddrinfo, []

    def once(host, *args, **how):
        asked.append(host)
        return real(HOST, *args, **how)

    monkeypatch.setattr(socket, "getaddrinfo", once)
    port = server.url.rsplit(":", 1)[1]
    limits = Limits(allow_hosts=("rebound.example",))
    _, file, why = download_row(Turn(None), limits, (0, f"http://rebound.example:{port}/png/1"),
                                None, None, None)
    assert why is None and file.getvalue().startswith(b"\x89PNG")
    assert asked == ["rebound.example"]


def test_requests_begin_at_the_rate_asked_for():
    turn, begun = Turn(50.0), time.monotonic()
    for _ in range(11):
        turn.wait()
    assert time.monotonic() - begun >= 10 / 50


def test_the_resizer_refuses_formats_it_was_not_told_of():
    image = Image.new("RGB", (8, 8))
    for kind in ("ICO", "PPM", "TGA"):
        file = io.BytesIO()
        image.save(file, kind)
        *_, why = SafeResizer(64, "no", False, limits=Limits())(file)
        assert why == "truncated or corrupt image", kind


@pytest.mark.parametrize("width, why", [(10, None), (11, "decompression bomb")])
def test_the_limit_of_pixels_is_ours_and_not_pillows(width, why):
    file = io.BytesIO()
    Image.new("RGB", (width, 10)).save(file, "PNG")
    assert SafeResizer(64, "no", False, limits=Limits(max_pixels=100))(file)[-1] == why


def test_a_file_that_announces_too_many_bytes_is_not_waited_for():
    class Response(io.BytesIO):
        length, headers = 101, HTTPMessage()

        def read(self, *_):
            raise AssertionError("its body was asked for")

    with pytest.raises(Refused, match="too many bytes"):
        read_image(Response(), Limits(max_bytes=100))


@pytest.mark.parametrize("url", ["http://a.example\\@127.0.0.1/x", "http:\\\\127.0.0.1/x",
                                 "http:///x", "http://a.example:99999/x", "http://[::1/x"])
def test_urls_that_are_read_in_two_ways_are_bad(url):
    with pytest.raises(Refused, match="bad url"):
        checked_url(url)


def test_processes_share_the_rate(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(downloads, "img2dataset_download", lambda **_: seen.append(
        vars(sys.modules["img2dataset.main"])["Downloader"].keywords["limits"].rate))
    settings = {"folder": str(tmp_path), "processes": 4, "threads": 1, "retries": 0,
                "distributor": "multiprocessing", "columns": [], "shard_rows": 10,
                "image_size": 64, "limits": {"allow_hosts": [], "rate": 20.0}}
    downloads.run(settings)
    assert seen == [5.0]


# ---- sources, settings, reading back -------------------------------------------------------------


@pytest.fixture(scope="module")
def small(server, tmp_path_factory):
    """A small fetch whose source has the columns of Re-LAION and a subset's filters."""
    folder = tmp_path_factory.mktemp("small")
    n = 12
    table = {"url": [f"{server.url}/png/s{i}" for i in range(n)],
             "caption": [f"row {i}" for i in range(n)], "width": [600] * n, "height": [700] * n,
             "language": ["en", "fr"] * 6, "punsafe": [0.0] * 8 + [0.9] * 4, "key": list(range(n))}
    (folder / "parts").mkdir()
    for i in range(3):
        part = {name: values[i * 4 : i * 4 + 4] for name, values in table.items()}
        parquet.write_table(pa.table(part), folder / "parts" / f"{i}.parquet")
    report = fetch(folder / "parts", folder / "out", subset="laion2B-en", limit=3,
                   **{**QUICK, "without": []})
    return folder, report


def test_filters_and_limit_come_before_the_first_request(small, server):
    folder, report = small
    assert (report.asked, report.fetched) == (3, 3)
    assert [row["TEXT"] for row in read_shards(folder / "out")] == ["row 0", "row 2", "row 4"]
    assert server.asked["/png/s1"] == server.asked["/png/s6"] == 0
    assert [s["name"] for s in report.filtered["steps"]] == ["language", "punsafe"]


def test_shards_come_back_in_laions_schema(small):
    table = read_shards(small[0] / "out")
    assert {"URL", "TEXT", "WIDTH", "HEIGHT", "LANGUAGE", "punsafe", "image"} <= set(
        table.column_names)
    assert isinstance(table.features["image"], datasets.Image)
    assert table[0]["WIDTH"] == 48 and table[0]["image"].size == (48, 32)
    assert load_table(small[0] / "out").column_names == table.column_names


def test_another_fetch_does_not_go_into_the_same_folder(small):
    with pytest.raises(ValueError, match="holds another fetch.*limit was 3 and is 4"):
        fetch(small[0] / "parts", small[0] / "out", subset="laion2B-en", limit=4,
              **{**QUICK, "without": []})


def test_a_damaged_shard_is_named_and_fetched_again(small, tmp_path):
    import shutil

    folder = shutil.copytree(small[0] / "out", tmp_path / "out")
    shard = next((folder / "shards").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{shard.name}.*is damaged.*run the same fetch again"):
        read_shards(folder)
    report = fetch(small[0] / "parts", folder, subset="laion2B-en", limit=3,
                   **{**QUICK, "without": []})
    assert report.fetched == 3 and len(read_shards(folder)) == 3


def test_rows_come_back_in_the_order_of_the_source(tmp_path):
    """However they finished: workers write a shard as its downloads end."""
    names = ["key", "jpg", "url", "caption", "original_width", "original_height", "sha256", "row"]
    rows = [2, 0, 1, 3]
    columns = [[str(r) for r in rows], [b"x"] * 4, [f"u{r}" for r in rows], ["t"] * 4, [1] * 4,
               [1] * 4, ["s"] * 4, rows]
    status = ["success"] * 3 + ["failed_to_download"]
    (tmp_path / "shards").mkdir()
    parquet.write_table(pa.table({**dict(zip(names, columns, strict=True)), "status": status}),
                        tmp_path / "shards" / "00000.parquet")
    assert shard_table(tmp_path, "00000")["URL"].to_pylist() == ["u0", "u1", "u2"]


def test_a_long_input_is_written_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("minidiffuser.data.fetch.PART_ROWS", 1000)
    source = write_table(tmp_path / "a.parquet", [f"http://x/{i}" for i in range(2500)])
    what = {"source": str(source), "limit": None, "subset": "all", "without": ["punsafe"],
            "shard_rows": 10, "image_size": 64}
    prepare(what, tmp_path / "out")
    parts = sorted((tmp_path / "out" / "input").glob("*.parquet"))
    tables = [parquet.read_table(part) for part in parts]
    assert [len(t) for t in tables] == [1000, 1000, 500]
    assert [r for t in tables for r in t["row"].to_pylist()] == list(range(2500))


@pytest.mark.parametrize("change, message", [
    ({"limit": 0}, "limit must be above 0"), ({"rate": -1.0}, "rate must be above 0"),
    ({"subset": "laion"}, "unknown subset 'laion'"), ({"distributor": "slurm"}, "distributor must"),
    ({"without": ["punsave"]}, "unknown filter of all 'punsave'"),
    ({"retries": -1}, "retries must be at least 0"),
])
def test_bad_settings_are_refused(change, message, tmp_path):
    source = write_table(tmp_path / "a.parquet", ["http://x/a"], punsafe=[0.0])
    with pytest.raises(ValueError, match=message):
        fetch(source, tmp_path / "out", **change)
    assert not (tmp_path / "out" / "fetch.json").exists()


def test_rows_of_a_larger_fetch_that_was_killed_are_not_asked_for(tmp_path):
    """It had written some of its input, and not yet what it is a fetch of."""
    source = write_table(tmp_path / "a.parquet", [f"http://x/{i}" for i in range(9)])
    folder = tmp_path / "out" / "input"
    folder.mkdir(parents=True)
    for left in ("00000", "00001"):
        write_table(folder / f"{left}.parquet", ["http://x/left"])
    what = {"source": str(source), "limit": 2, "subset": "all", "without": ["punsafe"],
            "shard_rows": 10, "image_size": 64}
    prepare(what, tmp_path / "out")
    asked = [url for f in folder.glob("*") for url in parquet.read_table(f)["URL"].to_pylist()]
    assert asked == ["http://x/0", "http://x/1"]
    assert json.loads((tmp_path / "out" / "fetch.json").read_text())["rows"] == 2


def test_a_source_that_does_not_fit_is_explained(tmp_path):
    parquet.write_table(pa.table({"link": ["a"], "TEXT": ["b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column URL \(or url, image_url\); it has: link"):
        fetch(tmp_path / "a.parquet", tmp_path / "out", without=["punsafe"])
    unscored = write_table(tmp_path / "c.parquet", ["http://x/a"])
    with pytest.raises(ValueError, match="'punsafe'.*which this table lacks.*--without punsafe"):
        fetch(unscored, tmp_path / "out")
    with pytest.raises(ValueError, match="no parquet file at"):
        fetch(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match="torn.parquet"):
        fetch(tmp_path / "torn.parquet", tmp_path / "out")
    empty = write_table(tmp_path / "b.parquet", ["http://x/a"], punsafe=[0.9])
    with pytest.raises(ValueError, match="no row is left to fetch"):
        fetch(empty, tmp_path / "out2")


def test_a_hub_name_says_what_it_needs_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="laion/relaion2B-en.*Hugging Face hub now; offline"):
        fetch("laion/relaion2B-en-research-safe", tmp_path / "out", limit=10)


@pytest.mark.parametrize("library, package, how", [
    ("img2dataset", r"minidiffuser\[fetch\]", {}), ("ray", "ray", {"distributor": "ray"}),
    ("pyspark", "pyspark", {"distributor": "pyspark"})])
def test_what_is_missing_is_named_with_what_installs_it(
    library, package, how, monkeypatch, tmp_path
):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *a: None if name == library else real(name, *a))
    with pytest.raises(ValueError, match=f"this fetch needs {library}: pip install '{package}'"):
        fetch("x", tmp_path, **how)


def test_the_command_prints_the_report(cli, server, tmp_path):
    source = write_table(tmp_path / "a.parquet", [f"{server.url}/{c}/c" for c in ("png", "404")])
    ran = cli("data", "fetch", source, "--out", tmp_path / "out", "--without", "punsafe",
              "--allow-host", HOST)
    assert ran.code == 0, ran.err
    assert "2 rows asked for" in ran.out and "1 http 404" in ran.out


def test_refused_is_raised_for_what_is_refused():
    with pytest.raises(Refused, match="private address"):
        check_address("fe80::1%eth0")


def test_every_distributor_reported_the_same():
    """What `python benchmarks/fetch.py` found, which docs/laion.md quotes."""
    one, *others = [json.loads((ROOT / "benchmarks" / f"fetch{name}.json").read_text())
                    for name in ("", "_ray", "_pyspark")]
    assert others == [one, one]
    assert one["asked"] == one["fetched"] + sum(one["reasons"].values()) == 2171
    text = (ROOT / "docs" / "laion.md").read_text()
    for number in ("asked", "fetched", "failed"):
        assert f"{one[number]:,}" in text
