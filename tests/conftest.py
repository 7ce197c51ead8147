"""What several tests share: the shipped table at toy size, and a toy pipeline of random weights."""

import logging
import sys
from dataclasses import dataclass

import pytest
import torch
from support import TOY, random_net

from minidiffuser.pipeline import UniDiffuser, make_codecs, training_arrays


@pytest.fixture(scope="session")
def tables():
    """Split -> images (N, 16, 16, 3) uint8 and captions of the shipped table."""
    return {split: training_arrays(TOY, split) for split in ("train", "test")}


@pytest.fixture(scope="session")
def codecs(tables):
    return make_codecs(TOY, *tables["train"])


@pytest.fixture(scope="session")
def pipe(codecs):
    return UniDiffuser(TOY, random_net(TOY), codecs)


@pytest.fixture(scope="session")
def model_folder(pipe, tmp_path_factory):
    """The toy pipeline as a folder on disk."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    pipe.save_pretrained(folder, dtype=torch.float32)
    return folder


@dataclass
class Ran:
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys):
    """``cli("sample", "text", ...)`` runs the command line in this process."""
    from minidiffuser.__main__ import main

    # Where output does not go to a terminal its width is what COLUMNS says.
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("MINIDIFFUSER_TRACEBACK", raising=False)
    logger = logging.getLogger("minidiffuser")
    level = logger.level

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["minidiffuser", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        code = stopped.value.code
        if isinstance(code, str):  # the interpreter prints it, and exits with 1
            return Ran(1, out, f"{err}{code}\n")
        return Ran(code or 0, out, err)

    yield run
    logger.setLevel(level)
