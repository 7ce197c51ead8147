"""What check cells call: answers compared, mistakes named, the package's own answer refused."""

import sys
import types

import pytest
import torch

from minidiffuser.grading import PRIVATE, expect, forbid, private_checks
from minidiffuser.schedule import NoiseSchedule

WANT = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def said(*args, **how) -> str:
    with pytest.raises(AssertionError) as failure:
        expect(*args, **how)
    return str(failure.value)


def test_right_answers_pass_whatever_their_type_of_number():
    expect(WANT, WANT, "f()")
    expect(WANT.double() + 1e-6, WANT, "f()")
    expect(WANT.int(), WANT, "f()")
    expect(WANT.clone().requires_grad_(), WANT, "f()")


def test_a_known_mistake_is_named():
    assert said(2 * WANT, WANT, "f()", {"Halve it.": 2 * WANT}) == "Halve it."
    assert "f() is 3 at [0, 0], and should be 1" in said(3 * WANT, WANT, "f()", {"no": 2 * WANT})


def test_the_first_wrong_number_is_pointed_at():
    wrong = WANT.clone()
    wrong[1, 0] = 9
    assert said(wrong, WANT, "f()") == "f() is 9 at [1, 0], and should be 3."
    assert said(torch.tensor(5.0), torch.tensor(4.0), "f()") == "f() is 5, and should be 4."


def test_no_tensor_another_shape_and_nan():
    assert "Is a return missing?" in said(None, WANT, "f()")
    assert said([1.0], WANT, "f()").endswith("is list.")
    assert "(4,), and should have (2, 2)" in said(WANT.flatten(), WANT, "f()")
    assert "nan" in said(WANT / 0 * 0, WANT, "f()")


def test_the_tolerance_can_be_widened():
    said(WANT * 1.01, WANT, "f()")
    expect(WANT * 1.01, WANT, "f()", rtol=0.02)


def test_the_packages_answer_is_refused_and_given_back():
    schedule, t = NoiseSchedule(), torch.tensor([5.0, 7.0])
    with forbid("minidiffuser.schedule.NoiseSchedule.perturb"), \
            pytest.raises(AssertionError, match="Write it yourself"):
        schedule.perturb(WANT, t, WANT)
    assert schedule.perturb(WANT, t, WANT).shape == WANT.shape


def test_forbidding_what_is_not_there_is_noticed():
    with pytest.raises(AttributeError), forbid("minidiffuser.schedule.nothing"):
        pass


def test_private_checks(monkeypatch):
    monkeypatch.delenv(PRIVATE, raising=False)
    private_checks("01-perturb", {})  # nothing is named, so nothing is run

    asked = []
    module = types.ModuleType("my_checks")
    module.check = lambda lesson, space: asked.append((lesson, space["answer"]))
    monkeypatch.setitem(sys.modules, "my_checks", module)
    monkeypatch.setenv(PRIVATE, "my_checks")
    private_checks("01-perturb", {"answer": 42})
    assert asked == [("01-perturb", 42)]

    for name in ("not_to_be_found", "json"):
        monkeypatch.setenv(PRIVATE, name)
        with pytest.raises(RuntimeError, match=rf"{PRIVATE} is '{name}', which should be"):
            private_checks("01-perturb", {})
