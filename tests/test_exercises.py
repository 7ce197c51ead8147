"""Exercises tell right from wrong: reference answers pass, and so do other right ones; wrong
answers that learners really write fail with a message that names the symptom.

A lesson's answers lie in tests/wrong_answers/NN_topic.py.  Cells are run in this process.  A check
may use the lesson's first code cell, the answers, and earlier checks; so it can be graded when any
other cell of the notebook is broken or missing.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
HERE = Path(__file__).parent / "wrong_answers"


class Lesson:
    """A lesson's first code cell, its answers and its checks, by grade_id."""

    def __init__(self, name: str):
        self.name = name
        cells = json.loads((NOTEBOOKS / name / f"{name}.ipynb").read_text())["cells"]
        code = [c for c in cells if c["cell_type"] == "code"]
        self.setup = "".join(code[0]["source"])
        self.answers, self.checks, self.points, self.order = {}, {}, {}, []
        for cell in code:
            if meta := cell["metadata"].get("nbgrader"):
                grade_id, source = meta["grade_id"], "".join(cell["source"])
                self.order.append((grade_id, source))
                if meta["solution"]:
                    self.answers[grade_id] = source
                else:
                    self.checks[grade_id.removesuffix("-check")] = source
                    self.points[grade_id.removesuffix("-check")] = meta["points"]

    def namespace(self, exercise: str) -> dict:
        """What an answer to the exercise finds: all before it, rightly answered."""
        space = {"__name__": "__main__"}
        exec(self.setup, space)
        for grade_id, source in self.order:
            if grade_id == exercise:
                return space
            exec(source, space)
        raise KeyError(exercise)


@cache
def lesson(name: str) -> Lesson:
    return Lesson(name)


@cache
def before(name: str, exercise: str) -> dict:
    return lesson(name).namespace(exercise)


def attempt(name: str, exercise: str, answer: str) -> None:
    """Run an answer and its check."""
    space = dict(before(name, exercise))
    exec(answer, space)
    exec(lesson(name).checks[exercise], space)


def patched(reference: str, change) -> str:
    """The reference with some of its text replaced, or another text altogether."""
    if isinstance(change, str):
        return change
    for old, new in change.items():
        assert old in reference, f"the reference answer has no {old!r}"
        reference = reference.replace(old, new)
    return reference


def written_down(name: str):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NAMES = sorted(p.parent.name for p in NOTEBOOKS.glob("*/*.ipynb")
               if '"grade_id"' in p.read_text() and ".ipynb_checkpoints" not in p.parts)
EXERCISES = [(name, exercise) for name in NAMES for exercise in lesson(name).answers]
OTHERS = [pytest.param(name, exercise, change, id=f"{exercise}-{what}")
          for name in NAMES for exercise, answers in written_down(name).RIGHT.items()
          for what, change in answers.items()]
WRONGS = [pytest.param(name, exercise, change, word, id=f"{exercise}-{what}")
          for name in NAMES for exercise, answers in written_down(name).WRONG.items()
          for what, (change, word) in answers.items()]


@pytest.mark.parametrize("name, exercise", EXERCISES)
def test_the_reference_passes(name, exercise):
    attempt(name, exercise, lesson(name).answers[exercise])


@pytest.mark.parametrize("name, exercise, change", OTHERS)
def test_other_right_answers_pass(name, exercise, change):
    attempt(name, exercise, patched(lesson(name).answers[exercise], change))


@pytest.mark.parametrize("name, exercise, change, word", WRONGS)
def test_wrong_answers_fail_with_a_message_that_helps(name, exercise, change, word):
    assert word, "say what the message must name"
    answer = patched(lesson(name).answers[exercise], change)
    with pytest.raises(AssertionError) as failure:
        attempt(name, exercise, answer)
    assert word in str(failure.value), f"{failure.value} does not say {word!r}"


@pytest.mark.parametrize("name, exercise", EXERCISES)
def test_an_unanswered_exercise_fails(name, exercise):
    stub = lesson(name).answers[exercise]
    head, _, rest = stub.partition("### BEGIN SOLUTION")
    stub = head + "raise NotImplementedError()" + rest.partition("### END SOLUTION")[2]
    with pytest.raises(NotImplementedError):
        attempt(name, exercise, stub)


@pytest.mark.parametrize("name", NAMES)
def test_enough_of_each(name):
    found = lesson(name)
    assert 3 <= len(found.answers) <= 6
    assert found.answers.keys() == found.checks.keys()
    answers = written_down(name)
    for exercise in found.answers:
        assert len(answers.WRONG[exercise]) >= 5, exercise
        assert len(answers.RIGHT[exercise]) >= 2, exercise
        assert found.points[exercise] > 0
        check = found.checks[exercise]
        visible, _, hidden = check.partition("### BEGIN HIDDEN TESTS")
        assert all("assert" in tests or "expect(" in tests for tests in (visible, hidden))
        assert f'private_checks("{exercise}", globals())' in check
