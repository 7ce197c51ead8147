"""Features: a table encoded once, as latents on disk, so that training reads and never encodes.

    encode("runs/laion", "runs/features", cfg)        # images and captions -> shards of latents
    python -m minidiffuser train emoji --data runs/features

A shard is one safetensors file; beside it stands a small JSON with its rows, its hash, and why rows
were left out.  A killed run continues with what is not there yet, several processes divide the
shards among them, and the bytes on disk are the same however often it was stopped and however many
took part: a shard depends on its own rows and the codecs alone.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import explained
from . import filters
from .tables import load_table

if TYPE_CHECKING:
    import datasets
    from torch import Tensor

    from ..config import Config

log = logging.getLogger(__name__)

# The settings that decide what a latent is: features are for runs that agree in all of them.
DECIDES = ("image_codec", "image_size", "pca_dim", "caption_codec", "caption_codes",
           "caption_length", "caption_dim")
BATCH = 64           # rows encoded at once; fixed, since a batch may change the last bits
FIT_ROWS = 100_000   # rows that codecs are fitted to


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


def source_shards(
    source: str | os.PathLike, shard_rows: int, steps: str = ""
) -> list[Callable[[], "datasets.Dataset"]]:
    """A table in pieces that are read one at a time: of a fetch its own shards, else by rows.

    Args:
        steps: filters, for a table only: see ``filters.parse_all``.

    Raises:
        ValueError: filters for a fetch, which is read shard by shard and never as a whole.
    """
    import datasets

    from .fetch import finished, shard_table

    if (Path(source) / "fetch.json").is_file():
        if steps:
            raise ValueError(f"{source} is read shard by shard, and filters see a whole table: run "
                             f"`data filter {source} --out CLEAN` and encode that, or give "
                             "--filters \"\"")

        def read(name: str) -> datasets.Dataset:
            return datasets.Dataset(shard_table(source, name))

        return [lambda name=name: read(name) for name in finished(Path(source))]
    table, report = filters.apply(load_table(source), filters.parse_all(steps))
    log.info("%s", report)
    table = filters.raw_images(table, {"image": "image"})
    return [lambda i=i: table.select(range(i, min(i + shard_rows, len(table))))
            for i in range(0, len(table), shard_rows)]


def fit_codecs(cfg: "Config", shards: list[Callable[[], "datasets.Dataset"]]) -> dict[str, Any]:
    """Fit a configuration's codecs to the first ``FIT_ROWS`` usable rows."""
    from ..codecs.captions import words_of
    from ..images import to_uint8
    from ..pipeline import make_codecs

    pixels, captions = [], []
    for shard in shards:
        for row in shard():
            image = filters.open_image(row["image"])
            if image is not None and 0 < len(words_of(row["TEXT"] or "")) <= cfg.caption_length:
                pixels.append(to_uint8([image], cfg.image_size)[0])
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
        source: a table by name or folder, or a folder of `data fetch`.
        cfg: whose codecs to use, and their settings.
        codecs: fitted ones, by part; by default they are fitted here, or read from ``out``.
        shard_rows: rows of a shard, where the source has no shards of its own.

    Under ``accelerate launch`` each process takes its share of the shards.

    Raises:
        ValueError: the source cannot be read, has no usable row, or ``out`` holds other features.
    """
    from accelerate import PartialState
    from tqdm.auto import tqdm

    out, state = Path(out), PartialState()
    shards = source_shards(source, shard_rows, cfg.filters)
    begun = {"source": str(source), "shards": len(shards), "filters": cfg.filters,
             "config": {key: getattr(cfg, key) for key in DECIDES}}
    if state.is_main_process:
        begin(out, begun, cfg, codecs, shards)
    state.wait_for_everyone()
    codecs = load_codecs(out)
    mine = range(state.process_index, len(shards), state.num_processes)
    for number in tqdm(mine, unit="shard", disable=not (progress and state.is_main_process)):
        if read_shard_record(out, number) is None:
            write_shard(out, number, shards[number](), codecs)
    state.wait_for_everyone()
    if state.is_main_process:
        write_index(out, begun)
    state.wait_for_everyone()
    return report_of(read_index(out))


def begin(out: Path, begun: dict, cfg: "Config", codecs: dict | None, shards: list) -> None:
    """Write the codecs and what the features are of; refuse a folder of other features."""
    record = out / "begun.json"
    if record.is_file():
        before = json.loads(record.read_text())
        differs = [f"{k} was {before[k]!r} and is {begun[k]!r}" for k in begun
                   if before[k] != begun[k]]
        if differs:
            raise ValueError(f"{out} holds other features ({'; '.join(differs)}): choose another "
                             "folder")
        return
    from safetensors.torch import save_file

    from ..pipeline import codec_states

    kinds, tensors = codec_states(codecs or fit_codecs(cfg, shards))
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "codecs.safetensors")
        (out / "codecs.json").write_text(json.dumps(kinds, ensure_ascii=False))
        _write_whole(record, json.dumps(begun, indent=1))  # last: what is begun has its codecs


def load_codecs(out: str | os.PathLike) -> dict[str, Any]:
    """The codecs of a features folder, by part. Raises ValueError where they are damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..pipeline import stored_codecs

    try:
        return stored_codecs(json.loads((Path(out) / "codecs.json").read_text()),
                             load_file(Path(out) / "codecs.safetensors"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the codecs in {out} are damaged or missing: {error}") from None


def write_shard(out: Path, number: int, rows: "datasets.Dataset", codecs: dict[str, Any]) -> None:
    """Encode one shard: the file, then its record; either is whole or not there."""
    from safetensors.torch import save

    tensors, reasons = encode_rows(rows, codecs)
    data = save(tensors) if tensors else b""
    name = f"shard_{number:05d}"
    record = {"rows": len(rows) - reasons.total(), "read": len(rows),
              "reasons": dict(sorted(reasons.items())), "bytes": len(data),
              "sha256": hashlib.sha256(data).hexdigest()}
    with explained(out):
        _write_whole(out / f"{name}.safetensors", data)
        _write_whole(out / f"{name}.json", json.dumps(record, indent=1))


def encode_rows(
    rows: "datasets.Dataset", codecs: dict[str, Any]
) -> tuple[dict[str, "Tensor"], Counter]:
    """Latents by part: images in float16, captions as word ids where the codec has them."""
    import torch

    images, captions, reasons = [], [], Counter()
    for row in rows:
        image = filters.open_image(row["image"])
        why = "not a readable image" if image is None else why_not(codecs["text"], row["TEXT"])
        if why:
            reasons[why] += 1
        else:
            images.append(image)
            captions.append(row["TEXT"])
    if not images:
        return {}, reasons
    batches = range(0, len(images), BATCH)
    z = torch.cat([codecs["image"].encode(images[i : i + BATCH]).half() for i in batches])
    z = z.contiguous()
    text = codecs["text"]
    if hasattr(text, "encode_ids"):  # exact, and smaller by far than the codes they stand for
        return {"image": z, "text_ids": text.encode_ids(captions).int()}, reasons
    latents = [text.encode(captions[i : i + BATCH]).half() for i in batches]
    return {"image": z, "text": torch.cat(latents).contiguous()}, reasons


def why_not(codec: Any, caption: str | None) -> str | None:
    """Why a caption cannot be encoded, in few words; None where it can."""
    if not (caption or "").split():
        return "no caption"
    return codec.refuses(caption) if hasattr(codec, "refuses") else None


def read_shard_record(out: Path, number: int) -> dict[str, Any] | None:
    """What is known of a shard; None where it is missing or not whole."""
    try:
        record = json.loads((out / f"shard_{number:05d}.json").read_text())
        size = (out / f"shard_{number:05d}.safetensors").stat().st_size
    except (OSError, ValueError):
        return None
    return record if size == record["bytes"] else None


def write_index(out: Path, begun: dict[str, Any]) -> None:
    """Write index.json, which makes the folder one that training reads."""
    records = [read_shard_record(out, i) for i in range(begun["shards"])]
    missing = [i for i, record in enumerate(records) if record is None]
    if missing:
        raise ValueError(f"{len(missing)} of {begun['shards']} shards in {out} are not written "
                         "(another process stopped): run the same command again")
    with explained(out):
        _write_whole(out / "index.json", json.dumps({**begun, "shards": records}, indent=1))


def _write_whole(path: Path, content: str | bytes) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content.encode() if isinstance(content, str) else content)
    draft.replace(path)


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


def report_of(index: dict[str, Any]) -> EncodeReport:
    """Add up what an index says of its shards."""
    shards = index["shards"]
    reasons = sum((Counter(s["reasons"]) for s in shards), Counter())
    return EncodeReport(sum(s["read"] for s in shards), sum(s["rows"] for s in shards), reasons,
                        len(shards))


def check_fits(folder: str | os.PathLike, cfg: "Config") -> None:
    """Refuse features that were made with other settings. Raises ValueError saying which."""
    theirs = read_index(folder)["config"]
    differs = [f"{key} is {theirs[key]!r} there and {getattr(cfg, key)!r} here" for key in DECIDES
               if theirs[key] != getattr(cfg, key)]
    if differs:
        raise ValueError(f"the features in {folder} do not fit this run ({'; '.join(differs)}): "
                         "encode again, or train with their settings")
