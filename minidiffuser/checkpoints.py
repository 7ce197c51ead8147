"""Checkpoints that survive a power cut: written beside, checked, and renamed into place.

    runs/emoji/step_0000500/  model.safetensors  ema.safetensors  random.safetensors
                              state.pt (optimisers)  info.json (step, config, size and hash of each)

A folder without a readable ``info.json``, or whose files differ from it, is refused with a message
and the one before it is used.
"""

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import explained

log = logging.getLogger(__name__)

# May change when a run is continued: how long it is, what it reports, where in the timestep square
# it trains and where pretrained weights lie (codecs know their hash), but not what is trained.
FREE = {"steps", "cooldown", "log_every", "save_every", "sample_every", "keep",
        "square", "given", "ignored", "diagonal", "noise_bias", "favour_image", "pretrained"}


def shipped_folders() -> list[Path]:
    """Where models are looked for by name: beside the package, and inside it when installed."""
    here = Path(__file__).resolve().parent
    return [here.parent / "data" / "checkpoints", here / "_data" / "checkpoints"]


@dataclass
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    info: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.path / f"{name}.safetensors")

    def pickled(self) -> dict[str, Any]:
        return torch.load(self.path / "state.pt", weights_only=True)


def prepare_folder(folder: Path) -> None:
    """Make the folder and see that it can be written, before any work goes into it."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".writing_*"):  # what a killed run was in the middle of
            shutil.rmtree(left)
        probe = folder / ".probe"
        probe.write_bytes(b"")
        probe.unlink()


def write(
    folder: Path,
    step: int,
    *,
    tensors: dict[str, dict[str, Tensor]],
    pickled: dict[str, Any],
    info: dict[str, Any],
    keep: int,
) -> Path:
    """Write ``step_N``, whole or not at all, then drop all but the last ``keep``.

    Raises:
        ValueError: no space, no permission, or another failure to write; nothing is lost.
    """
    final, draft = folder / f"step_{step:07d}", folder / f".writing_{step:07d}"
    with explained(folder):
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            for name, table in tensors.items():
                contiguous = {k: v.detach().contiguous() for k, v in table.items()}
                save_file(contiguous, draft / f"{name}.safetensors")
            torch.save(pickled, draft / "state.pt")
            files = {f.name: fingerprint(f) for f in sorted(draft.iterdir())}
            text = json.dumps({"step": step, "files": files, **info}, indent=1)
            (draft / "info.json").write_text(text)
            for path in [*draft.iterdir(), draft]:
                _flush_to_disk(path)
            if final.exists():
                shutil.rmtree(final)
            draft.rename(final)
            _flush_to_disk(folder)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    for old in all_steps(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def all_steps(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(p for p in folder.glob("step_*") if p.is_dir())


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None where there is none at all.

    Raises:
        ValueError: there are checkpoints and every one of them is damaged.
    """
    found = all_steps(folder)
    for path in reversed(found):
        try:
            return read(path)
        except ValueError as error:
            log.warning("%s; using the one before it", error)
    if found:
        raise ValueError(f"all {len(found)} checkpoints in {folder} are damaged: train into "
                         "another folder, or remove this one to start again")
    return None


def read(path: Path) -> Checkpoint:
    """Check a checkpoint against its own record. Raises ValueError saying what is wrong with it."""
    try:
        info = json.loads((path / "info.json").read_text())
        files = info["files"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"checkpoint {path} is incomplete (info.json: {error})") from None
    for name, expected in files.items():
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {path} is incomplete: {name} is missing")
        found = fingerprint(path / name)
        if found != expected:
            how = "truncated" if found["bytes"] < expected["bytes"] else "damaged"
            raise ValueError(f"checkpoint {path} is {how}: {name} has {found['bytes']:,} bytes of "
                             f"{expected['bytes']:,}" + (", and another hash" * (how == "damaged")))
    return Checkpoint(path, info)


def check_same_run(before: dict[str, Any], cfg: Any, path: Path) -> None:
    """Refuse to continue a run as something else. Raises ValueError listing what differs."""
    now = cfg.to_dict()
    differs = [f"{k} was {before[k]!r} and is {now[k]!r}" for k in now
               if k not in FREE and k in before and before[k] != now[k]]
    if differs:
        raise ValueError(f"{path} belongs to another configuration ({'; '.join(differs)}): choose "
                         "another folder with --out, or the settings it was begun with")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
