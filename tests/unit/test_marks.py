"""Marks of a judge: what is one, and of what scale."""

import pytest

from ets_engine.marks import read_mark


@pytest.mark.parametrize(
    ("said", "scale", "mark"),
    [
        ("0.8", 1, 0.8),
        ("Score: 8", 10, 0.8),
        ("8/10", 10, 0.8),
        ("2 (out of 10)", 10, 0.2),
        ("**Score:** 2/10 points", 10, 0.2),
        ("4 out of 5, as step 2 is loose", 5, 0.8),
        ("80/100", 5, 0.8),
        ("80%", 10, 0.8),
        ("The probability 1/2 is right. 9", 10, 0.9),
        ("2 of 3 steps are fine. 4", 10, 0.4),
        ("It improves by 50%. Score: 2", 10, 0.2),
        ("1/2 is right.", 10, None),
        ("<think> Step 1 gives 7 and then", 10, None),
        ("<think>4</think> 9 <think>so", 10, None),
        ("<think>2/10? No.</think>\n\n9", 10, 0.9),
        ("<think>8</think>\n\nIt is fine.", 10, None),
        ("1. The sum is right.\n2. So is the rest.\n10", 10, 1.0),
        ("-3", 10, None),
        ("12", 10, None),
        ("3/0", 10, None),
        ("fine", 10, None),
        ("", 10, None),
    ],
)
def test_marks(said: str, scale: float, mark: float | None) -> None:
    assert read_mark(said, scale) == mark
