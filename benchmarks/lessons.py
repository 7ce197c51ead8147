"""How long each lesson runs and how much memory it takes: writes lessons.json, and each header.

    python benchmarks/lessons.py            # all lessons, one after the other, each in a new kernel
    python benchmarks/lessons.py 02         # those whose name starts so

The notebooks are run and not saved; only the sentence about time and memory in a lesson's first
cell is brought up to date.  Memory is the kernel's peak (resident set), torch and all.
"""

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import nbformat

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
SENTENCE = re.compile(r"the cells run in \d+ s and [\d.]+ GB on two CPU cores\.|HEADER")


def sentence(seconds: float, gigabytes: float) -> str:
    """What the header says."""
    return f"the cells run in {seconds:.0f} s and {gigabytes:.1f} GB on two CPU cores."


def run_one(path: Path) -> dict[str, float]:
    """Run a notebook to its end, in a kernel that is the only child of this process."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, 4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    seconds = time.perf_counter() - start
    kib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": round(seconds, 1), "gigabytes": round(kib * 1024 / 1e9, 2)}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(run_one(Path(sys.argv[2]))))
        return
    wanted = tuple(sys.argv[1:]) or ("",)
    path = HERE / "lessons.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for lesson in sorted(NOTEBOOKS.glob("*/*.ipynb")):
        if not lesson.stem.startswith(wanted) or ".ipynb_checkpoints" in lesson.parts:
            continue
        done = subprocess.run([sys.executable, __file__, "--one", str(lesson)],
                              capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{lesson.name} failed:\n{done.stderr}")
        results[lesson.stem] = json.loads(done.stdout.splitlines()[-1])
        print(lesson.stem, results[lesson.stem], flush=True)
        path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        notebook = nbformat.read(lesson, 4)
        notebook.cells[0].source = SENTENCE.sub(sentence(**results[lesson.stem]),
                                                notebook.cells[0].source)
        nbformat.write(notebook, lesson)


if __name__ == "__main__":
    main()
