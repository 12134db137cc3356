"""Both families behind one face, and the command that prints fresh problems and grades solutions."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

import ets_engine
from ets_engine.errors import ConfigError, ReferenceDomainError
from ets_engine.reference import (
    FAMILIES,
    canonical,
    check_domain,
    extract_answer,
    family_of,
    generate_problems,
    is_held_out,
    is_right_answer,
    is_solved,
    label_steps,
)
from ets_engine.reference.__main__ import check, main
from ets_engine.reference.problems import draw

HUNDRED = "Use 4, 6, 10 and 19 to make 100."
SOLUTION = "19-4=15 left 6 10 15\n15*6=90 left 10 90\n90+10=100"
STORY = (
    "Some friends compare what they have. Ana has 4 eggs. Compared with Ana, Ben owns 3 more eggs. Compared with Ben, "
    "Cara owns 2 times as many eggs. How many eggs does Cara have?"
)
STORY_STEPS = [
    "with Ana, Ben owns 3 more: Ana has 4, 4+3=7, Ben has 7",
    "with Ben, Cara owns 2 times as many: Ben has 7, 7*2=14, Cara has 14. Answer: 14",
]
STORY_SOLUTION = "\n".join(STORY_STEPS)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_drawn_problems_solve_and_split(family: str) -> None:
    module = FAMILIES[family]
    texts: dict[bool, set[str]] = {True: set(), False: set()}
    for held_out in texts:
        rng = Random(f"{family}/{held_out}")
        for i in range(60):
            problem, lines = draw(rng, family, module.LEVELS[i % len(module.LEVELS)], held_out=held_out)
            assert is_held_out(problem.problem) is held_out
            assert family_of(problem.problem) == problem.family == family
            assert canonical(problem.problem) == problem.problem, "what models are trained on is the canonical wording"
            assert is_solved(problem.problem, "\n".join(lines)) and is_right_answer(problem.problem, problem.answer)
            assert extract_answer(problem.problem, "\n".join(lines)) == problem.answer
            assert label_steps(problem.problem, lines) == [True] * len(lines)
            texts[held_out].add(problem.problem)
    assert not texts[True] & texts[False]


def test_an_eighth_is_held_out() -> None:
    rng = Random(0)
    texts = [FAMILIES["countdown"].generate(rng, 5)[0].render() for _ in range(2000)]
    assert 0.10 < sum(map(is_held_out, texts)) / len(texts) < 0.15  # 3 sigma around 1 / 8


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fresh_problems(family: str) -> None:
    levels = FAMILIES[family].LEVELS
    problems = list(generate_problems(family, None, seed=7, count=2 * len(levels)))
    assert [problem.level for problem in problems] == [*levels, *levels]
    assert all(is_held_out(problem.problem) for problem in problems)
    assert problems == list(generate_problems(family, None, seed=7, count=2 * len(levels)))
    assert problems[0] != next(generate_problems(family, None, seed=8, count=1))
    (one,) = generate_problems(family, levels[1], seed=7, count=1)
    assert one.level == levels[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chess", None, 0, 1), "chess"),
        (("countdown", 3, 0, 1), "level=3"),
        (("story", 2, 0, 1), "level=2"),
        (("story", None, 0, -1), "count=-1"),
    ],
)
def test_bad_arguments_are_refused_at_once(arguments: tuple[str, int | None, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        generate_problems(*arguments)


def test_answers() -> None:
    assert extract_answer(HUNDRED, SOLUTION) == "((19-4)*6)+10" and extract_answer(STORY, STORY_SOLUTION) == "14"
    assert extract_answer(HUNDRED, "no") is None and extract_answer(STORY, "no") is None
    assert is_right_answer(HUNDRED, "10+6*(19-4)") and not is_right_answer(HUNDRED, "100")
    assert is_right_answer(STORY, " 14 ") and not is_right_answer(STORY, "15") and not is_right_answer(STORY, "")
    assert label_steps(STORY, [STORY_STEPS[0], STORY_STEPS[1].replace("14", "15")]) == [True, False]
    assert is_solved(STORY, STORY_SOLUTION + "\n\n") and not is_solved(STORY, "Answer: 14")


def test_canonical() -> None:
    assert canonical(" use 19, 10, 6, and 4 to make 100") == HUNDRED
    assert canonical(STORY.replace(" ", "\n ")) == check_domain(STORY) == STORY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is 1+1?",
        "Use 1, 2 and 3 to make 6.",
        "Use 1, 2, 3, 4, 5, 6 and 7 to make 28.",
        STORY + " Why?",
        "x" * 5000,
    ],
)
def test_other_problems_are_refused_with_a_way_out(text: str) -> None:
    for function in (family_of, canonical, check_domain):
        with pytest.raises(ReferenceDomainError, match=r"4 to 6 numbers.*--model.*from_pretrained") as caught:
            function(text)
        assert len(str(caught.value)) < 600
    for grader in (is_solved, is_right_answer, extract_answer):
        with pytest.raises(ReferenceDomainError):
            grader(text, "1")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str, given: str = "") -> int:
    monkeypatch.setattr(sys, "argv", ["reference", *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO(given))
    return main()


def test_the_command_prints_fresh_problems() -> None:
    arguments = "--family countdown --level 4 --seed 7 --count 50".split()
    done = subprocess.run(
        [sys.executable, "-m", "ets_engine.reference", *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(ets_engine.__file__).parents[1],
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 50 and all(sorted(row) == ["answer", "family", "level", "problem"] for row in rows)
    assert {(row["family"], row["level"]) for row in rows} == {("countdown", 4)}
    assert all(is_right_answer(row["problem"], row["answer"]) and is_held_out(row["problem"]) for row in rows)
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [("--level", "3"), ("--family", "chess"), ("--count", "-1"), ("--count", "x")])
def test_bad_options_are_refused(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, *arguments)
    assert ended.value.code == 2 and capsys.readouterr().out == ""


def test_problems_that_were_printed_can_be_graded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--family", "story", "--count", "3") == 0
    printed = capsys.readouterr().out
    assert run(monkeypatch, "--check", given=printed + "\n\n") == 0
    graded = capsys.readouterr()
    assert [json.loads(line)["correct"] for line in graded.out.splitlines()] == [True] * 3
    assert graded.err == "correct 3 of 3\n"


@pytest.mark.parametrize(
    ("row", "correct"),
    [
        ({"problem": HUNDRED, "solution": SOLUTION}, True),
        ({"problem": HUNDRED, "solution": SOLUTION[:-1]}, False),
        ({"problem": HUNDRED, "text": SOLUTION, "answer": "((19-4)*6)+10", "steps": []}, True),  # `ets solve --json`
        ({"problem": HUNDRED, "text": "4-4=0", "answer": "((19-4)*6)+10"}, False),  # right by chance counts for nothing
        ({"problem": HUNDRED, "text": "", "answer": None}, False),  # nothing finished
        ({"problem": HUNDRED, "solution": SOLUTION, "text": "no", "answer": "1"}, True),
        ({"problem": HUNDRED, "solution": None, "text": SOLUTION}, True),
        ({"problem": HUNDRED, "answer": "10+6*(19-4)"}, True),
        ({"problem": HUNDRED, "answer": "10+6*(19-5)"}, False),
        ({"problem": HUNDRED, "answer": None}, False),
        ({"problem": STORY, "solution": STORY_SOLUTION}, True),
        ({"problem": STORY, "solution": STORY_SOLUTION + "\nso"}, False),
        ({"problem": STORY, "answer": "14"}, True),
        ({"problem": STORY, "answer": "41"}, False),
        ({"problem": STORY, "answer": None}, False),
    ],
)
def test_grades(row: dict[str, object], correct: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert check([json.dumps(row)]) == 0
    graded = capsys.readouterr()
    assert json.loads(graded.out) == row | {"correct": correct}
    assert graded.err == f"correct {int(correct)} of 1\n"


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "nonsense",
        "[" * 100_000,
        "[1]",
        "1",
        "null",
        "{}",
        json.dumps({"problem": HUNDRED}),
        json.dumps({"solution": SOLUTION}),
        json.dumps({"problem": 5, "answer": "1"}),
        json.dumps({"problem": HUNDRED, "answer": 0}),
        json.dumps({"problem": HUNDRED, "answer": 16}),
        json.dumps({"problem": HUNDRED, "solution": [SOLUTION]}),
        json.dumps({"problem": HUNDRED, "solution": 0, "answer": "1"}),
        json.dumps({"problem": "What is 1+1?", "answer": "2"}),
    ],
)
def test_lines_that_cannot_be_graded_are_named(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = json.dumps({"problem": STORY, "answer": "14"})
    assert check([good, line, good]) == 2
    graded = capsys.readouterr()
    assert graded.err.startswith("line 2: ") and graded.err.count("\n") == 1 and len(graded.err) < 700
    assert len(graded.out.splitlines()) == 1


def test_nothing_to_grade(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--check", given="") == 0
    assert capsys.readouterr().err == "correct 0 of 0\n"
