"""What training reads: a table in memory, or features on disk that need not fit there.

Both answer one question: ``batch(step, rank, world)``, the latents of a process's share of a batch.
The order is known from the seed and the step alone.  So the data position of a run is its step: a
checkpoint holds it, a resumed run neither repeats nor skips a row, and each process reads its own
rows without asking the others.
"""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import features

if TYPE_CHECKING:
    from ..config import Config

WINDOW = 16  # shards whose rows are shuffled among each other


class Order:
    """Which rows each batch holds: a new permutation every epoch, known from the seed alone.

    A process of several takes every ``world``-th place of each batch.
    """

    def __init__(self, rows: int, batch: int, seed: int):
        self.rows, self.batch, self.seed = rows, batch, seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Tensor:
        """Row numbers of a process's share of batch ``step`` (counted from 0)."""
        places = torch.arange(step * self.batch, (step + 1) * self.batch)[rank::world]
        return torch.stack([self._row(int(i)) for i in places])

    def _row(self, place: int) -> Tensor:
        epoch, i = divmod(place, self.rows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.rows, generator=generator)
        return self._permutation[i]


class ShardOrder:
    """The same for rows in shards: shards are shuffled, then rows within windows of shards.

    A window is read from beginning to end before the next one, so that no more than its shards are
    open, and each epoch still visits every row once in an order of its own.

    Args:
        sizes: rows of each shard. window: shards that are shuffled together.
    """

    def __init__(self, sizes: list[int], batch: int, seed: int, window: int = WINDOW):
        self.sizes, self.batch, self.seed, self.window = sizes, batch, seed, window
        self.rows = sum(sizes)
        self._at: tuple[int, int] = (-1, -1)  # epoch and window of the rows at hand
        self._epoch = -1

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> list[tuple[int, int]]:
        """(shard, row) of each place in a process's share of batch ``step``."""
        places = range(step * self.batch, (step + 1) * self.batch)[rank::world]
        return [self._row(place) for place in places]

    def _row(self, place: int) -> tuple[int, int]:
        epoch, i = divmod(place, self.rows)
        if epoch != self._epoch:
            self._deal(epoch)
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        if (epoch, number) != self._at:
            self._open(epoch, number)
        shard, row = self._shuffled[i - self._starts[number]]
        return int(shard), int(row)

    def _deal(self, epoch: int) -> None:
        """Shuffle the shards into the windows of an epoch."""
        self._epoch = epoch
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        self._windows = [order[i : i + self.window] for i in range(0, len(order), self.window)]
        rows = [sum(self.sizes[s] for s in shards) for shards in self._windows]
        self._starts = np.cumsum([0, *rows])[:-1]

    def _open(self, epoch: int, number: int) -> None:
        """Shuffle the rows of a window."""
        self._at = (epoch, number)
        pairs = np.concatenate([np.stack([np.full(self.sizes[s], s), np.arange(self.sizes[s])], 1)
                                for s in self._windows[number]])
        self._shuffled = np.random.default_rng([self.seed, epoch, number]).permutation(pairs)


class TableSource:
    """A table in memory: images as pixels, encoded batch by batch.

    Args:
        cfg: whose table and codecs.
    """

    def __init__(self, cfg: "Config"):
        from ..pipeline import make_codecs, training_arrays

        if slow := cfg.pretrained_codecs():
            raise ValueError(f"{' and '.join(slow)}: pretrained codecs are too slow to run at "
                             "every step. Encode the table once (python -m minidiffuser data "
                             f"encode {cfg.data} --out FEATURES, with this preset) and train with "
                             "--data FEATURES")
        self.images, self.captions = training_arrays(cfg)
        self.codecs = make_codecs(cfg, self.images, self.captions)
        self.ids = self.codecs["text"].encode_ids(self.captions)
        self.order = Order(len(self.ids), cfg.batch_size, cfg.seed)
        self.identity: str | None = None  # a table may be replaced by a better one

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """Latents by part, (B, *shape), of a process's share of a batch."""
        rows = self.order(step, rank, world)
        pixels = torch.from_numpy(self.images[rows.numpy()])
        return {"image": self.codecs["image"].encode_pixels(pixels),
                "text": self.codecs["text"].codes[self.ids[rows]]}

    def prompts(self, n: int) -> list[str]:
        """Captions from all over the table, to look at."""
        return self.captions[:: max(1, len(self.captions) // n)][:n]


class FeatureSource:
    """Features on disk, read row by row as they are needed.

    Only the rows of a process's own share are read (shards are memory-mapped), and no more than
    the shards of one window are open at a time.

    Args:
        cfg: ``cfg.data`` is the folder.

    Raises:
        ValueError: the features are not complete, or do not fit the configuration.
    """

    def __init__(self, cfg: "Config", window: int = WINDOW):
        features.check_fits(cfg.data, cfg)
        self.folder = Path(cfg.data)
        self.codecs: dict[str, Any] = features.load_codecs(self.folder, cfg.pretrained)
        self.draws = any(codec.random for codec in self.codecs.values())
        self.sizes = [s["rows"] for s in features.read_index(self.folder)["shards"]]
        self.identity: str | None = features.identity(self.folder)
        self.order = ShardOrder(self.sizes, cfg.batch_size, cfg.seed, window)
        if not self.order.rows:
            raise ValueError(f"the features in {self.folder} have no rows")
        self.open: OrderedDict[int, Callable] = OrderedDict()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> dict[str, Tensor]:
        """Latents by part, (B, *shape), of a process's share of a batch."""
        rows = [self.row(*where) for where in self.order(step, rank, world)]
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return features.from_disk(columns, self.codecs, self._generators(step, rank, world))

    def _generators(self, step: int, rank: int, world: int) -> list[torch.Generator] | None:
        """One for each row where encoders give distributions: of its place in the run alone."""
        if not self.draws:
            return None
        size = self.order.batch
        return [torch.Generator().manual_seed((self.order.seed * 1_000_003 + place) % 2**63)
                for place in range(step * size, (step + 1) * size)[rank::world]]

    def row(self, shard: int, row: int) -> dict[str, Tensor]:
        """One row as stored: tensors by ``modality.name``."""
        file = self._shard(shard)
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118

    def _shard(self, number: int):
        from safetensors import SafetensorError, safe_open

        if number not in self.open:
            path = self.folder / f"shard_{number:05d}.safetensors"
            while len(self.open) >= self.order.window:
                self.open.popitem(last=False)
            try:
                self.open[number] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} is damaged or missing ({error}): run the same `data "
                                 "encode` again") from None
        self.open.move_to_end(number)
        return self.open[number]

    def prompts(self, n: int) -> list[str]:
        """Captions of the first rows of as many shards, to look at."""
        full = [i for i, size in enumerate(self.sizes) if size]
        chosen = full[:: max(1, len(full) // n)][:n]
        captions = [self._captions(i, 1)[0] for i in chosen]
        return captions + self._captions(chosen[0], n)[1 : 1 + n - len(captions)]

    def _captions(self, shard: int, n: int) -> list[str]:
        """The first captions of a shard."""
        from pyarrow import parquet

        path = self.folder / f"shard_{shard:05d}.parquet"
        return parquet.read_table(path, columns=["TEXT"])["TEXT"][:n].to_pylist()


def open_source(cfg: "Config") -> TableSource | FeatureSource:
    """What a configuration's ``data`` names: a table, or a folder of features."""
    return FeatureSource(cfg) if features.is_features(cfg.data) else TableSource(cfg)


