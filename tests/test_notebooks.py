"""Committed lessons are fit to be read, run and graded; and none needs a network.

`make notebooks` mends what only needs running again.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "fixtures" / "01_tiny" / "01_tiny.ipynb"
LESSONS = [p for p in sorted((ROOT / "notebooks").rglob("*.ipynb"))
           if ".ipynb_checkpoints" not in p.parts]
MOST = 1_500_000  # bytes
KEYS = {"schema_version", "grade", "locked", "solution", "task", "grade_id"}
SHELL = re.compile(r"^\s*(!|%%?(?:pip|conda|mamba|uv|sx|sh|bash|system)\b)", re.MULTILINE)
SOMEBODYS = re.compile(rf"(/home/|/Users/|[A-Z]:\\+Users|{re.escape(str(ROOT))}|"
                       rf"{re.escape(tempfile.gettempdir())}/)[\w./-]")


def source(cell: dict) -> str:
    return "".join(cell["source"])


def problems(notebook: dict, name: str) -> list[str]:
    """All that is wrong with a lesson."""
    cells = notebook["cells"]
    return [*execution(cells), *outputs(cells), *images(cells), *headings(cells),
            *grading(cells, name)]


def execution(cells: list[dict]) -> list[str]:
    """Cells that were not run, or not from top to bottom in one go."""
    code = [cell for cell in cells if cell["cell_type"] == "code" and source(cell).strip()]
    counts = [cell["execution_count"] for cell in code]
    found = [f"has no outputs, as it was not run: {source(cell)[:40]!r}"
             for cell in code if cell["execution_count"] is None]
    if not found and counts != list(range(1, len(code) + 1)):
        found = [f"execution counts out of order: {counts}"]
    found += [f"shows something, and has no output: {source(cell)[:40]!r}"
              for cell in code if must_show(source(cell)) and not cell["outputs"]]
    found += [f"calls a program, or installs one: {source(cell)[:40]!r}"
              for cell in code if SHELL.search(source(cell))]
    return found


def must_show(code: str) -> bool:
    """Whether a cell prints or draws, or ends on a value."""
    try:
        body = ast.parse(code).body
    except SyntaxError:  # IPython's %magic
        return False
    calls = [s.value for s in body if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call)]
    return (any(isinstance(call.func, ast.Name) and call.func.id in ("print", "show", "display")
                for call in calls)
            or (isinstance(body[-1], ast.Expr)
                and isinstance(body[-1].value, ast.Name | ast.BinOp | ast.IfExp)))


def outputs(cells: list[dict]) -> list[str]:
    """Errors that are not shown on purpose, warnings, and names of somebody's folders."""
    found = []
    for cell in cells:
        for output in cell.get("outputs", []):
            shown = json.dumps({k: v for k, v in output.items() if k != "metadata"})
            meant = "raises-exception" in cell["metadata"].get("tags", [])
            if output["output_type"] == "error" and not meant:
                found.append(f"error in {source(cell)[:40]!r}; tag it raises-exception if it is "
                             "meant")
            if output.get("name") == "stderr":
                found.append(f"a warning is shown by {source(cell)[:40]!r}")
            if path := SOMEBODYS.search(shown):
                found.append(f"{path.group()} is shown by {source(cell)[:40]!r}")
    return found


def images(cells: list[dict]) -> list[str]:
    """Pictures that say nothing to those who cannot see them."""
    found = []
    for cell in cells:
        for output in cell.get("outputs", []):
            found += [f"{kind} without alt text, of {source(cell)[:40]!r}"
                      for kind in output.get("data", {}) if kind.startswith("image/")
                      and not output["metadata"].get(kind, {}).get("alt")]
            page = "".join(output.get("data", {}).get("text/html", ""))
            found += [f"{tag} without alt text" for tag in bare_images(page)]
        if cell["cell_type"] == "markdown":
            found += [f"{tag} without alt text"
                      for tag in bare_images(source(cell)) + re.findall(r"!\[\s*\]\([^)]*\)",
                                                                        source(cell))]
    return found


def bare_images(text: str) -> list[str]:
    return [tag for tag in re.findall(r"<img\b[^>]*>", text)
            if not re.search(r"""\balt=["'][^"']""", tag)]


def headings(cells: list[dict]) -> list[str]:
    """Levels that are skipped, and titles other than the first."""
    text = "\n\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found, before = [], 0
    for marks, title in re.findall(r"^(#{1,6}) (.+)$", text, re.MULTILINE):
        level = len(marks)
        if level > before + 1:
            found.append(f"heading {title!r} skips a level")
        if level == 1 and before:
            found.append(f"heading {title!r} is a second title")
        before = level
    return found or ([] if before else ["no headings"])


def grading(cells: list[dict], name: str) -> list[str]:
    """What would keep nbgrader from making an assignment of the lesson, or from grading it."""
    found, answers, seen = [], [], set()
    for cell in cells:
        if (meta := cell["metadata"].get("nbgrader")) is None:
            found += [f"a region for nbgrader in {source(cell)[:40]!r}, which it does not know"
                      for _ in re.findall("### BEGIN (?:SOL|HID)", source(cell))[:1]]
            continue
        grade_id = meta.get("grade_id")
        keys = KEYS | ({"points"} if meta.get("grade") else set())
        if meta.keys() != keys:
            found.append(f"{grade_id}: nbgrader keys {sorted(meta.keys() ^ keys)}")
        if grade_id in seen:
            found.append(f"{grade_id} is there twice")
        if not str(grade_id).startswith(f"{name[:2]}-"):
            found.append(f"{grade_id} should start with {name[:2]}-")
        seen.add(grade_id)
        kind = [meta.get(key) for key in ("schema_version", "grade", "locked", "solution", "task")]
        if kind == [3, False, False, True, False]:
            answers.append(grade_id)
        elif kind != [3, True, True, False, False]:
            found.append(f"{grade_id} is neither an answer nor a check: {kind}")
        elif not answers or grade_id != f"{answers.pop()}-check":
            found.append(f"{grade_id} does not follow its answer")
        elif not meta.get("points", 0) > 0:
            found.append(f"{grade_id} is worth nothing")
    return found + [f"{answer} has no check" for answer in answers]


# ---- the lessons -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson_is_fit_to_be_committed(path):
    assert path.parent == ROOT / "notebooks" / path.stem
    assert re.match(r"\d\d_[a-z0-9_]+$", path.stem)
    assert path.stat().st_size <= MOST, f"{path.stat().st_size:,} bytes"
    assert problems(json.loads(path.read_text()), path.stem) == []


def test_there_are_lessons():
    assert LESSONS


# ---- each of these would be noticed ------------------------------------------------------------

PICTURE = {"output_type": "display_data", "data": {"image/png": "iVBOR"}, "metadata": {}}
ERROR = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
WARNING = {"output_type": "stream", "name": "stderr", "text": ["UserWarning: old"]}
PATH = {"output_type": "stream", "name": "stdout", "text": ["/home/ada/minidiffuser"]}


def tiny() -> dict:
    """A lesson without problems; cell 3 is an answer, 4 its check, 5 a value."""
    return json.loads(TINY.read_text())


def set_meta(cell: int, **other):
    return lambda nb: nb["cells"][cell]["metadata"]["nbgrader"].update(other)


def append(cell: int, output: dict):
    return lambda nb: nb["cells"][cell]["outputs"].append(output)


def write(cell: int, text: str):
    return lambda nb: nb["cells"][cell].update(source=text)


def test_the_small_lesson_has_no_problems():
    assert problems(tiny(), TINY.stem) == []


@pytest.mark.parametrize("change, message", [
    (lambda nb: nb["cells"][5].update(execution_count=None, outputs=[]), "was not run: 'double("),
    (lambda nb: (write(5, "print(1)")(nb), nb["cells"][5].update(outputs=[])), "has no output: 'p"),
    (lambda nb: (write(5, "x = 1\nx")(nb), nb["cells"][5].update(outputs=[])), "has no output: 'x"),
    (lambda nb: nb["cells"][5].update(execution_count=9), "out of order: [1, 2, 3, 9"),
    (lambda nb: nb["cells"].insert(1, nb["cells"].pop(3)), "out of order: [2, 1, 3"),
    (write(5, "!curl example.org"), "calls a program"),
    (write(5, "%pip install numpy"), "calls a program"),
    (append(5, ERROR), "error in 'double("),
    (append(5, WARNING), "a warning is shown"),
    (append(5, PATH), "/home/a is shown"),
    (append(5, PICTURE), "image/png without alt text"),
    (append(5, {**PICTURE, "data": {"text/html": "<img src='a.png'>"}}), "<img src='a.png'> with"),
    (write(2, "## Double\n\n![](a.png)"), "![](a.png) without alt text"),
    (write(2, "## Double\n\n<img src='a.png' alt=''>"), "<img src='a.png' alt=''> without alt"),
    (write(2, "### Double"), "'Double' skips a level"),
    (write(2, "# Double"), "'Double' is a second title"),
    (write(0, "A tiny lesson"), "'Double' skips a level"),
    (set_meta(7, grade_id="01-double"), "01-double is there twice"),
    (set_meta(3, note="hard"), "01-double: nbgrader keys ['note']"),
    (set_meta(3, points=2), "01-double: nbgrader keys ['points']"),
    (lambda nb: nb["cells"][4]["metadata"]["nbgrader"].pop("points"), "nbgrader keys ['points']"),
    (set_meta(4, points=0), "01-double-check is worth nothing"),
    (set_meta(4, locked=False), "01-double-check is neither an answer nor a check"),
    (set_meta(3, schema_version=2), "01-double is neither an answer nor a check"),
    (set_meta(4, grade_id="01-twice-check"), "01-twice-check does not follow its answer"),
    (set_meta(3, grade_id="02-double"), "02-double should start with 01-"),
    (lambda nb: nb["cells"].pop(8), "01-total has no check"),
    (lambda nb: nb["cells"][3].update(metadata={}), "'def double(x):"),
])
def test_a_problem_is_noticed(change, message):
    notebook = tiny()
    change(notebook)
    assert any(message in problem for problem in problems(notebook, TINY.stem))


@pytest.mark.parametrize("change", [
    lambda nb: (append(5, ERROR)(nb), nb["cells"][5]["metadata"].update(tags=["raises-exception"])),
    append(5, {**PICTURE, "metadata": {"image/png": {"alt": "a cat"}}}),
    write(2, "## Double\n\n![a cat](a.png) <img src='b.png' alt='a dog'>\n\n```\n##### no\n```"),
])
def test_what_is_meant_is_no_problem(change):
    notebook = tiny()
    change(notebook)
    assert problems(notebook, TINY.stem) == []


# ---- no network --------------------------------------------------------------------------------


def test_no_lesson_tries_the_network(request):
    """Run last, by conftest.py in the root: what the kernels' guard wrote down."""
    if not request.config.getoption("nbval", False):
        pytest.skip("lessons are run with --nbval, as `make test` does")
    assert Path(os.environ["MINIDIFFUSER_NETWORK_LOG"]).read_text() == ""


TRIES = {
    "socket": "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 80), 1)\n"
              "except OSError:\n    pass",
    "name": "import urllib.request\ntry:\n    urllib.request.urlopen('http://example.invalid')\n"
            "except Exception:\n    pass",
    "process": "import subprocess, sys\n_ = subprocess.run([sys.executable, '-c', 'import socket; "
               "socket.getaddrinfo(\"example.invalid\", 80)'], capture_output=True)",
    "here": "import socket\nwith socket.create_server(('127.0.0.1', 0)) as s:\n"
            "    socket.create_connection(('localhost', s.getsockname()[1])).close()",
}


def test_a_lesson_that_tries_the_network_is_noticed(tmp_path):
    """Even where the lesson goes on as if nothing had happened."""
    for name, code in TRIES.items():
        notebook = tiny()
        notebook["cells"] = [cell | {"source": code, "outputs": [], "metadata": {}}
                             for cell in notebook["cells"][1:2]]
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.ipynb").write_text(json.dumps(notebook))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-p", "no:cacheprovider",
         f"{__file__}::test_no_lesson_tries_the_network", tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed, 4 passed" in run.stdout, run.stdout
    for name, host in (("socket", "192.0.2.1"), ("name", "example.invalid"),
                       ("process", "example.invalid")):
        assert f"{name}: socket.getaddrinfo {host}" in run.stdout, run.stdout
    assert "here: " not in run.stdout
