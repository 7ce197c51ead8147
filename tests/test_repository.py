"""What the repository promises: it installs the same way everywhere, and keeps its own rules."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import minidiffuser

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minidiffuser"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
RUNTIME = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
OPTIONAL = [line for extra in EXTRAS.values() for line in extra]

CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # the others are the same
IMPORT_NAMES = {"ipython": "IPython", "pillow": "PIL", "pyyaml": "yaml",
                "lingua-language-detector": "lingua", "open_clip_torch": "open_clip"}

# Who may import whom inside the package; modules that are not listed sit on top, and may any.
MAY_IMPORT = {
    "errors": set(),
    "images": set(),
    "config": {"errors"},
    "schedule": {"errors"},
    "uvit": {"config", "errors"},
    "objective": {"config", "errors", "schedule"},
    "tasks": {"config", "errors", "schedule"},
    "solvers": {"errors", "schedule"},
}
# Large, and needed by few: the package imports them only inside the functions that do.
HEAVY = {"diffusers", "img2dataset", "nbgrader", "open_clip", "transformers"}


# ---- dependencies ------------------------------------------------------------------------------


def pip_requirements(lines: list[str]) -> dict[str, SpecifierSet]:
    parsed = [Requirement(line) for line in lines]
    return {r.name: r.specifier for r in parsed if r.name != PROJECT["name"]}


def conda_requirements() -> dict[str, SpecifierSet]:
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pairs = [line.partition(" ")[::2] for line in lines if isinstance(line, str)]
    return {name: SpecifierSet(versions.strip()) for name, versions in pairs}


def test_conda_and_pip_install_the_same():
    extras = ("notebooks", "classroom", "clip", "full-size", "dev")
    pip = pip_requirements(RUNTIME + [line for extra in extras for line in EXTRAS[extra]])
    expected = {CONDA_NAMES.get(name, name): versions for name, versions in pip.items()}
    expected["python"] = SpecifierSet(PROJECT["requires-python"])
    found = conda_requirements()
    assert "pip" in found  # conda asks for it by name when a file has a pip section
    del found["pip"]
    assert found == expected
    # What conda-forge lacks comes with the package itself.
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert lines[-1] == {"pip": ["-e .[fetch]"]}


def test_constraints_pin_every_direct_dependency_within_its_range():
    allowed = pip_requirements(RUNTIME + OPTIONAL)
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines()
             if line and not line.startswith("#")]
    pins = pip_requirements(lines)
    assert pins.keys() == allowed.keys() - {"tomli"}  # only installed on Python 3.10
    for name, pin in pins.items():
        (exactly,) = pin
        assert exactly.operator == "=="
        assert exactly.version in allowed[name], f"{name}: {pin} is outside {allowed[name]}"


def test_imports_are_declared():
    """At the top of a module only what is always installed; within a function extras as well."""
    installed, optional = import_names(RUNTIME), import_names(OPTIONAL)
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        at_top = third_party(ast.iter_child_nodes(tree))
        anywhere = third_party(ast.walk(tree))
        assert at_top <= installed, f"{path.relative_to(ROOT)}: {at_top - installed}"
        undeclared = anywhere - installed - optional
        assert not undeclared, f"{path.relative_to(ROOT)}: {undeclared}"


def test_imports_of_lessons_tests_and_scripts_are_declared():
    declared = import_names(RUNTIME + OPTIONAL)
    sources = {path: lesson_code(path) for path in lessons()}
    for folder in ("tests", "benchmarks", "data"):
        sources |= {path: path.read_text() for path in (ROOT / folder).rglob("*.py")}
    assert Path(__file__) in sources
    for path, source in sources.items():
        # Of the tests' helpers the hostile server serves a benchmark too.
        beside = {other.stem for other in path.parent.glob("*.py")} | {"hostile_server"}
        undeclared = third_party(ast.walk(ast.parse(source))) - declared - beside
        assert not undeclared, f"{path.relative_to(ROOT)}: {undeclared}"


def import_names(lines: list[str]) -> set[str]:
    return {IMPORT_NAMES.get(name, name) for name in pip_requirements(lines)}


def third_party(nodes: Iterator[ast.AST]) -> set[str]:
    """The top-level names that these statements import, but for Python's own and ours."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {"minidiffuser"}


def lessons() -> list[Path]:
    return [p for p in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]


def lesson_code(path: Path) -> str:
    """The code of a notebook, without the lines that are IPython's (%magic, !command)."""
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    lines = [line for cell in cells for line in "".join(cell["source"]).splitlines()]
    return "\n".join("" if re.match(r"[%!]", line) else line for line in lines)


# ---- the package -------------------------------------------------------------------------------


def test_importing_every_module_is_light_and_silent():
    """No network, no heavy library, nothing printed."""
    script = """
import importlib, pkgutil, sys

def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        sys.exit(f"{module} used the network: {event} {args[1:]}")

sys.addaudithook(watch)
module = "minidiffuser"
package = importlib.import_module(module)
for found in pkgutil.walk_packages(package.__path__, "minidiffuser."):
    module = found.name
    if module == "minidiffuser.data.download":
        continue  # the process behind `data fetch`: it extends img2dataset, and nobody imports it
    importlib.import_module(module)
    if heavy := set(sys.argv[1:]) & sys.modules.keys():
        sys.exit(f"{module} imported {heavy}")
"""
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", script, *HEAVY], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""


def test_arrows_point_one_way():
    names = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for module, allowed in MAY_IMPORT.items():
        imported = first_party(ast.parse((PACKAGE / f"{module}.py").read_text())) & names
        assert imported <= allowed, f"{module} imports {imported - allowed}"


def first_party(tree: ast.AST) -> set[str]:
    """The modules of ours that are imported from: `.a.b`, `. import a`, `minidiffuser.a`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names
                      if alias.name.startswith("minidiffuser.")}
        elif isinstance(node, ast.ImportFrom):
            path = [part for part in (node.module or "").split(".") if part]
            if node.level == 0 and path[0] != "minidiffuser":
                continue
            inside = path if node.level else path[1:]
            found |= {inside[0]} if inside else {alias.name for alias in node.names}
    return found


def test_functions_are_short():
    """At most 60 lines each, the docstring not counted."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node) is not None:
                    lines -= node.body[0].end_lineno - node.body[0].lineno + 1
                assert lines <= 60, f"{path.relative_to(ROOT)}: {node.name} has {lines} lines"


def test_style():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache",
                           "--output-format", "concise", "."],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_wheel_carries_the_shipped_data(tmp_path):
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
                   cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    ours = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    expected = {f"minidiffuser/{path.relative_to(PACKAGE)}" for path in ours}
    for shipped in ("clipart", "emoji", "checkpoints"):
        files = [path for path in (ROOT / "data" / shipped).rglob("*") if path.is_file()]
        assert files, f"data/{shipped} is empty"
        expected |= {f"minidiffuser/_data/{path.relative_to(ROOT / 'data')}" for path in files}
    assert packed == expected


# ---- licences, citation, size ------------------------------------------------------------------


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    for section in range(1, 10):
        assert re.search(rf"^ +{section}\. \S", text, re.MULTILINE), f"section {section} is missing"
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"
    assert citation()["license"] == "Apache-2.0"


def test_shipped_data_come_with_their_licences():
    folders = {path.parent for path in (ROOT / "data").rglob("*.parquet")}
    assert ROOT / "data" / "emoji" in folders
    for folder in folders:
        texts = [p for p in folder.rglob("*") if p.is_file()
                 and any(part.startswith("LICENSE") for part in p.relative_to(folder).parts)]
        assert texts, f"{folder.relative_to(ROOT)} has tables and no LICENSE"
        assert all(text.stat().st_size > 0 for text in texts)


def test_citation_is_of_this_version():
    assert citation()["version"] == minidiffuser.__version__
    assert {"cff-version", "message", "title", "authors"} <= citation().keys()


def citation() -> dict:
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_repository_stays_small():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                            cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    total = sum(path.stat().st_size for path in paths if path.is_file())
    assert total < 50e6, f"{total / 1e6:.1f} MB"


# ---- make --------------------------------------------------------------------------------------

# Stands for Python: it writes down how it was called, and `-m venv` puts it into the new .venv.
RECORDER = """#!/bin/sh
echo "offline=$HF_HUB_OFFLINE $*" >> calls.log
case "$*" in
    "-c import sys;"*) test ! -e python-is-old ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip install"*) test ! -e pip-fails ;;
esac
"""


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """What make reads, in a folder with a space in its name, and a recorder for Python."""
    folder = tmp_path / "my course"
    lesson = folder / "notebooks" / "00_start_here"
    lesson.mkdir(parents=True)
    (lesson / "00_start_here.ipynb").touch()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, folder)
    recorder = folder / "recorder"
    recorder.write_text(RECORDER)
    recorder.chmod(0o755)
    return folder


def make(folder: Path, *words: str, ok: bool = True) -> list[str]:
    """Run make with the recorder as Python; return the calls that it made."""
    log = folder / "calls.log"
    log.write_text("")
    environment = {k: v for k, v in os.environ.items()
                   if k not in ("HF_HUB_OFFLINE", "MAKEFLAGS", "MAKELEVEL", "ARGS")}
    done = subprocess.run(["make", "PYTHON=./recorder", *words], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return log.read_text().splitlines()


def installs(calls: list[str]) -> list[str]:
    return [call for call in calls if "pip install" in call or "-m venv" in call]


def test_first_make_installs_and_the_second_does_not(workshop):
    making, filling = installs(make(workshop, "test"))
    assert making.endswith("-m venv .venv")
    assert "-c constraints.txt" in filling
    assert filling.endswith("-e .[dev]")
    for target in ("test", "lab", "demo", "lint", "install"):
        assert installs(make(workshop, target)) == [], target


def test_make_installs_again_when_the_dependencies_change(workshop):
    make(workshop, "install")
    stamp = (workshop / ".venv" / ".installed").stat().st_mtime
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(workshop / name, (stamp + 10, stamp + 10))
        (again,) = installs(make(workshop, "install"))  # into the .venv that is there
        assert "pip install" in again, name
        os.utime(workshop / name, (stamp - 10, stamp - 10))


def test_make_tries_again_after_a_failed_install(workshop):
    (workshop / "pip-fails").touch()
    assert not any("pytest" in call for call in make(workshop, "test", ok=False))
    (workshop / "pip-fails").unlink()
    calls = make(workshop, "test")
    assert installs(calls)
    assert "pytest" in calls[-1]


def test_make_refuses_another_python(workshop):
    (workshop / "python-is-old").touch()
    assert installs(make(workshop, "install", ok=False)) == []
    bounds = r"\((\d+), (\d+)\) <= sys.version_info < \((\d+), (\d+)\)"
    low, minor, high, end = re.search(bounds, (ROOT / "Makefile").read_text()).groups()
    wanted = SpecifierSet(f">={low}.{minor},<{high}.{end}")
    assert wanted == SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("target, expected", [
    ("test", "offline=1 -m pytest --nbval"),
    ("lab", "offline= -m jupyterlab --ServerApp.root_dir=notebooks "
            "notebooks/00_start_here/00_start_here.ipynb"),
    ("demo", "offline= -m minidiffuser demo"),
    ("lint", "offline= -m ruff check"),
    ("assignments", "offline= -m minidiffuser classroom assignments"),
    ("grade", "offline= -m minidiffuser classroom grade"),
    ("notebooks", "offline=1 -m nbconvert --to notebook --execute --inplace"),
])
def test_make_runs(workshop, target, expected):
    assert make(workshop, target, "ARGS=--more")[-1].startswith(expected)
    assert make(workshop, target, "ARGS=--more")[-1].endswith(" --more")


def test_make_clean_keeps_what_cannot_be_made_again(workshop):
    make(workshop, "install")
    kept = ["runs/emoji/model.safetensors", "notebooks/mine.ipynb", ".venv/lib/__pycache__/a.pyc"]
    gone = ["minidiffuser/__pycache__/a.pyc", ".pytest_cache/a", ".ruff_cache/a", "build/a",
            "dist/a", "demo.png"]
    for name in kept + gone:
        (workshop / name).parent.mkdir(parents=True, exist_ok=True)
        (workshop / name).touch()
    make(workshop, "clean")
    assert [name for name in kept if not (workshop / name).exists()] == []
    assert [name for name in gone if (workshop / name).exists()] == []
    make(workshop, "distclean")
    assert not (workshop / ".venv").exists()
    assert (workshop / kept[0]).exists()


def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE).group(1).split()
    listed = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True,
                            text=True, check=True).stdout
    assert re.findall(r"^make (\w+) +\S", listed, re.MULTILINE) == targets


def test_every_training_that_is_written_down_can_begin():
    """Its preset and settings exist, and make a network."""
    from minidiffuser.config import overrides, preset

    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("data/**/*.md"),
             *(ROOT / "minidiffuser").rglob("*.py")]
    texts = [page.read_text().replace("\\\n", " ") for page in pages]  # lines that go on
    found = [match for text in texts for match in
             re.findall(r"-m minidiffuser train ([a-z][\w-]*)([^\n`#\"]*)", text)]
    assert len(found) >= 8
    for name, words in found:
        words = words.replace("--out", "--data").replace("...", "").strip(" .").split()
        preset(name).replace(**overrides(words)).network()


def test_ci_runs_the_tests():
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "make test" in script.read_text().splitlines()
