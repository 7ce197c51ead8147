"""Finding and reading tables: a shipped one by name, or a folder with parquet files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import explained, suggest

if TYPE_CHECKING:
    import datasets

LAION_COLUMNS = {
    "URL": "where the image came from; 'emoji:' and code points, 'openclipart:' and a path",
    "TEXT": "the caption",
    "WIDTH": "pixels", "HEIGHT": "pixels",
    "LANGUAGE": "ISO 639-1 code of TEXT, or 'nolang' where none is certain",
    "similarity": "cosine of the CLIP embeddings of image and text; null where nobody measured it",
    "pwatermark": "probability of a watermark, 0 to 1",
    "punsafe": "probability that the image is unsafe, 0 to 1",
}

EXTRA_COLUMNS = {
    "image": "encoded bytes and a file name, as `datasets.Image` reads them",
    "captions": "the same caption by language: en, zh, ar, de, es, fr, hi, ja (emoji only)",
    "description": "what else the uploader wrote (clipart only)",
    "keywords": "the uploader's keywords, a list (clipart only)",
    "author": "who drew it (clipart only)",
}


def shipped_folders() -> list[Path]:
    """Where tables are looked for by name: beside the package, and inside it when installed."""
    package = Path(__file__).resolve().parents[1]
    return [package.parent / "data", package / "_data"]


def shipped_tables() -> list[str]:
    """Names of the tables that come with the repository."""
    return sorted({f.parent.name for d in shipped_folders() for f in d.glob("*/train.parquet")})


def find_table(name: str | os.PathLike, split: str) -> Path:
    """The parquet file of a split. Raises ValueError where there is none."""
    for folder in (Path(name), *(d / str(name) for d in shipped_folders())):
        if (folder / f"{split}.parquet").is_file():
            return folder / f"{split}.parquet"
        splits = sorted(f.stem for f in folder.glob("*.parquet"))
        if splits:
            raise ValueError(f"{folder} has no split {split!r}.{suggest(split, splits)}")
    raise ValueError(f"there is no table {str(name)!r}: neither a shipped one nor a folder with "
                     f"{split}.parquet.{suggest(str(name), shipped_tables())}")


def table_folder(name: str | os.PathLike) -> Path:
    """The folder of a table, by name or path. Raises ValueError where it has no parquet file."""
    for folder in (Path(name), *(d / str(name) for d in shipped_folders())):
        if any(folder.glob("*.parquet")):
            return folder
    raise ValueError(f"there is no table {str(name)!r}: neither a shipped one nor a folder with "
                     f"parquet files.{suggest(str(name), shipped_tables())}")


def save_table(table: "datasets.Dataset", folder: str | os.PathLike, split: str) -> Path:
    """Write ``split.parquet``, whole or not at all; one that is there already is replaced.

    Raises:
        ValueError: the folder cannot be written; what was there is untouched.
    """
    import datasets

    folder = Path(folder)
    bars = datasets.utils.are_progress_bars_disabled()
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{split}.writing"
        datasets.disable_progress_bars()
        try:
            table.to_parquet(draft)
            draft.replace(folder / f"{split}.parquet")
        finally:
            draft.unlink(missing_ok=True)
            if not bars:
                datasets.enable_progress_bars()
    return folder / f"{split}.parquet"


def load_table(
    name: str | os.PathLike, split: str = "train", columns: Sequence[str] | None = None
) -> "datasets.Dataset":
    """A table by name or folder; works offline.

    Args:
        name: ``"emoji"``, ``"clipart"``, a folder that holds ``train.parquet`` and the like, or one
            that `data fetch` has written (all of which is ``train``).
        columns: which to read, all by default; ``row["image"]`` comes as a PIL image.

    Raises:
        ValueError: no such table, split or column, or a damaged file.
    """
    import datasets  # seconds to import, so only where it is used
    import pyarrow
    from pyarrow import parquet

    if (Path(name) / "fetch.json").is_file() and split == "train":
        from .fetch import read_shards

        table = read_shards(name)
        return table.select_columns(list(columns)) if columns else table
    path = find_table(name, split)
    try:
        present = parquet.read_schema(path).names
        missing = [c for c in columns or () if c not in present]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}.{suggest(missing[0], present)}")
        # Straight from the file: no copy in a cache folder, no progress bar.
        arrow = parquet.read_table(path, columns=list(columns) if columns else None)
        table = datasets.Dataset(arrow)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None
    if "image" in table.column_names:
        table = table.cast_column("image", datasets.Image())
    return table
