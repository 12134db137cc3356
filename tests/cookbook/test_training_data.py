"""What the PRM is trained on says exactly where a step goes wrong, and wastes little on padding."""

from __future__ import annotations

import sys
from itertools import cycle
from pathlib import Path
from random import Random
from types import ModuleType

import pytest

from ets_engine.reference.problems import label_steps
from ets_engine.reference.shipped import prm_path

TRAINING = Path(__file__).parents[2] / "cookbook" / "training"
STORY = (
    "Some friends compare what they have. Ben owns 3 boxes of 14 apples each. Dan has 5 cards. "
    "Compared with Ben, Cara owns 9 more apples. How many apples does Cara have?"
)


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TRAINING))
    import data

    assert Path(data.__file__).parent == TRAINING and sys.modules["data"] is data
    return data


@pytest.mark.parametrize(
    ("problem", "lines", "right"),
    [
        ("Use 4, 6, 10 and 19 to make 100.", ["19-4=15 left 6 10 16"], "19-4=15 left 6 10 1"),
        ("Use 4, 6, 10 and 19 to make 100.", ["19-4=25 left 6 10 25"], "19-4="),
        ("Use 4, 6, 10 and 19 to make 100.", ["19-4=15 left 6 10 15", "15*5=75 left 10 75"], "15*"),
        ("Use 4, 6, 10 and 19 to make 100.", ["7+4=11 left 6 10 11"], ""),
        (STORY, ["as Ben owns 3 boxes of 15: 3*15=45, Ben has 45"], "as Ben owns 3 boxes of 1"),
        (
            STORY,
            ["as Ben owns 3 boxes of 14: 3*14=42, Ben has 42", "with Ben, Cara owns 9 more: Ben has 24, 24+9=33"],
            "with Ben, Cara owns 9 more: Ben has ",
        ),
    ],
)
def test_a_step_goes_wrong_where_nothing_right_begins_like_it(
    data: ModuleType, problem: str, lines: list[str], right: str
) -> None:
    assert lines[-1][: data.slip_at(problem, lines)] == right


@pytest.mark.parametrize("family", ["countdown", "story"])
def test_tokens_are_wrong_from_the_slip_on(data: ModuleType, family: str) -> None:
    from transformers import AutoTokenizer

    encode = data.Encoder(AutoTokenizer.from_pretrained(prm_path()))
    rng, seen = Random(family), set()
    for _ in range(40):
        problem, lines, labels = data.shorten(rng, data.corrupted(rng, family))
        ids, steps, tokens, targets = data._verifier_row(encode, problem, lines, labels)
        assert len(ids) == len(steps) == len(tokens) == len(targets)
        assert [mark for mark in steps if mark >= 0] == [int(label) for label in labels]
        judged = [token for token in tokens if token >= 0]
        assert judged == sorted(judged, reverse=True), "wrong once, wrong for ever"
        assert all(token == step for token, step in zip(tokens, steps, strict=True) if step >= 0 and token >= 0)
        assert all(token == 1 for token, target in zip(tokens, targets, strict=True) if target >= 0)
        if False in labels:
            wrong = lines[: labels.index(False) + 1]
            right = wrong[-1][: data.slip_at(problem, wrong)]
            lead = [line for line in data.candidates(problem, wrong[:-1]) if line.startswith(right)]
            assert any(label_steps(problem, [*wrong[:-1], line])[-1] for line in lead)
            seen.add(len(right) > 0)
    assert seen == {True, False} or family == "story"


def test_batches_hold_rows_of_like_length(data: ModuleType) -> None:
    from transformers import AutoTokenizer

    encode = data.Encoder(AutoTokenizer.from_pretrained(prm_path()))
    rng = Random(0)
    samples = [data.corrupted(rng, "story") for _ in range(50)]
    batches = data.verifier_batches(encode, cycle(samples), 1000, 4)
    assert len(batches) == 4
    for ids, steps, tokens, targets in batches:
        assert ids.shape == steps.shape == tokens.shape == targets.shape
        assert (ids != encode.pad).float().mean() > 0.6
        assert (steps[ids == encode.pad] == -100).all() and (targets[ids == encode.pad] == -100).all()
