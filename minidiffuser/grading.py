"""What the check cells of the lessons call: comparing an answer, and saying what is wrong with it.

    with forbid("minidiffuser.schedule.NoiseSchedule.perturb"):
        expect(perturb(x0, t, noise, alpha_bar), want, "perturb(...)",
               {"That is sigma squared.": value_of_that_mistake})
    private_checks("01-perturb", globals())
"""

import importlib
import os
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

PRIVATE = "MINIDIFFUSER_PRIVATE_CHECKS"  # the environment variable that names the module


def expect(
    got: Any,
    want: Tensor,
    what: str,
    mistakes: Mapping[str, Tensor] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-6,
) -> None:
    """Compare an answer with the right one; where they differ, name the likely mistake.

    Args:
        got: what the learner's function returned.
        want: what it should have.
        what: the call, as the learner would write it.
        mistakes: message -> what that mistake would have returned; the first that fits is said.

    Raises:
        AssertionError: not a tensor, another shape, nan, or other numbers.
    """
    if not isinstance(got, Tensor):
        hint = " Is a return missing?" if got is None else ""
        raise AssertionError(f"{what} should be a tensor and is {type(got).__name__}.{hint}")
    if got.shape != want.shape:
        raise AssertionError(f"{what} has the shape {tuple(got.shape)}, and should have "
                             f"{tuple(want.shape)}.")
    got, want = got.detach().double(), want.double()
    if _close(got, want, rtol, atol):
        return
    for message, value in (mistakes or {}).items():
        if value.shape == got.shape and _close(got, value.double(), rtol, atol):
            raise AssertionError(message)
    if got.isnan().any():
        raise AssertionError(f"{what} has nan in it: inf / inf, 0 / 0, or the log or root of a "
                             "number below 0.")
    wrong = (~got.isclose(want, rtol=rtol, atol=atol)).nonzero()[0].tolist()
    place = f" at {wrong}" if wrong else ""
    raise AssertionError(f"{what} is {got[tuple(wrong)]:.6g}{place}, and should be "
                         f"{want[tuple(wrong)]:.6g}.")


@contextmanager
def forbid(*names: str) -> Iterator[None]:
    """While a check runs, the package's own answer refuses to be called.

    Args:
        names: dotted, such as ``"minidiffuser.schedule.NoiseSchedule.perturb"``.  A method is
            refused on instances made earlier too; a plain function that the learner has imported
            by name is not, so forbid what it calls.

    Raises:
        AssertionError: out of the forbidden function, when it is called.
        AttributeError, ImportError: there is no such name.
    """
    with ExitStack() as stack:
        for name in names:
            owner, _, attribute = name.rpartition(".")
            stack.enter_context(patch.object(pkgutil.resolve_name(owner), attribute,
                                             _refusal(name)))
        yield


def private_checks(lesson: str, namespace: dict[str, Any]) -> None:
    """Run an instructor's further checks, if there are any.

    They live in the module that the environment variable ``MINIDIFFUSER_PRIVATE_CHECKS`` names, as
    ``check(lesson, namespace)``, which raises AssertionError for a wrong answer.  Without the
    variable this does nothing.

    Args:
        lesson: the lesson and exercise, which is the check cell's grade_id without its "-check".
        namespace: the notebook's globals, with the learner's functions.

    Raises:
        RuntimeError: the variable names a module that cannot be used.
    """
    if not (name := os.environ.get(PRIVATE)):
        return
    try:
        check = importlib.import_module(name).check
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"{PRIVATE} is {name!r}, which should be an importable module with a "
                           f"function check(lesson, namespace): {error}") from error
    check(lesson, namespace)


def _close(a: Tensor, b: Tensor, rtol: float, atol: float) -> bool:
    return torch.allclose(a, b, rtol=rtol, atol=atol)


def _refusal(name: str):
    def refuse(*args, **kwargs):
        raise AssertionError(f"Your answer calls {name}, which is the package's answer to this "
                             "exercise. Write it yourself, from the equation above.")

    return refuse
