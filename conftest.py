"""`pytest --nbval`: lessons run with the network cut off, and whether one tried is tested last."""

import os
import tempfile
from pathlib import Path

LAST = "test_no_lesson_tries_the_network"


def pytest_configure(config):
    """Have the kernels find tests/offline/sitecustomize.py, and a file to write to."""
    if config.getoption("nbval", False):
        guard = str(Path(__file__).parent / "tests" / "offline")
        os.environ["PYTHONPATH"] = os.pathsep.join(
            filter(None, [guard, os.environ.get("PYTHONPATH")]))
        os.environ["MINIDIFFUSER_NETWORK_LOG"] = tempfile.mkstemp(suffix=".log")[1]


def pytest_collection_modifyitems(items):
    """All lessons have run by the time their network log is looked at."""
    items.sort(key=lambda item: item.name == LAST)


def pytest_unconfigure(config):
    """Remove the log."""
    if config.getoption("nbval", False):
        Path(os.environ["MINIDIFFUSER_NETWORK_LOG"]).unlink(missing_ok=True)
