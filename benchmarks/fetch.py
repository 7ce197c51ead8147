"""The report of a fetch from a server that does what the web does: writes fetch.json.

    python benchmarks/fetch.py
    python benchmarks/fetch.py --distributor ray        # writes fetch_ray.json
    PYSPARK_SUBMIT_ARGS="--master local[2] pyspark-shell" \\
        python benchmarks/fetch.py --distributor pyspark

The server is that of the tests (tests/hostile_server.py), on this computer; 2,171 rows, two
processes.  Ray (`pip install ray`) and Spark (`pip install "pyspark<4"`, and a Java 17) run on this
computer alone: their local mode.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from hostile_server import HostileServer, crawl_rows  # noqa: E402

from minidiffuser.data.fetch import fetch  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--distributor", default="multiprocessing",
                        choices=("multiprocessing", "pyspark", "ray"))
    distributor = parser.parse_args().distributor
    with HostileServer() as server, tempfile.TemporaryDirectory() as folder:
        urls, texts, _ = crawl_rows(server.url)
        source = Path(folder) / "rows.parquet"
        parquet.write_table(pa.table({"URL": urls, "TEXT": texts}), source)
        report = fetch(source, Path(folder) / "out", without=["punsafe"], shard_rows=400,
                       processes=2, threads=24, timeout=1.5, deadline=2.5, max_bytes=2_000_000,
                       image_size=64, allow_hosts=["127.0.0.1"],
                       distributor=distributor)
        result = {**report.to_dict(), "requests": server.asked.total()}
    name = "fetch.json" if distributor == "multiprocessing" else f"fetch_{distributor}.json"
    (HERE / name).write_text(json.dumps(result, indent=1) + "\n")
    print(report, f"{result['requests']:10,d} requests reached the server", sep="\n")


if __name__ == "__main__":
    main()
