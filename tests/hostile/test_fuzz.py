"""A short, repeatable part of `make fuzz`: the same cases in every run."""

import fuzz
import pytest

CASES = {"grade math": 200, "recipe": 200, "dataset": 150}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_only_messages_and_right_verdicts_come_out(name):
    cases = CASES.get(name, 80)
    assert fuzz.run(name, cases, derandomize=True) >= 0.8 * cases
