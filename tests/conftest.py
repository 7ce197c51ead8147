"""What several tests share: the shipped table at toy size, and a toy pipeline of random weights."""

import logging
import sys
from dataclasses import dataclass

import pytest
import torch

from minidiffuser.config import PRESETS
from minidiffuser.pipeline import UniDiffuser, make_codecs, training_arrays
from minidiffuser.uvit import UViT

TOY = PRESETS["toy"]


@pytest.fixture(scope="session")
def tables():
    """Split -> images (N, 16, 16, 3) uint8 and captions of the shipped table."""
    return {split: training_arrays(TOY, split) for split in ("train", "test")}


@pytest.fixture(scope="session")
def codecs(tables):
    return make_codecs(TOY, *tables["train"])


def random_net(cfg, seed=0):
    """A network whose output depends on all it is fed, as a trained one's does.

    (As initialised for training it is almost blind: its matrices are near 0.)
    """
    net, generator = UViT(cfg.network()), torch.Generator().manual_seed(seed)
    net.init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.25)
    return net


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
