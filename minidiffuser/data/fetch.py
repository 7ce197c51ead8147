"""Fetching: from a table of URLs, a hundred rows or two billion, to shards of images on disk.

    report = fetch("part-00000.parquet", "runs/laion", limit=1000, subset="laion2B-en")
    table = read_shards("runs/laion")

The folder holds ``input/`` (the rows asked for, after filters, fixed at the start), ``shards/`` (of
`img2dataset`: every row with its status, and the image where there is one), ``fetch.json`` (the
settings), ``report.json`` and ``img2dataset.log``.  A shard is written whole or again, so a run
killed at any moment continues with the same command; see :mod:`minidiffuser.data.download` for
what keeps it safe.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import explained, first_line
from . import filters

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

log = logging.getLogger(__name__)

PART_ROWS = 1_000_000  # rows of a file in input/
# Names that img2dataset keeps for itself: a source's own columns of these names are not carried on.
TAKEN = {"caption", "url", "key", "status", "error_message", "width", "height", "original_width",
         "original_height", "exif", "md5", "sha256", "sha512", "jpg", "txt"}


@dataclass
class FetchReport:
    """What became of the rows asked for; they add up: ``asked = fetched + failed + unfinished``."""

    asked: int
    fetched: int = 0
    reasons: Counter = field(default_factory=Counter)   # why the others failed
    filtered: dict[str, Any] | None = None              # what the subset's filters did before

    @property
    def failed(self) -> int:
        return self.reasons.total()

    @property
    def unfinished(self) -> int:
        """Rows of shards that are not written yet: run the same command again."""
        return self.asked - self.fetched - self.failed

    def to_dict(self) -> dict[str, Any]:
        return {"asked": self.asked, "fetched": self.fetched, "failed": self.failed,
                "unfinished": self.unfinished, "reasons": dict(self.reasons.most_common()),
                "filtered": self.filtered}

    def __str__(self) -> str:
        lines = [f"{self.asked:10,d} rows asked for", f"{self.fetched:10,d} fetched"]
        lines += [f"{n:10,d} {reason}" for reason, n in self.reasons.most_common()]
        if self.unfinished:
            lines.append(f"{self.unfinished:10,d} unfinished: run the same command again")
        return "\n".join(lines)


def fetch(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    limit: int | None = None,
    subset: str = "all",
    without: Sequence[str] = (),
    allow_hosts: Sequence[str] = (),
    rate: float | None = None,
    timeout: float = 10.0,
    deadline: float = 30.0,
    max_bytes: int = 20_000_000,
    image_size: int = 256,
    shard_rows: int = 1000,
    processes: int = 1,
    threads: int = 32,
    retries: int = 0,
    distributor: str = "multiprocessing",
    progress: bool = False,
) -> FetchReport:
    """Download the images of a table in LAION's schema. Run it again to continue.

    Args:
        source: a parquet file, a folder of them, or the name of a dataset on the Hugging Face hub.
        out: the folder to write. limit: rows to ask for, after the filters; all by default.
        subset: one of ``filters.SUBSETS``; without: filters to leave out, ``punsafe`` among them.
        allow_hosts: hosts that may have a private address; none by default.
        rate: requests per second over all processes. timeout: seconds of silence; deadline: seconds
            for an image, redirects included. max_bytes: of a file.
        image_size: length of the shorter side in pixels; images are made smaller, never larger.
        shard_rows: rows of a shard, which is what a killed run loses at most per process.
        processes, threads: of each process. retries: further tries of a row that failed.
        distributor: ``multiprocessing``, ``pyspark`` or ``ray``: img2dataset's own.

    Raises:
        ValueError: bad settings, a source without the columns needed or that cannot be read or
            downloaded, or a folder that holds another fetch.
    """
    numbers = {"limit": limit, "rate": rate, "timeout": timeout, "deadline": deadline,
               "max_bytes": max_bytes, "image_size": image_size, "shard_rows": shard_rows,
               "processes": processes, "threads": threads}
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    if retries < 0:
        raise ValueError(f"retries must be at least 0, got {retries}")
    if distributor not in ("multiprocessing", "pyspark", "ray"):
        raise ValueError(f"distributor must be multiprocessing, pyspark or ray: {distributor!r}")
    require("img2dataset", "minidiffuser[fetch]")
    if distributor != "multiprocessing":
        require(distributor, distributor)
    out = Path(out)
    what = {"source": str(source), "limit": limit, "subset": subset, "without": sorted(without),
            "shard_rows": shard_rows, "image_size": image_size}
    prepare(what, out)
    settings = {
        **what, "folder": str(out.resolve()), "processes": processes, "threads": threads,
        "retries": retries, "distributor": distributor,
        "columns": json.loads((out / "fetch.json").read_text())["columns"],
        "limits": {"timeout": timeout, "deadline": deadline, "max_bytes": max_bytes, "rate": rate,
                   "allow_hosts": list(allow_hosts)},
    }
    if count(out).unfinished:
        run(settings, out, progress)
    report = count(out)
    (out / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    return report


def require(library: str, package: str) -> None:
    """Raise ValueError, naming what to install, where a library is missing."""
    from importlib.util import find_spec

    if find_spec(library) is None:
        raise ValueError(f"this fetch needs {library}: pip install '{package}'")


# ---- the rows asked for --------------------------------------------------------------------------


def prepare(what: dict[str, Any], out: Path) -> None:
    """Filter the source into ``input/`` and write ``fetch.json``; once per folder.

    Raises:
        ValueError: the folder belongs to a fetch of something else.
    """
    record = out / "fetch.json"
    if record.is_file():
        before = json.loads(record.read_text())
        differs = [f"{key} was {before[key]!r} and is {now!r}" for key, now in what.items()
                   if before[key] != now]
        if differs:
            raise ValueError(f"{out} holds another fetch ({'; '.join(differs)}): choose another "
                             "folder, or the settings it was begun with")
        return
    table = open_source(what["source"])
    steps = filters.subset_steps(what["subset"], what["without"])
    names = filters.columns_needed(table, ("URL", "TEXT"), what["source"])
    kept, report = filters.apply(table, steps)
    if what["limit"]:
        kept = kept.take(what["limit"])
    with explained(out):
        (out / "input").mkdir(parents=True, exist_ok=True)
        columns, rows = write_input(kept, names, out / "input")
        draft = out / ".fetch.writing"
        draft.write_text(json.dumps({**what, "rows": rows, "columns": columns,
                                     "filtered": report.to_dict()}, indent=1) + "\n")
        draft.replace(record)


def open_source(source: str) -> "datasets.IterableDataset":
    """A stream of a source's rows: parquet here, or a dataset of the hub.

    Raises:
        ValueError: there is nothing of that name, or it cannot be read.
    """
    import datasets

    path = Path(source)
    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path] * path.is_file()
    if not files and (path.exists() or source.startswith((".", "/"))):
        raise ValueError(f"there is no parquet file at {source}")
    try:
        if files:
            return datasets.load_dataset("parquet", data_files=[str(f) for f in files],
                                         split="train", streaming=True)
        table = datasets.load_dataset(source, split="train", streaming=True)
        return table if table.column_names else table._resolve_features()
    except Exception as error:  # the library raises many kinds, above all where there is no network
        if files:
            raise ValueError(f"{source} is not readable as parquet: {first_line(error)}") from None
        raise ValueError(f"{source!r} is not a parquet file, a folder of them, or a dataset that "
                         "can be read from the Hugging Face hub now; offline, download its parquet "
                         f"files elsewhere and give their folder ({first_line(error)})") from None


def write_input(
    table: "datasets.IterableDataset", names: dict[str, str], folder: Path
) -> tuple[list[str], int]:
    """Write rows under LAION's names, in files of ``PART_ROWS``; the extra columns, and how many.

    Each row gets a number, ``row``, by which it can be accounted for.
    """
    import pyarrow as pa
    from pyarrow import parquet

    for left in folder.glob("*.parquet"):  # of a run that was killed here and asked for more
        left.unlink()
    canonical = {own: name for name, own in names.items() if name != "image"}
    left_out = TAKEN | {names.get("image")}
    writer, rows, part, schema = None, 0, 0, None
    batches = table.with_format("arrow").iter(batch_size=1000)
    try:
        for batch in batches:
            batch = batch.rename_columns([canonical.get(c, c) for c in batch.column_names])
            batch = batch.select([c for c in batch.column_names if c not in left_out])
            batch = batch.append_column("row", pa.array(range(rows, rows + len(batch))))
            if writer is None:
                schema = schema or batch.schema
                writer = parquet.ParquetWriter(folder / f"{part:05d}.parquet", schema)
            writer.write_table(batch.cast(schema))
            rows += len(batch)
            if rows >= (part + 1) * PART_ROWS:
                writer.close()
                writer, part = None, part + 1
    finally:
        if writer:
            writer.close()
    if rows == 0:
        raise ValueError("no row is left to fetch after the filters; "
                         "`data filter` says why, and --without NAME leaves one out")
    return [c for c in schema.names if c not in ("URL", "TEXT")], rows


# ---- running -------------------------------------------------------------------------------------


def run(settings: dict[str, Any], out: Path, progress: bool = False) -> None:
    """Run img2dataset in a process of its own until its shards are done."""
    from tqdm.auto import tqdm

    drop_half_written(out)
    file = out / ".run.json"
    file.write_text(json.dumps(settings))
    # Its own session, so that it and its workers can be ended together.
    with (out / "img2dataset.log").open("a") as talk:
        child = subprocess.Popen([sys.executable, "-m", "minidiffuser.data.download", str(file)],
                                 stdout=talk, stderr=talk, start_new_session=True)
    shards = -(-json.loads((out / "fetch.json").read_text())["rows"] // settings["shard_rows"])
    bar = tqdm(total=shards, unit="shard", disable=not progress)
    try:
        while True:
            bar.update(len(finished(out)) - bar.n)
            try:
                code = child.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                continue
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    finally:
        bar.close()
        file.unlink(missing_ok=True)
    if code:
        tail = "\n".join((out / "img2dataset.log").read_text(errors="replace").splitlines()[-3:])
        raise ValueError(f"img2dataset stopped with code {code}; the end of {out}/img2dataset.log: "
                         f"{tail}")


def finished(out: Path) -> list[str]:
    """Numbers of the shards that are whole: img2dataset writes their statistics last."""
    return sorted(f.name.partition("_")[0] for f in (out / "shards").glob("*_stats.json"))


def drop_half_written(out: Path) -> None:
    """Remove what a killed run left: shards without statistics, or that cannot be read."""
    from pyarrow import parquet

    done = set(finished(out))
    for file in (out / "shards").glob("*.parquet"):
        whole = file.stem in done
        try:
            whole = whole and parquet.ParquetFile(file).metadata.num_rows > 0
        except (OSError, ValueError):
            whole = False
        if not whole:
            file.unlink()
            (out / "shards" / f"{file.stem}_stats.json").unlink(missing_ok=True)
            log.info("%s was half written and is fetched again", file)


def count(out: Path) -> FetchReport:
    """Add up what the finished shards say of their rows."""
    from pyarrow import parquet

    record = json.loads((out / "fetch.json").read_text())
    report = FetchReport(record["rows"], filtered=record["filtered"])
    for name in finished(out):
        file = out / "shards" / f"{name}.parquet"
        try:
            table = parquet.read_table(file, columns=["status", "error_message"])
        except (OSError, ValueError):
            continue  # it counts as unfinished
        for row in table.to_pylist():
            if row["status"] == "success":
                report.fetched += 1
            else:
                report.reasons[row["error_message"]] += 1
    return report


# ---- reading back --------------------------------------------------------------------------------


def read_shards(folder: str | os.PathLike) -> "datasets.Dataset":
    """The images that were fetched, as a table in LAION's schema.

    ``WIDTH`` and ``HEIGHT`` are those of the file that came, whatever the source said; ``image`` is
    a JPEG; ``sha256`` is of the file as it came.

    Raises:
        ValueError: the folder holds no fetch, nothing was fetched, or a shard is damaged.
    """
    import datasets
    import pyarrow as pa

    if not (Path(folder) / "fetch.json").is_file():
        raise ValueError(f"{folder} holds no fetch: `python -m minidiffuser data fetch SOURCE "
                         f"--out {folder}` makes one")
    parts = [shard_table(folder, name) for name in finished(Path(folder))]
    if not sum(len(p) for p in parts):
        raise ValueError(f"{folder} holds no image: {folder}/report.json says why")
    table = datasets.Dataset(pa.concat_tables(parts, promote_options="default"))
    return table.cast_column("image", datasets.Image())


def shard_table(folder: str | os.PathLike, name: str) -> "pa.Table":
    """The same of one shard: what is larger than memory is read one by one."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import parquet

    file = Path(folder) / "shards" / f"{name}.parquet"
    try:
        table = parquet.read_table(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"the shard {file} is damaged ({error}): run the same fetch again"
                         ) from None
    table = table.filter(pc.equal(table["status"], "success")).sort_by("row")
    names = pa.array([f"{key}.jpg" for key in table["key"].to_pylist()], pa.string())
    image = pa.StructArray.from_arrays([table["jpg"].combine_chunks(), names], ["bytes", "path"])
    columns = {"URL": table["url"], "TEXT": table["caption"],
               "WIDTH": table["original_width"], "HEIGHT": table["original_height"]}
    extra = {c: table[c] for c in table.column_names if c not in TAKEN and c not in columns}
    return pa.table({**columns, **extra, "sha256": table["sha256"], "image": image})
