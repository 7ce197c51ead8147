"""The classroom with real nbgrader: a small lesson is given out, a class of students who do all
that students do hands it in, and each is graded fairly or refused by name.
"""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from minidiffuser import classroom
from minidiffuser.classroom import assignments, grade, solution

ROOT = Path(__file__).parents[1]
TINY = Path(__file__).parent / "fixtures" / "01_tiny"
ANSWERS = {
    "01-double": "def double(x):\n    return x + x",
    "01-total": "def total(numbers):\n    return sum(numbers)",
}
TIMEOUT = 4


REGION = re.compile(r"### BEGIN (?:SOLUTION|HIDDEN TESTS)\n([\s\S]*?)### END [A-Z ]+")


def course(root: Path) -> Path:
    """A repository with one lesson."""
    shutil.copytree(TINY, root / "notebooks" / TINY.name)
    shutil.copy(ROOT / "nbgrader_config.py", root)
    return root


def released(root: Path) -> dict:
    path = root / "classroom" / "release" / TINY.name / f"{TINY.name}.ipynb"
    return json.loads(path.read_text())


def hand_in(root: Path, student: str, notebook, name: str = f"{TINY.name}.ipynb") -> None:
    folder = root / "classroom" / "submitted" / student / TINY.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(notebook if isinstance(notebook, str) else json.dumps(notebook))


def known(cell: dict) -> str | None:
    return cell["metadata"].get("nbgrader", {}).get("grade_id")


def answer(notebook: dict, **other: str) -> dict:
    """Type in the answers, or others: double="...", total="..."."""
    for cell in notebook["cells"]:
        if known(cell) in ANSWERS:
            name = known(cell).removeprefix("01-")
            cell["source"] = other.get(name, ANSWERS[known(cell)])
    return notebook


def at(notebook: dict, name: str) -> int:
    return [known(cell) for cell in notebook["cells"]].index(name)


# ---- what students do --------------------------------------------------------------------------


def leaves_it_untouched(nb):
    pass


def tampers(nb):
    answer(nb, double="def double(x):\n    return 0")
    check = nb["cells"][at(nb, "01-double-check")]
    check["source"] = "assert True"
    check["metadata"]["nbgrader"]["points"] = 100


def has_checks_skipped(nb):
    answer(nb, double="def double(x):\n    return 0")
    nb["cells"][at(nb, "01-double-check")]["metadata"]["tags"] = ["skip-execution"]


def poses_as_a_check(nb):
    own = json.loads(json.dumps(nb["cells"][at(nb, "01-double-check")]))
    own["metadata"]["nbgrader"] |= {"grade_id": "bonus", "points": 100}
    own |= {"source": "100", "id": "bonus"}
    nb["cells"].append(own)


def deletes_checks_and_imports(nb):
    answer(nb)
    nb["cells"] = [c for c in nb["cells"] if "check" not in (known(c) or "")
                   and not "".join(c["source"]).startswith("import math")]


def deletes_an_answer(nb):
    answer(nb)
    del nb["cells"][at(nb, "01-double")]


def answers_in_a_cell_of_their_own(nb):
    answer(nb)
    cell = nb["cells"].pop(at(nb, "01-double"))
    nb["cells"].append(cell | {"metadata": {}, "id": "own", "source": "double = lambda x: 2 * x"})


def copies_a_cell(nb):
    answer(nb)
    for name in ("01-double", "01-total-check"):
        i = at(nb, name)
        nb["cells"].insert(i + 1, nb["cells"][i] | {"id": f"copy-{i}"})


def keeps_the_stub_beside_the_answer(nb):
    stub = nb["cells"][at(nb, "01-double")] | {"id": "stub"}
    answer(nb)
    nb["cells"].insert(at(nb, "01-double") + 1, stub)


def answers_twice(nb):
    answer(nb)
    i = at(nb, "01-double")
    second = nb["cells"][i] | {"id": "second", "source": "def double(x):\n    return 3 * x"}
    nb["cells"].insert(i, second)


def loops(nb):
    answer(nb, double="def double(x):\n    while True:\n        pass")


def warns(nb):
    answer(nb, double="import sys\n\n\ndef double(x):\n    print('beware', file=sys.stderr)\n"
                      "    return 2 * x")


def strips_the_metadata(nb):
    answer(nb)
    for cell in nb["cells"]:
        cell["metadata"] = {}


def strips_names_as_well(nb):
    strips_the_metadata(nb)
    for i, cell in enumerate(nb["cells"]):
        cell["id"] = f"new-{i}"


def strips_all_but_the_name(nb):
    answer(nb)
    for cell in nb["cells"]:
        if known(cell):
            cell["metadata"]["nbgrader"] = {"grade_id": known(cell)}


def turns_an_answer_into_text(nb):
    answer(nb)
    cell = nb["cells"][at(nb, "01-double")]
    cell["cell_type"] = "markdown"
    del cell["outputs"], cell["execution_count"]


def ends_the_kernel(nb):
    answer(nb, total="def total(numbers):\n    import os\n    os._exit(1)")


def hands_in_another_lesson(nb):
    nb["cells"] = [{"cell_type": "code", "id": "a", "metadata": {}, "outputs": [],
                    "execution_count": None, "source": "print('hello')"}]


# student -> (points, what the message must say), or (None, ...) for one who is refused
CLASS = {
    answer: (5, []),
    leaves_it_untouched: (0, []),
    tampers: (3, ["01-double-check was changed"]),
    has_checks_skipped: (3, []),
    poses_as_a_check: (0, []),
    deletes_checks_and_imports: (5, ["01-double-check was missing", "01-total-check was missing",
                                     "the first code cell was missing"]),
    deletes_an_answer: (3, ["01-double, the answer, was not found"]),
    answers_in_a_cell_of_their_own: (3, ["01-double, the answer, was not found"]),
    copies_a_cell: (5, ["01-double was there 2 times", "01-total-check was there 2 times"]),
    keeps_the_stub_beside_the_answer: (5, ["01-double was there 2 times"]),
    answers_twice: (None, ["01-double is there 2 times, with different answers"]),
    loops: (3, [f"01-double-check was stopped after {TIMEOUT} s"]),
    warns: (5, []),
    strips_the_metadata: (5, []),
    strips_names_as_well: (5, []),
    strips_all_but_the_name: (5, []),
    turns_an_answer_into_text: (5, []),
    ends_the_kernel: (None, ["the kernel ended in or before 01-total-check"]),
    hands_in_another_lesson: (None, ["none of the exercises", "01-double", "01-total"]),
}


@pytest.fixture(scope="session")
def fresh(tmp_path_factory):
    """A course with its student version made, to be copied."""
    root = course(tmp_path_factory.mktemp("course") / "a course")
    assert assignments(root) == [TINY.name]
    return root


@pytest.fixture(scope="module")
def root(fresh, tmp_path_factory):
    return shutil.copytree(fresh, tmp_path_factory.mktemp("class") / "a course")


@pytest.fixture(scope="module")
def rows(root):
    """The whole class, graded in one go: student -> row."""
    for do in CLASS:
        notebook = released(root)
        do(notebook)
        hand_in(root, do.__name__, notebook)
    hand_in(root, "no_json", "my answers:\n2 * x")
    hand_in(root, "no_notebook", "[1, 2]")
    hand_in(root, "odd_cells", {"nbformat": 4, "cells": [{"cell_type": "code", "id": [1],
                                "metadata": {"nbgrader": {"grade_id": {}}}, "source": ["1"]}]})
    hand_in(root, "old_format", {"nbformat": 3, "worksheets": []})
    (root / "classroom/submitted/a_folder" / TINY.name / f"{TINY.name}.ipynb").mkdir(parents=True)
    hand_in(root, "another_name", answer(released(root)), "Untitled (3).ipynb")
    hand_in(root, "two_names", "{}", "a.ipynb")
    hand_in(root, "two_names", "{}", "b.ipynb")
    (root / "classroom" / "submitted" / "nothing").mkdir()
    loose = root / "classroom" / "submitted" / "no_folder"
    loose.mkdir()
    (loose / "01_tiny.ipynb").write_text("{}")
    shutil.copytree(TINY, loose.parent / "wrong_folder" / "lesson_1")
    return {(row.student, row.lesson): row for row in grade(root, timeout=TIMEOUT)}


@pytest.mark.parametrize("student", [do.__name__ for do in CLASS])
def test_each_is_graded_fairly_or_refused_by_name(rows, student):
    points, messages = next(want for do, want in CLASS.items() if do.__name__ == student)
    row = rows[student, TINY.name]
    assert (row.points, row.max_points) == (points, 5), row
    assert row.status == ("refused" if points is None else "graded")
    for message in messages:
        assert message in row.message
    if not messages:
        assert row.message == ""
    assert str(row).startswith(f"{student}  {TINY.name}")


@pytest.mark.parametrize("student, lesson, message", [
    ("no_json", TINY.name, "01_tiny.ipynb is not a notebook"),
    ("no_notebook", TINY.name, "01_tiny.ipynb is not a notebook"),
    ("odd_cells", TINY.name, "none of the exercises is in it"),
    ("old_format", TINY.name, "01_tiny.ipynb has the old format 3"),
    ("a_folder", TINY.name, "01_tiny.ipynb is not a notebook (IsADirectoryError"),
    ("two_names", TINY.name, "01_tiny.ipynb is not there; there are ['a.ipynb', 'b.ipynb']"),
    ("no_folder", TINY.name, "01_tiny.ipynb should lie in a folder 01_tiny"),
    ("wrong_folder", "lesson_1", "no lesson that was given out"),
])
def test_files_that_are_no_lesson_are_refused(rows, student, lesson, message):
    assert (rows[student, lesson].points, rows[student, lesson].status) == (None, "refused")
    assert message in rows[student, lesson].message


def test_another_file_name_is_graded_and_said(rows):
    row = rows["another_name", TINY.name]
    assert (row.points, row.message) == (5, "Untitled (3).ipynb was taken for 01_tiny.ipynb")


def test_who_hands_in_nothing_has_a_row(rows):
    row = rows["nothing", TINY.name]
    assert (row.points, row.max_points, row.status) == (0, 5, "missing")


def read_csv(root: Path) -> dict:
    with (root / "classroom" / "grades.csv").open(newline="") as file:
        return {(line["student"], line["lesson"]): line for line in csv.DictReader(file)}


def test_the_table_has_a_line_for_each(rows, root):
    lines = read_csv(root)
    assert lines.keys() == rows.keys()
    for pair, row in rows.items():
        assert lines[pair]["points"] == ("" if row.points is None else str(row.points))
        assert float(lines[pair]["max_points"]) == row.max_points
        assert (lines[pair]["status"], lines[pair]["message"]) == (row.status, row.message)


def test_feedback_is_written_for_those_who_are_graded(rows, root):
    for (student, lesson), row in rows.items():
        page = root / "classroom" / "feedback" / student / lesson / f"{lesson}.html"
        assert page.exists() == (row.status == "graded"), student
    page = root / "classroom" / "feedback" / "leaves_it_untouched" / TINY.name / "01_tiny.html"
    assert "NotImplementedError" in page.read_text()


def test_what_was_handed_in_stays_as_it_was(rows, root):
    changed = released(root)
    tampers(changed)
    path = root / "classroom" / "submitted" / "tampers" / TINY.name / "01_tiny.ipynb"
    assert json.loads(path.read_text()) == changed


# ---- one student again -------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, fresh):
    """A course of its own, with two students."""
    here = shutil.copytree(fresh, tmp_path / "course")
    for student in ("ada", "bob"):
        hand_in(here, student, answer(released(here)))
    return here


def test_grading_again(small):
    """A better answer counts, one that is refused leaves no old grade, others stay as they were."""
    wrong = answer(released(small), double="def double(x):\n    return 3 * x")
    hand_in(small, "bob", wrong)
    assert [row.points for row in grade(small)] == [5, 3]
    hand_in(small, "bob", answer(released(small)))
    assert [(row.student, row.points) for row in grade(small, student="bob")] == [("bob", 5)]
    assert [line["points"] for line in read_csv(small).values()] == ["5.0", "5.0"]
    hand_in(small, "bob", "{}")
    (row,) = grade(small, student="bob", lesson=TINY.name)
    assert row.status == "refused"
    assert [line["points"] for line in read_csv(small).values()] == ["5.0", ""]
    assert not (small / "classroom" / "feedback" / "bob" / TINY.name).exists()
    assert (small / "classroom" / "feedback" / "ada" / TINY.name / "01_tiny.html").exists()


def test_private_checks_are_run(small, monkeypatch):
    monkeypatch.setenv("MINIDIFFUSER_PRIVATE_CHECKS", "our_checks")
    with pytest.raises(ValueError, match="our_checks"):
        grade(small)
    (small / "classroom" / "our_checks.py").write_text(
        "def check(exercise, namespace):\n"
        "    assert exercise == '01-double'\n"
        "    assert namespace['double']('ab') == 'abab', 'double of text'\n")
    hand_in(small, "bob", answer(released(small), double="def double(x):\n    return x * 2.0"))
    assert [row.points for row in grade(small)] == [5, 3]


def test_demonstrations_can_be_passed_over(small):
    notebook = answer(released(small))
    notebook["cells"][-1]["source"] += "\nprint('changed')"
    hand_in(small, "ada", notebook)
    (row,) = grade(small, student="ada", only_exercises=True)
    assert row.points == 5
    path = small / "classroom" / "autograded" / "ada" / TINY.name / "01_tiny.ipynb"
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    ran = ["".join(cell["source"]).split("\n")[0] for cell in cells if cell["execution_count"]]
    assert "double(21)" not in ran  # as it was
    assert {"import math", "sleep(0.1)"} <= set(ran)  # the first cell; one that was changed


# ---- student versions --------------------------------------------------------------------------


def test_nothing_is_left_in_the_student_version(root):
    text = json.dumps(released(root))
    assert "raise NotImplementedError" in text
    for secret in ("BEGIN", "fsum", "double(0.5)", "nothing is 0", "PRIVATE_CHECKS"):
        assert secret in (TINY / "01_tiny.ipynb").read_text()
        assert secret not in text
    for cell in released(root)["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count")


def edited(root: Path, old: str, new: str) -> Path:
    """The lesson with some of its text replaced."""
    path = root / "notebooks" / TINY.name / "01_tiny.ipynb"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return root


@pytest.mark.parametrize("old, new, message", [
    ("### BEGIN HIDDEN TESTS", "### BEGIN HIDDEN TEST", "'BEGIN HIDDEN TEST' would be left"),
    ("### END SOLUTION", "### the end", "no end solution statement found"),
    ('"grade_id": "01-total-check"', '"grade_id": "01-total"', "Duplicate grade id: 01-total"),
])
def test_a_lesson_that_is_out_of_order_is_not_given_out(tmp_path, fresh, old, new, message):
    root = edited(shutil.copytree(fresh, tmp_path / "course"), old, new)
    with pytest.raises(ValueError, match=message) as error:
        assignments(root)
    assert "01_tiny" in str(error.value)
    assert not list(root.glob("classroom/release/*/*.ipynb"))


def test_pictures_of_saved_sliders_are_not_given_out(tmp_path, fresh):
    root = edited(shutil.copytree(fresh, tmp_path / "course"), '"language_info": {',
                  '"widgets": {"state": "a picture"}, "language_info": {')
    assignments(root)
    assert released(root)["metadata"].keys() == {"kernelspec", "language_info"}


def test_lessons_without_exercises_are_no_assignments(tmp_path, fresh):
    root = shutil.copytree(fresh, tmp_path / "course")
    (root / "notebooks" / "00_read").mkdir()
    (root / "notebooks" / "00_read" / "00_read.ipynb").write_text(json.dumps({"cells": [
        {"cell_type": "code", "metadata": {}, "source": ["1"], "outputs": []}]}))
    assert assignments(root) == ["01_tiny"]
    with pytest.raises(ValueError, match="unknown lesson with exercises '00_read'"):
        assignments(root, "00_read")


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nbgrader_config"):
        assignments(tmp_path)
    root = course(tmp_path)
    with pytest.raises(ValueError, match="make assignments"):
        grade(root)
    release = root / "classroom" / "release" / "01_tiny"
    release.mkdir(parents=True)
    shutil.copy(TINY / "01_tiny.ipynb", release)
    with pytest.raises(ValueError, match="STUDENT/LESSON/LESSON"):
        grade(root)
    monkeypatch.setitem(sys.modules, "nbgrader", None)
    with pytest.raises(ValueError, match=r"minidiffuser\[classroom\]"):
        assignments(root)


# ---- the lessons themselves --------------------------------------------------------------------


@pytest.fixture(scope="module")
def lessons(tmp_path_factory):
    """The real lessons as a course, with student versions; their names."""
    root = tmp_path_factory.mktemp("lessons")
    shutil.copytree(ROOT / "notebooks", root / "notebooks")
    shutil.copy(ROOT / "nbgrader_config.py", root)
    return root, assignments(root)


def test_every_lesson_gives_away_nothing(lessons):
    root, names = lessons
    for name in names:
        given = json.loads((root / f"classroom/release/{name}/{name}.ipynb").read_text())
        assert given["metadata"].keys() <= {"kernelspec", "language_info"}
        assert not any(cell.get("outputs") for cell in given["cells"])
        left = {cell["id"]: "".join(cell["source"]) for cell in given["cells"]}
        for cell in json.loads((root / f"notebooks/{name}/{name}.ipynb").read_text())["cells"]:
            source, where = "".join(cell["source"]), f"{name}: {known(cell)}"
            for hidden in re.findall(REGION, source):
                assert not any(hidden in other for other in left.values()), where
            without = re.sub(REGION, "", source).replace(" ", "").strip("\n")
            stub = "#YOURCODEHERE\nraiseNotImplementedError()"
            assert left[cell["id"]].replace(" ", "").replace(stub, "").strip("\n") == without, where


@pytest.mark.slow
def test_reference_answers_get_full_marks_and_the_untouched_none(lessons):
    root, names = lessons
    for name in names:
        for student, version in (("reference", "notebooks"), ("untouched", "classroom/release")):
            shutil.copytree(root / version / name, root / "classroom/submitted" / student / name)
    rows = grade(root, only_exercises=True, timeout=120)
    assert len(rows) == 2 * len(names)
    for row in rows:
        assert row.status == "graded", row
        assert row.points == (row.max_points if row.student == "reference" else 0), row


# ---- the command line --------------------------------------------------------------------------


def test_solutions():
    for path in sorted(ROOT.glob("notebooks/*/*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if known(cell) and cell["metadata"]["nbgrader"]["solution"]:
                shown = solution(known(cell))
                assert solution(re.search(r"(?:def|class) (\w+)", shown)[1]) == shown
                assert "SOLUTION" not in shown
                assert [line for line in "".join(cell["source"]).splitlines()
                        if "SOLUTION" not in line] == shown.splitlines()
    with pytest.raises(ValueError, match="unknown exercise '02-posterior-men'.* '02-posterior"):
        solution("02-posterior-men")


def test_commands(tmp_path, fresh, monkeypatch):
    """They pass on what they are told, and print what comes back."""
    run = CliRunner().invoke
    here = shutil.copytree(fresh, tmp_path / "course")
    monkeypatch.chdir(here)
    assert run(classroom.app, ["assignments"]).output.strip().endswith("01_tiny/01_tiny.ipynb")
    asked = []
    monkeypatch.setattr(classroom, "grade", lambda *a: asked.append(a) or [
        classroom.Row("ada", "01_tiny", 3, 5, "graded", "late"),
        classroom.Row("bob", "01_tiny", None, 5, "refused", "why")])
    printed = run(classroom.app, ["grade", "--student", "ada", "--timeout", "9"]).output
    assert asked == [(here, None, "ada", 9, False)]
    assert printed.startswith("ada  01_tiny  3 of 5: late\nbob  01_tiny  refused: why\n")
    assert "def posterior" in run(classroom.app, ["solution", "02-posterior"]).output


# ---- the manuals -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["instructors.md", "learners.md"])
def test_manuals_name_what_there_is(name):
    text = (ROOT / "docs" / name).read_text()
    targets = re.findall(r"(?:^|`|=our_checks )make ([a-z]+)", text, re.MULTILINE)
    assert {"install", "assignments", "grade"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if f"\n{target}:" not in makefile] == []
    run = CliRunner().invoke
    for target, options in re.findall(r'make (\w+) ARGS="?([^"`]+)', text):
        known_to_it = run(classroom.app, [target, "--help"], env={"COLUMNS": "200"}).output
        assert [o for o in re.findall(r"--[a-z-]+", options) if o not in known_to_it] == []
    for lesson in re.findall(r"\b\d\d_[a-z_]+", text):
        assert (ROOT / "notebooks" / lesson).is_dir(), lesson


def test_the_private_check_of_the_manual_works():
    text = (ROOT / "docs" / "instructors.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    private, answers = {}, {"torch": torch}
    exec(code, private)
    exec(solution("01-perturb"), answers)
    private["check"]("01-perturb", answers)
    private["check"]("01-measure", {})
    with pytest.raises(AssertionError, match="at t = 0"):
        private["check"]("01-perturb", {"perturb": lambda x0, t, noise, alpha_bar: 0.5 * x0})
