"""The report of a fetch from a server that does what the web does: writes fetch.json.

    python benchmarks/fetch.py

The server is that of the tests (tests/hostile_server.py), on this computer; 2,200 rows, two
processes.
"""

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
    with HostileServer() as server, tempfile.TemporaryDirectory() as folder:
        urls, texts, _ = crawl_rows(server.url)
        source = Path(folder) / "rows.parquet"
        parquet.write_table(pa.table({"URL": urls, "TEXT": texts}), source)
        report = fetch(source, Path(folder) / "out", without=["punsafe"], shard_rows=400,
                       processes=2, threads=24, timeout=1.5, deadline=2.5, max_bytes=2_000_000,
                       image_size=64, allow_hosts=["127.0.0.1"])
        result = {**report.to_dict(), "requests": server.asked.total()}
    (HERE / "fetch.json").write_text(json.dumps(result, indent=1) + "\n")
    print(report, f"{result['requests']:10,d} requests reached the server", sep="\n")


if __name__ == "__main__":
    main()
