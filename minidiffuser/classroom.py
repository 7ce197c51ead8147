"""The classroom, with nbgrader: student versions of the lessons, grades, and solutions.

    notebooks/LESSON  ->  classroom/release/LESSON                              make assignments
    classroom/submitted/STUDENT/LESSON  ->  mended  ->  autograded  ->  feedback      make grade

nbgrader runs and scores.  A submission that is out of order stops it, or scores 0 there.  So each
is mended first: checks are put back, answers are recognised, and what cannot be is refused with a
message, while the rest of the class is graded.  See docs/instructors.md.
"""

import csv
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer
from tqdm import tqdm

from .errors import choose, suggest

Cell = dict[str, Any]  # as in a notebook's JSON, with the source in one string
MARKER = re.compile(r"\b(BEGIN|END) (SOLUTION|HIDDEN TEST)", re.IGNORECASE)
NOT_RUN = {"tags": ["skip-execution"]}  # nbclient passes such a cell over


class Refused(ValueError):
    """A submission that cannot be graded, and why."""


@dataclass
class Row:
    """A line of grades.csv: one student's lesson."""

    student: str
    lesson: str
    points: float | None  # None: refused
    max_points: float
    status: str  # "graded", "refused" or "missing"
    message: str = ""

    def __str__(self) -> str:
        what = f"{self.points:g} of {self.max_points:g}" if self.status == "graded" else self.status
        return f"{self.student}  {self.lesson}  {what}" + f": {self.message}" * bool(self.message)


# ---- student versions --------------------------------------------------------------------------


def assignments(root: Path, lesson: str | None = None) -> list[str]:
    """Write student versions into classroom/release: no solutions, no hidden tests, no outputs.

    Args:
        root: the folder that nbgrader_config.py and notebooks/ are in.
        lesson: only this one, such as "01_forward_process"; by default all that have exercises.

    Returns:
        The lessons written.

    Raises:
        ValueError: nbgrader is not installed, there is no such lesson, or no assignment can be
            made of it.
    """
    config = _config(root)  # says so if nbgrader is not installed
    from nbgrader.converters import GenerateAssignment

    names = {path.stem: path for path in sorted(root.glob("notebooks/*/*.ipynb"))
             if path.stem == path.parent.name and any(map(_grade_id, _cells(path)))}
    if lesson is not None:
        names = {lesson: choose("lesson with exercises", lesson, names)}
    for name, source in names.items():
        config.CourseDirectory.assignment_id = name
        with _environment(root):
            error = _run(GenerateAssignment, config)
        if error:
            raise ValueError(f"no assignment could be made of {source}: {error}")
        path = _release(root, name)
        if left := MARKER.search(path.read_text(encoding="utf-8")):
            path.unlink()
            raise ValueError(f"{source}: {left.group()!r} would be left in the student version; "
                             "is the marker misspelt, or outside an exercise?")
    return list(names)


def solution(exercise: str) -> str:
    """The reference answer to an exercise, as code.

    Args:
        exercise: its name, such as "02-posterior-mean", or the function's, "posterior_mean".

    Raises:
        ValueError: there is no such exercise, or the lessons are not beside the package.
    """
    lessons = Path(__file__).parents[1] / "notebooks"
    if not lessons.is_dir():
        raise ValueError("solutions are in the lessons, which are not installed with the package: "
                         "clone the repository, and install it with `make`")
    answers = {}
    for path in sorted(lessons.glob("*/*.ipynb")):
        for cell in _cells(path):
            if _grade_id(cell) and not _is_check(cell):
                answers |= {key: cell["source"] for key in [_grade_id(cell), *_defined(cell)]
                            if key not in answers}
    lines = choose("exercise", exercise, answers).splitlines()
    return "\n".join(line for line in lines if not MARKER.search(line))


def _release(root: Path, lesson: str) -> Path:
    return root / "classroom" / "release" / lesson / f"{lesson}.ipynb"


def _grade_id(cell: Cell) -> str | None:
    """The name by which nbgrader knows a cell, if it does."""
    known = cell["metadata"].get("nbgrader")
    return known.get("grade_id") if isinstance(known, dict) else None


def _is_check(cell: Cell) -> bool:
    return bool(_grade_id(cell) and cell["metadata"]["nbgrader"].get("grade"))


def _defined(cell: Cell) -> list[str]:
    """The functions and classes that a cell defines."""
    code = cell["source"] if cell["cell_type"] == "code" else ""
    return re.findall(r"^(?:def|class) (\w+)", code, re.MULTILINE)


def _cells(path: Path) -> list[Cell]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells]


# ---- grades ------------------------------------------------------------------------------------


def grade(
    root: Path,
    lesson: str | None = None,
    student: str | None = None,
    timeout: int = 600,
    only_exercises: bool = False,
) -> list[Row]:
    """Grade what lies in classroom/submitted; write feedback and classroom/grades.csv.

    This runs the students' code with the rights of whoever calls it.

    Args:
        root: the folder that nbgrader_config.py and classroom/ are in.
        lesson, student: grade only these; other lines of grades.csv stay as they are.
        timeout: seconds a cell may take; then it has failed, and the next is run.
        only_exercises: do not run the demonstrations that a student left as they were.

    Returns:
        The rows graded now: every student with every lesson that anybody handed in.

    Raises:
        ValueError: nbgrader is not installed, nothing was handed in, no assignment was made, or
            the private checks named by MINIDIFFUSER_PRIVATE_CHECKS cannot be used.
    """
    config = _config(root)
    config.ExecutePreprocessor.timeout = timeout
    released = {p.stem: _cells(p) for p in sorted(root.glob("classroom/release/*/*.ipynb"))}
    if not released:
        raise ValueError("there is nothing in classroom/release: run `make assignments` first")
    handed_in = {pair: path for pair, path in _handed_in(root, released).items()
                 if lesson in (None, pair[1]) and student in (None, pair[0])}
    if not handed_in:
        raise ValueError("there is nothing to grade in classroom/submitted: put notebooks into "
                         "classroom/submitted/STUDENT/LESSON/LESSON.ipynb")
    with _environment(root):
        _try_private_checks()
        rows = [_grade_one(config, *pair, path, released, only_exercises)
                for pair, path in tqdm(handed_in.items(), "grading", disable=None)]
    _write_grades(root / "classroom" / "grades.csv", rows, merge=lesson or student)
    return rows


def _handed_in(root: Path, released: Mapping) -> dict[tuple[str, str], Path | None]:
    """(student, lesson) -> what was handed in; None where others handed in that lesson."""
    students = [p for p in _visible(root / "classroom" / "submitted") if p.is_dir()]
    found = {(s.name, p.stem if p.is_file() else p.name): p for s in students
             for p in sorted(_visible(s), key=Path.is_dir) if p.is_dir() or p.suffix == ".ipynb"}
    lessons = {lesson for _, lesson in found if lesson in released}
    return dict(sorted({**{(s.name, lesson): None for s in students for lesson in lessons},
                        **found}.items()))


def _visible(folder: Path) -> list[Path]:
    return [p for p in folder.glob("*") if not p.name.startswith(".")]


def _grade_one(
    config: Any,
    student: str,
    lesson: str,
    path: Path | None,
    released: Mapping[str, list[Cell]],
    only_exercises: bool,
) -> Row:
    """Mend and grade what one student handed in for one lesson."""
    from nbgrader.converters import Autograde, GenerateFeedback

    config.CourseDirectory.student_id, config.CourseDirectory.assignment_id = student, lesson
    most = sum(cell["metadata"]["nbgrader"]["points"]
               for cell in released.get(lesson, []) if _is_check(cell))
    _forget(config, gradebook=path is None)
    if path is None:
        return Row(student, lesson, 0.0, most, "missing")
    try:
        cells, notes = _read(path, lesson, released)
        cells, more = mend(cells, released[lesson], only_exercises)
        _save(cells, _place(config, "submitted"))
        if error := _run(Autograde, config):
            raise Refused(error)
    except Exception as error:  # not even one that we did not think of may stop the class
        _forget(config, gradebook=True)
        why = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        return Row(student, lesson, None, most, "refused", why)
    late = _timeouts(_place(config, "autograded"), config.ExecutePreprocessor.timeout)
    if error := _run(GenerateFeedback, config):
        late.append(f"no feedback could be written: {error}")
    return Row(student, lesson, _points(config), most, "graded", "; ".join(notes + more + late))


def _read(path: Path, lesson: str, released: Mapping) -> tuple[list[Cell], list[str]]:
    """The cells handed in, and what was odd about the files."""
    if lesson not in released:
        raise Refused(f"{path.name} is no lesson that was given out.{suggest(lesson, released)}")
    if path.is_file():
        raise Refused(f"{path.name} should lie in a folder {lesson}")
    found = {p.name: p for p in _visible(path) if p.suffix == ".ipynb"}
    name, notes = f"{lesson}.ipynb", []
    if name not in found:
        if len(found) != 1:
            raise Refused(f"{name} is not there" + f"; there are {sorted(found)}" * bool(found))
        notes, (name,) = [f"{next(iter(found))} was taken for {name}"], found
    try:
        notebook = json.loads(found[name].read_text(encoding="utf-8"))
        if notebook["nbformat"] != 4:
            raise Refused(f"{name} has the old format {notebook['nbformat']}: "
                          "open it in JupyterLab and save it")
        return [_plain(cell) for cell in notebook["cells"]], notes
    except Refused:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"{name} is not a notebook ({type(error).__name__}: {error})") from error


def _plain(cell: Cell) -> Cell:
    """What counts of a cell: its kind, its text and its names."""
    if cell["cell_type"] not in ("code", "markdown", "raw"):
        raise ValueError(f"a cell is of type {cell['cell_type']!r}")
    name = _grade_id(cell)
    return {"cell_type": cell["cell_type"], "source": "".join(cell["source"]),
            "id": str(cell.get("id")),
            "metadata": {"nbgrader": {"grade_id": name}} if isinstance(name, str) else {}}


# ---- mending -----------------------------------------------------------------------------------


def mend(
    cells: list[Cell], release: list[Cell], only_exercises: bool = False
) -> tuple[list[Cell], list[str]]:
    """Bring a submission into the order that nbgrader needs.

    Args:
        cells: the submission's.
        release: the student version's.
        only_exercises: have demonstrations that were left as they were passed over.

    Returns:
        The cells to grade, and notes on what was mended.  Checks are those of the release, all
        there and once; answers keep their text under the release's metadata; other cells lose
        their metadata, so that none can pose as a check or have one skipped.

    Raises:
        Refused: no exercise is recognised, or one has two answers.
    """
    found = _recognise(cells, release)
    exercises = [i for i, cell in enumerate(release) if _grade_id(cell)]
    if not set(exercises) & set(found):
        raise Refused("none of the exercises is in it: "
                      + ", ".join(_grade_id(release[i]) for i in exercises))
    setup = next(i for i, cell in enumerate(release) if cell["cell_type"] == "code")
    dropped, notes = _copies(cells, release, found)
    mended = []
    for k, (i, cell) in enumerate(zip(found, cells, strict=True)):
        if k in dropped:
            continue
        same = i is not None and cell["source"] == release[i]["source"]
        if i not in exercises:
            skip = only_exercises and same and i != setup and cell["cell_type"] == "code"
            mended.append((i, {**cell, "metadata": NOT_RUN if skip else {}}))
        elif _is_check(release[i]):
            mended.append((i, release[i]))
            notes += [] if same else [f"{_grade_id(release[i])} was changed: put back"]
        else:
            mended.append((i, {**release[i], "source": cell["source"]}))
    notes += _put_back(mended, release, setup)
    return [cell for _, cell in mended], notes


def _recognise(cells: list[Cell], release: list[Cell]) -> list[int | None]:
    """For each cell of a submission, which of the release it is.

    By grade_id; where that was lost by the cell's id, its text, or the function it defines.
    """
    found: list[int | None] = [None] * len(cells)
    for names in (lambda cell: [_grade_id(cell)], lambda cell: [cell.get("id")],
                  lambda cell: [cell["source"]], _defined):
        taken = set(found)
        free = {name: i for i, cell in enumerate(release) if i not in taken
                for name in names(cell) if name}
        found = [next((free[name] for name in names(cell) if name in free), None)
                 if i is None else i for i, cell in zip(found, cells, strict=True)]
    return found


def _copies(
    cells: list[Cell], release: list[Cell], found: list[int | None]
) -> tuple[set[int], list[str]]:
    """Which cells to leave out, since an exercise has more than one of them."""
    dropped, notes = set(), []
    for i, cell in enumerate(release):
        copies = [k for k, j in enumerate(found) if j == i]
        if len(copies) < 2 or not _grade_id(cell):
            continue
        keep = copies[0]
        if not _is_check(cell):
            written = {cells[k]["source"]: k for k in reversed(copies)
                       if cells[k]["source"] != cell["source"]}
            if len(written) > 1:
                raise Refused(f"{_grade_id(cell)} is there {len(copies)} times, with different "
                              "answers: delete all but one")
            keep = next(iter(written.values()), keep)
        dropped |= set(copies) - {keep}
        notes.append(f"{_grade_id(cell)} was there {len(copies)} times: one was kept")
    return dropped, notes


def _put_back(
    mended: list[tuple[int | None, Cell]], release: list[Cell], setup: int
) -> list[str]:
    """Put in the checks that are missing, and the first code cell; say what was missing."""
    notes, answer = [], None
    if setup not in dict(mended):
        mended.insert(0, (setup, {**release[setup], "metadata": {}}))
        notes.append("the first code cell was missing: put back")
    for i, cell in enumerate(release):
        place = {j: k for k, (j, _) in enumerate(mended)}
        if not _grade_id(cell):
            continue
        if not _is_check(cell):
            answer = i
            notes += [] if i in place else [f"{_grade_id(cell)}, the answer, was not found"]
        elif i not in place:
            notes.append(f"{_grade_id(cell)} was missing: put back")
            # After the answer; if that is missing, at the end: it may be in a cell of another name.
            before = max((place[j] for j in range(i) if j in place), default=-1)
            at = before + 1 if answer is None or answer in place else len(mended)
            mended.insert(at, (i, cell))
    return notes


# ---- nbgrader ----------------------------------------------------------------------------------


def _config(root: Path) -> Any:
    """nbgrader_config.py, for a course that lies in root."""
    try:
        import nbgrader  # noqa: F401
        from traitlets.config import PyFileConfigLoader
    except ImportError as error:
        raise ValueError(f"the classroom needs nbgrader ({error}): "
                         "pip install 'minidiffuser[classroom]'") from error
    if not (root / "nbgrader_config.py").exists():
        raise ValueError(f"there is no nbgrader_config.py in {root}: run this in the folder of the "
                         "repository")
    (root / "classroom").mkdir(exist_ok=True)
    config = PyFileConfigLoader("nbgrader_config.py", path=str(root)).load_config()
    config.CourseDirectory.root = str(root)
    config.CourseDirectory.db_url = f"sqlite:///{root / 'classroom' / 'gradebook.db'}"
    config.CourseDirectory.submitted_directory = "classroom/mended"
    config.BaseConverter.force = True
    return config


def _run(kind: type, config: Any) -> str:
    """Run one of nbgrader's converters; return what went wrong, if anything did."""
    from nbgrader.coursedir import CourseDirectory

    log, said = logging.Logger("nbgrader"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about nbgrader's own use of its database
            kind(coursedir=CourseDirectory(config=config), config=config, log=log).start()
    except Exception as error:  # whatever a submission brings about must not stop the class
        # nbgrader logs the traceback of what happened, and then raises "see above".
        logged = [text for text in said if text.startswith("Traceback")] or [str(error)]
        return logged[0].strip().splitlines()[-1].removeprefix("RuntimeError: ")
    return ""


def _place(config: Any, step: str) -> Path:
    """Where a notebook lies after a step of grading."""
    course = config.CourseDirectory
    folder = Path(course.root, course[f"{step}_directory"], course.student_id, course.assignment_id)
    return folder / f"{course.assignment_id}.ipynb"


def _save(cells: list[Cell], path: Path) -> None:
    whole = [{**cell, "id": f"cell-{k}"} | ({"outputs": [], "execution_count": None}
             if cell["cell_type"] == "code" else {}) for k, cell in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {},
                                "cells": whole}), encoding="utf-8")


def _forget(config: Any, gradebook: bool) -> None:
    """Remove what an earlier submission left."""
    from nbgrader.api import Gradebook, MissingEntry
    from nbgrader.utils import rmtree

    for step in ("submitted", "autograded", "feedback"):
        if (folder := _place(config, step).parent).exists():
            rmtree(str(folder))
    course = config.CourseDirectory
    if gradebook:
        with Gradebook(course.db_url, course.course_id) as book, suppress(MissingEntry):
            book.remove_submission(course.assignment_id, course.student_id)


def _points(config: Any) -> float:
    from nbgrader.api import Gradebook

    course = config.CourseDirectory
    with Gradebook(course.db_url, course.course_id) as book:
        return book.find_submission(course.assignment_id, course.student_id).score


def _timeouts(path: Path, timeout: int) -> list[str]:
    """Which cells were stopped."""
    return [f"{_grade_id(cell) or f'cell {k}'} was stopped after {timeout} s"
            for k, cell in enumerate(_cells(path), 1) for output in cell.get("outputs", [])
            if output.get("ename") == "CellTimeoutError"]


def _environment(root: Path) -> Any:
    """What nbgrader and the notebooks it runs find: alembic, and modules in classroom/."""
    extended = {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(root / "classroom")}
    return patch.dict(os.environ, {
        name: os.pathsep.join(filter(None, [value, os.environ.get(name)]))
        for name, value in extended.items()})


def _try_private_checks() -> None:
    """A private module that cannot be imported would fail the whole class: look first."""
    from .grading import PRIVATE  # here, because it imports torch, which takes seconds

    if name := os.environ.get(PRIVATE):
        done = subprocess.run([sys.executable, "-c", f"import {name}; {name}.check"],
                              capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{PRIVATE}={name}: {done.stderr.strip().splitlines()[-1]}. It should "
                             f"name a module, such as classroom/{name}.py, with a function "
                             "check(exercise, namespace)")


def _write_grades(path: Path, rows: list[Row], merge: bool) -> None:
    """Write grades.csv; to merge is to keep the lines of students and lessons not in rows."""
    lines = {}
    if merge and path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            lines = {(line["student"], line["lesson"]): line for line in csv.DictReader(file)}
    lines |= {(row.student, row.lesson): asdict(row) for row in rows}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(lines[pair] for pair in sorted(lines))


# ---- the command line --------------------------------------------------------------------------

app = typer.Typer(no_args_is_help=True, help="Student versions, grades and solutions.")
Lesson = Annotated[str | None, typer.Option(help="Only this one, such as 01_forward_process.")]


@app.command("assignments")
def _assignments(lesson: Lesson = None) -> None:
    """Write the student versions of all lessons that have exercises."""
    for name in assignments(Path.cwd(), lesson):
        typer.echo(_release(Path(), name))


@app.command("grade")
def _grade(
    lesson: Lesson = None,
    student: Annotated[str | None, typer.Option(help="Only this one.")] = None,
    timeout: Annotated[int, typer.Option(help="Seconds that a cell may take.")] = 600,
    only_exercises: Annotated[bool, typer.Option(
        "--only-exercises", help="Pass over demonstrations that were left as they were.")] = False,
) -> None:
    """Grade classroom/submitted/STUDENT/LESSON/LESSON.ipynb, with feedback and grades.csv."""
    for row in grade(Path.cwd(), lesson, student, timeout, only_exercises):
        typer.echo(row)
    typer.echo("classroom/grades.csv, classroom/feedback/")


@app.command("solution")
def _solution(
    exercise: Annotated[str, typer.Argument(help="Its name, or its function's.")],
) -> None:
    """Print the reference answer to an exercise."""
    typer.echo(solution(exercise))
