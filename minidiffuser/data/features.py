"""Features: a table encoded once, as latents on disk, so that training reads and never encodes.

    encode("runs/laion", "runs/features", cfg)        # images and captions -> shards of latents
    python -m minidiffuser train emoji --data runs/features

A shard is one safetensors file of latents and one parquet file of the same rows' URL and TEXT, so
that a row can be traced and taken out; beside them stands a small JSON with their hashes, how many
rows there are, and why others were left out.  A killed run continues with what is not there yet,
several processes divide the shards among them, and the bytes on disk are the same however often it
was stopped and however many took part: a shard depends on its own rows and the codecs alone.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints import fingerprint
from ..errors import explained
from . import filters
from .tables import find_table, load_table

if TYPE_CHECKING:
    import datasets
    import torch
    from accelerate import PartialState
    from PIL import Image
    from torch import Tensor

    from ..config import Config

log = logging.getLogger(__name__)

# The settings that decide what a latent is: features are for runs that agree in all of them.
DECIDES = ("image_codec", "image_size", "pca_dim", "caption_codec", "caption_codes",
           "caption_length", "caption_dim")
BATCH = 64           # rows encoded at once; fixed, since a batch may change the last bits
FIT_ROWS = 100_000   # rows whose captions codecs are fitted to
FIT_BYTES = 2**28    # of pixels that they are fitted to: fitting takes about 20 times as much
PATIENCE = timedelta(days=7)  # how long a process that is done waits for the slowest


@dataclass
class EncodeReport:
    """Rows read and written, and why the others were left out."""

    read: int = 0
    written: int = 0
    reasons: Counter = field(default_factory=Counter)
    shards: int = 0

    def __str__(self) -> str:
        lines = [f"{self.read:10,d} rows read",
                 f"{self.written:10,d} written to {self.shards:,} shards"]
        return "\n".join(lines + [f"{n:10,d} {why}" for why, n in self.reasons.most_common()])


# ---- where rows come from ------------------------------------------------------------------------


def source_files(source: str | os.PathLike) -> list[Path]:
    """The parquet files that a source's rows are in, in order.

    A fetch has its finished shards; a table, by name or folder, its ``train.parquet``; any other
    folder, such as img2dataset's output, all it holds.
    """
    from .fetch import finished

    folder = Path(source)
    if (folder / "fetch.json").is_file():
        return [folder / "shards" / f"{name}.parquet" for name in finished(folder)]
    files = sorted(folder.glob("*.parquet"))
    if not files or folder / "train.parquet" in files:
        return [find_table(source, "train")]
    return files


def source_shards(
    source: str | os.PathLike, shard_rows: int, steps: str = ""
) -> list[Callable[[], "datasets.Dataset"]]:
    """A table in pieces that are read one at a time: its own shards, where it has them, or by rows.

    Args:
        steps: filters, for a table only: see ``filters.parse_all``.

    Raises:
        ValueError: filters for what is read shard by shard and never as a whole.
    """
    files = source_files(source)
    if (fetched := (Path(source) / "fetch.json").is_file()) or files[0].stem != "train":
        if steps:
            raise ValueError(f"{source} is read shard by shard, and filters see a whole table: run "
                             f"`data filter {source} --out CLEAN` and encode that, or give "
                             "--filters \"\"")
        return [lambda file=file: read_file(file, fetched) for file in files]
    table, report = filters.apply(load_table(source), filters.parse_all(steps))
    log.info("%s", report)
    table = canonical(table, source)
    return [lambda i=i: table.select(range(i, min(i + shard_rows, len(table))))
            for i in range(0, len(table), shard_rows)]


def read_file(file: Path, fetched: bool) -> "datasets.Dataset":
    """The rows of one parquet file; of a fetch, those that came."""
    import datasets
    from pyarrow import parquet

    from .fetch import shard_table

    if fetched:
        return canonical(datasets.Dataset(shard_table(file.parents[1], file.stem)), file)
    try:
        return canonical(datasets.Dataset(parquet.read_table(file)), file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be encoded: {error}") from None


def canonical(table: "datasets.Dataset", where: str | os.PathLike) -> "datasets.Dataset":
    """The columns image (as bytes), TEXT and URL, whatever the table calls them.

    Raises:
        ValueError: it has no image or no caption; a URL it may lack.
    """
    names = filters.columns_needed(table, ("image", "TEXT"), where)
    table = filters.raw_images(table, names)
    own = {names[name]: name for name in ("image", "TEXT", "URL") if name in names}
    return table.select_columns(list(own)).rename_columns(own)


def fit_codecs(cfg: "Config", shards: list[Callable[[], "datasets.Dataset"]]) -> dict[str, Any]:
    """Fit a configuration's codecs to the first usable rows.

    To ``FIT_ROWS`` captions and as many images as ``FIT_BYTES`` hold, which is more than a linear
    codec needs: the table need not fit in memory, and its words are what must not be missed.
    """
    from ..codecs.captions import END, words_of
    from ..images import to_uint8
    from ..pipeline import make_codecs

    if len(cfg.pretrained_codecs()) == 2:
        return make_codecs(cfg)  # nothing is fitted
    most = max(1, FIT_BYTES // (3 * cfg.image_size**2))
    pixels, captions = [], []
    for shard in shards:
        for row in shard():
            image, words = open_image(row["image"]), words_of(row["TEXT"] or "")
            usable = 0 < len(words) <= cfg.caption_length and END not in words
            if image is not None and usable:
                pixels += [to_uint8([image], cfg.image_size)[0]] * (len(pixels) < most)
                captions.append(row["TEXT"])
        if len(captions) >= FIT_ROWS:
            break
    if not captions:
        raise ValueError("no row has an image that can be read and a caption that is short enough")
    return make_codecs(cfg, np.stack(pixels), captions)


# ---- encoding ------------------------------------------------------------------------------------


def encode(
    source: str | os.PathLike,
    out: str | os.PathLike,
    cfg: "Config",
    *,
    codecs: dict[str, Any] | None = None,
    shard_rows: int = 1000,
    progress: bool = False,
) -> EncodeReport:
    """Encode a table's images and captions into ``out``. Run it again to continue.

    Args:
        source: a table by name or folder, a folder of `data fetch`, or one of any parquet files
            with images and captions.
        cfg: whose codecs to use, and their settings.
        codecs: fitted ones, by part; by default they are fitted here, or read from ``out``.
        shard_rows: rows of a shard, where the source has no shards of its own.

    Under ``accelerate launch`` each process takes its share of the shards.

    Raises:
        ValueError: the source cannot be read, has no usable row, or ``out`` holds features of
            another source, other settings or other codecs.
    """
    from tqdm.auto import tqdm

    out, state = Path(out), processes()
    shards = source_shards(source, shard_rows, cfg.filters)
    begun = {"source": str(source), "files": _digest_of_files(source_files(source)),
             "shards": len(shards), "filters": cfg.filters,
             "config": {key: getattr(cfg, key) for key in DECIDES}}
    if state.is_main_process:
        begin(out, begun, cfg, codecs, shards)
    state.wait_for_everyone()
    codecs = load_codecs(out, cfg.pretrained)
    for codec in codecs.values():
        codec.to(state.device)
    mine = range(state.process_index, len(shards), state.num_processes)
    for number in tqdm(mine, unit="shard", disable=not (progress and state.is_main_process)):
        if read_shard_record(out, number, check=True) is None:
            write_shard(out, number, shards[number](), codecs)
    state.wait_for_everyone()
    if state.is_main_process:
        write_index(out)
    state.wait_for_everyone()
    return report_of(read_index(out))


def processes() -> "PartialState":
    """Which process this is, of how many."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # On a CPU every process is the only one unless it is told that there is nothing else.  Some
    # finish hours before others, and a barrier gives up after minutes by default.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=PATIENCE)


def begin(out: Path, begun: dict, cfg: "Config", codecs: dict | None, shards: list) -> None:
    """Write the codecs and what the features are of; refuse a folder of other features."""
    from ..pipeline import codec_states

    record = out / "begun.json"
    if record.is_file():
        before = json.loads(record.read_text())
        if codecs:
            begun = {**begun, "codecs": _digest(*_codec_bytes(*codec_states(codecs)))}
        hashed = {"files": "the source has changed", "codecs": "the codecs are not those given"}
        differs = [hashed.get(k, f"{k} was {before.get(k)!r} and is {begun[k]!r}") for k in begun
                   if before.get(k) != begun[k]]
        if differs:
            raise ValueError(f"{out} holds other features ({'; '.join(differs)}): choose another "
                             "folder")
        for left in out.glob(".*.writing_*"):  # what a killed run was in the middle of
            left.unlink()
        return
    kinds, tensors = _codec_bytes(*codec_states(codecs or fit_codecs(cfg, shards)))
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        _write_whole(out / "codecs.safetensors", tensors)
        _write_whole(out / "codecs.json", kinds)
        begun = {**begun, "codecs": _digest(kinds, tensors)}
        _write_whole(record, json.dumps(begun, indent=1))  # last: what is begun has its codecs


def load_codecs(out: str | os.PathLike, pretrained: str) -> dict[str, Any]:
    """The codecs of a features folder, by modality.

    Args:
        pretrained: where the weights of pretrained ones are: ``Config.pretrained``.

    Raises:
        ValueError: they are damaged, or not those that the features were encoded with.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from ..pipeline import stored_codecs

    out = Path(out)
    try:
        kinds = (out / "codecs.json").read_bytes()
        tensors = (out / "codecs.safetensors").read_bytes()
        if _digest(kinds, tensors) != json.loads((out / "begun.json").read_text())["codecs"]:
            raise ValueError("they are not those that encoded it")
        return stored_codecs(json.loads(kinds), load(tensors), pretrained)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the codecs in {out} are damaged or missing: {error}") from None


def _codec_bytes(kinds: dict[str, Any], tensors: dict[str, "Tensor"]) -> tuple[bytes, bytes]:
    from safetensors.torch import save

    return json.dumps(kinds, ensure_ascii=False).encode(), save(tensors)


def write_shard(out: Path, number: int, rows: "datasets.Dataset", codecs: dict[str, Any]) -> None:
    """Encode one shard: its files, then its record; each is whole or not there."""
    import pyarrow as pa
    from pyarrow import parquet
    from safetensors.torch import save

    tensors, kept, reasons = encode_rows(rows, codecs)
    latents, table = (out / f"{_name(number)}{end}" for end in (".safetensors", ".parquet"))
    sink = pa.BufferOutputStream()
    strings = {"URL": pa.string(), "TEXT": pa.string()}
    parquet.write_table(pa.table({key: pa.array([row.get(key) for row in kept], kind)
                                  for key, kind in strings.items()}), sink)
    with explained(out):
        _write_whole(latents, save(tensors))
        _write_whole(table, sink.getvalue().to_pybytes())
        record = {"rows": len(kept), "read": len(rows), "reasons": dict(sorted(reasons.items())),
                  "files": {file.name: fingerprint(file) for file in (latents, table)}}
        _write_whole(out / f"{_name(number)}.json", json.dumps(record, indent=1))


def encode_rows(
    rows: "datasets.Dataset", codecs: dict[str, Any]
) -> tuple[dict[str, "Tensor"], list[dict[str, Any]], Counter]:
    """What is kept of a shard, its rows (without images), and why others were left out.

    Tensors are called ``modality.name``.  Without a word from their codec they are latents in
    float16: of pixels a rounding below half of what 8 bits distinguish.
    """
    import torch

    batches, kept, images, reasons = [], [], [], Counter()
    for row in rows:
        image = open_image(row.pop("image"))
        why = "not a readable image" if image is None else why_not(codecs["text"], row["TEXT"])
        if why:
            reasons[why] += 1
            continue
        kept.append(row)
        images.append(image)
        if len(images) == BATCH:  # no more originals than that are held at once
            batches.append(to_disk("image", codecs, images))
            images = []
    if images:
        batches.append(to_disk("image", codecs, images))
    if not kept:
        return {}, kept, reasons
    captions = [row["TEXT"] for row in kept]
    starts = range(0, len(captions), BATCH)
    texts = [to_disk("text", codecs, captions[i : i + BATCH]) for i in starts]
    return {name: torch.cat([batch[name] for batch in of]).contiguous()
            for of in (batches, texts) for name in of[0]}, kept, reasons


def to_disk(name: str, codecs: dict[str, Any], items: Sequence[Any]) -> dict[str, "Tensor"]:
    """What is kept of items of a modality; floats in float16."""
    return {f"{name}.{k}": v.half() if v.is_floating_point() else v
            for k, v in codecs[name].to_disk(items).items()}


def from_disk(
    stored: dict[str, "Tensor"], codecs: dict[str, Any],
    generators: "Sequence[torch.Generator] | None" = None,
) -> dict[str, "Tensor"]:
    """Latents by part, float32: the inverse of :func:`to_disk`.

    Args:
        stored: tensors by ``modality.name``, as read.
        generators: one for each row, where an encoder's distribution is drawn from.
    """
    latents = {}
    for name, codec in codecs.items():
        own = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
        latents.update(codec.from_disk(name, own, generators))
    return latents


def open_image(value: Any) -> "Image.Image | None":
    """An image cell as RGB; None where it cannot be read, whatever its decoder makes of it."""
    try:
        return filters.open_image(value)
    except Exception as error:  # Pillow's decoders raise many kinds: of AVIF, RuntimeError
        log.info("an image was left out: %r", error)
        return None


def why_not(codec: Any, caption: str | None) -> str | None:
    """Why a caption cannot be encoded, in few words; None where it can."""
    if not (caption or "").split():
        return "no caption"
    return codec.refuses(caption)


def read_shard_record(out: Path, number: int, check: bool = False) -> dict[str, Any] | None:
    """What is known of a shard; None where it is missing or not whole.

    Args:
        check: compare hashes too, and not only sizes.
    """
    try:
        record = json.loads((out / f"{_name(number)}.json").read_text())
        for name, expected in record["files"].items():
            if (out / name).stat().st_size != expected["bytes"]:
                return None
            if check and fingerprint(out / name) != expected:
                return None
    except (OSError, ValueError, KeyError):
        return None
    return record


def write_index(out: Path) -> None:
    """Write index.json, which makes the folder one that training reads."""
    begun = json.loads((out / "begun.json").read_text())
    records = [read_shard_record(out, i) for i in range(begun["shards"])]
    missing = [i for i, record in enumerate(records) if record is None]
    if missing:
        raise ValueError(f"{len(missing)} of {begun['shards']} shards in {out} are not written "
                         "(another process stopped): run the same command again")
    with explained(out):
        _write_whole(out / "index.json", json.dumps({**begun, "shards": records}, indent=1))


def _name(number: int) -> str:
    return f"shard_{number:05d}"


def _write_whole(path: Path, content: str | bytes) -> None:
    draft = path.with_name(f".{path.name}.writing_{os.getpid()}")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    draft.replace(path)


def _digest(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(c).digest() for c in contents)).hexdigest()


def _digest_of_files(files: Sequence[Path]) -> str:
    """Of names and sizes, which is enough to notice a source that has changed since."""
    return _digest(*(f"{f.name} {f.stat().st_size}".encode() for f in files))


# ---- reading the folder --------------------------------------------------------------------------


def is_features(folder: str | os.PathLike) -> bool:
    """Whether a folder holds features, finished or not."""
    return (Path(folder) / "begun.json").is_file()


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """Source, settings and shards of a features folder.

    Raises:
        ValueError: it was not encoded to the end.
    """
    try:
        return json.loads((Path(folder) / "index.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"the features in {folder} are not complete: run the same `data encode` "
                         "again") from None


def identity(folder: str | os.PathLike) -> str:
    """A hash of the features' rows, their order and codecs: what a step's position refers to."""
    return hashlib.sha256((Path(folder) / "index.json").read_bytes()).hexdigest()


def report_of(index: dict[str, Any]) -> EncodeReport:
    """Add up what an index says of its shards."""
    shards = index["shards"]
    reasons = sum((Counter(s["reasons"]) for s in shards), Counter())
    return EncodeReport(sum(s["read"] for s in shards), sum(s["rows"] for s in shards), reasons,
                        len(shards))


def check_fits(folder: str | os.PathLike, cfg: "Config") -> None:
    """Refuse features that were made with other settings. Raises ValueError saying which.

    A run without filters takes the features' rows as they are, whatever cleaned them.
    """
    index = read_index(folder)
    theirs = index["config"]
    if cfg.filters and cfg.filters != index["filters"]:
        raise ValueError(f"the features in {folder} were made with filters={index['filters']!r}, "
                         f"and not with {cfg.filters!r}: encode again, or train with "
                         "--filters \"\", which takes them as they are")
    differs = [f"{key} is {theirs[key]!r} there and {getattr(cfg, key)!r} here" for key in DECIDES
               if theirs[key] != getattr(cfg, key)]
    if differs:
        raise ValueError(f"the features in {folder} do not fit this run ({'; '.join(differs)}): "
                         "encode again, or train with their settings")
