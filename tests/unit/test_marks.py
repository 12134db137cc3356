"""Marks of a judge: what is one, and of what scale."""

import time

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
        ("Score: 9\n\nThe step correctly computes 3 + 4 = 7.", 10, 0.9),
        ("The score of this step is 9, as 3 + 4 = 7.", 10, 0.7),  # no label, so the last number
        ("I give it a score of 9, as 3 + 4 = 7.", 10, 0.9),
        ("A score of 10 means perfect. Rating = 7, for 3 + 4 = 7 is right but 2 is not.", 10, 0.7),
        ("Mark (0-10): 8\nIt says 2 + 2 = 4.", 10, 0.8),
        ("Score: 80%. It says 2 + 2 = 4.", 10, 0.8),
        ("Score: 8/10. It says 1/2 of 10 is 5.", 10, 0.8),
        ("Score: 4. No, on a second look the final score is 6. 3 + 4 = 7.", 10, 0.6),
        ("Score: -3, and 2 + 2 = 4", 10, None),
        ("Score: 12\n2 + 2 = 4", 10, None),
        ("10\n\nThe last step is right: 2 * 1 = 2.", 10, 1.0),
        ("9/10.\n\nThe last step is right: 2 * 1 = 2.", 10, 0.9),
        ("2 + 2 = 4\n9", 10, 0.9),
        ("**9**. All steps check out; the total of 42 is right.", 10, 0.9),
        ("Step **2** is wrong: 4", 10, 0.4),
        ("The last step scores a 9 on a scale from 0 to 10.", 10, 0.9),
        ("It is an 8 on a scale of 1-10.", 10, 0.8),
        ("-3", 10, None),
        ("12", 10, None),
        ("3/0", 10, None),
        ("fine", 10, None),
        ("", 10, None),
    ],
)
def test_marks(said: str, scale: float, mark: float | None) -> None:
    assert read_mark(said, scale) == mark


@pytest.mark.parametrize(
    "said",
    [
        "score (" * 30_000,
        "score:" + " " * 200_000,
        "\n" * 200_000 + "x",
        "*" * 200_000,
        "1 of " * 40_000,
        "1" * 200_000,
    ],
)
def test_nonsense_is_quick(said: str) -> None:
    started_s = time.process_time()
    read_mark(said, 10)
    assert time.process_time() - started_s < 1.0
