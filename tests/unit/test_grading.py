"""Problem files are read, and answers graded; without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ets_engine.errors import ConfigError
from ets_engine.evaluation import (
    EvalProblem,
    grade,
    load_problems,
)
from ets_engine.evaluation.gold import check_gold


def problem(answer: str, **more: str) -> EvalProblem:
    return EvalProblem(id="1", problem="?", answer=answer, **more)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_the_fields_of_known_files_are_understood(tmp_path: Path) -> None:
    gsm = {"question": "How many?", "answer": "2+2=<<2+2=4>>4\n#### 1,004", "idx": 7}
    mathematics = {"problem": "x?", "solution": "So $\\boxed{\\frac12}$.", "answer": "\\frac12", "level": 3}
    first, second = load_problems(write(tmp_path / "f.jsonl", gsm, "", mathematics))
    assert (first.id, first.problem, first.answer) == ("7", "How many?", "1,004") and "2+2" in first.solution
    assert (second.id, second.answer, second.level) == ("3", "\\frac12", "3")


def test_a_file_of_a_reference_family_is_graded_by_its_checker(tmp_path: Path) -> None:
    row = {"problem": "Use 2, 3, 9 and 9 to make 81.", "answer": "(3-2)*9*9", "family": "countdown", "level": 4}
    (one,) = load_problems(write(tmp_path / "f.jsonl", row))
    assert one.family == "countdown"
    assert grade(one, "(3-2)*9*9").lenient and not grade(one, "((3/3)*9)*9").lenient, "the same value, another number"
    (other,) = load_problems(write(tmp_path / "g.jsonl", row | {"problem": "1+1?", "answer": "2"}))
    assert other.family == "" and grade(other, "2").solved


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], ":1 is no JSON"),
        ([[1]], ":1 is no JSON object"),
        ([{"problem": "?"}], ":1 needs `problem`"),
        ([{"problem": "?", "answer": None}], ":1 needs `problem`"),
        ([{"problem": "?", "answer": 1, "id": 2}] * 2, "two problems have the id '2'"),
        ([], "holds no problem"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(tmp_path: Path, rows: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_problems(write(tmp_path / "f.jsonl", *rows))


def test_unknown_data_and_limits_are_refused() -> None:
    with pytest.raises(ConfigError, match="neither a file nor one of"):
        load_problems("nowhere.jsonl")
    with pytest.raises(ConfigError, match="limit=0"):
        load_problems("countdown", limit=0)


# ---------------------------------------------------------------- grading


@pytest.mark.parametrize(
    ("gold", "answer", "mode", "strict", "lenient"),
    [
        ("1/2", "\\frac{1}{2}", "math", True, True),
        ("1/2", "0.5", "math", False, True),
        ("x+1", "1+x", "math", False, True),
        ("12", "21", "math", False, False),
        ("1,000", "1000", "numeric", True, True),
        ("1000", "$1000.00", "numeric", False, True),
        ("1000", "a thousand", "numeric", False, False),
        ("2018/2019", "2019/2020", "math", False, False),
        ("2018/2019", "2019/2020", "numeric", False, False),
        ("12345", "12345.6", "math", False, False),
        ("12345", "12345.6", "numeric", False, False),
        ("1/3", "0.3333", "numeric", False, True),
        ("(2,3)", "3,2", "math", False, False),
        ("B", "`B`", "choice", True, True),
        ("B", "(b)", "choice", True, True),
        ("B", "B. 12 apples", "choice", True, True),
        ("B", "Because", "choice", False, False),
        ("B", "C", "choice", False, False),
        ("B", "B 12", "choice", True, True),
        ("B", "B Paris", "choice", True, True),
        ("B", "B) 12", "choice", True, True),
        ("B", "Option B", "choice", True, True),
        ("B", "option (B)", "choice", True, True),
        ("B", "**B**", "choice", True, True),
        ("B", "\\textbf{(B)}\\ 12", "choice", True, True),
        ("B", "B is right, A is not", "choice", True, True),
        ("B", "B, I think", "choice", True, True),
        ("D", "D. Both A and B.", "choice", True, True),
        ("C", "C. Vitamin A", "choice", True, True),
        ("A", "A. a cat", "choice", True, True),
        ("A", "A Paris", "choice", True, True),
        ("A", "A cat", "choice", False, False),
        ("I", "I think it is B", "choice", False, False),
        ("B", "B's", "choice", False, False),
        ("a cat", "a dog", "choice", False, False),
        ("A", "A, B", "choice", False, False),
        ("A", "A/B", "choice", False, False),
        ("A", "A-D", "choice", False, False),
        ("A", "a or b", "choice", False, False),
        ("A", "(A) and (B)", "choice", False, False),
        ("A", "A, or B", "choice", False, False),
        ("A", "A B", "choice", False, False),
        ("A", "A. Paris or B. Rome", "choice", False, False),
        ("A, C", "A", "choice", False, False),
        ("A, C", "C and A", "choice", True, True),
        ("Paris", " paris", "exact", False, True),
        ("Paris", "Paris.", "exact", False, False),
    ],
)
def test_answers_are_compared_as_the_mode_says(gold: str, answer: str, mode: Any, strict: bool, lenient: bool) -> None:
    assert grade(problem(gold), answer, mode=mode) == (strict, lenient, lenient)


def test_the_exact_checker_decides_where_there_is_one() -> None:
    given = EvalProblem(id="1", problem="Use 1, 2, 3 and 4 to make 10.", answer="((1+2)+3)+4", family="countdown")
    right = "3+4=7 left 1 2 7\n2+7=9 left 1 9\n1+9=10"
    assert grade(given, "((3+4)+2)+1", right) == (True, True, True)
    assert grade(given, "((3+4)+2)+1", right.replace("left 1 2 7", "left 1 2 8")) == (False, True, False)
    assert grade(given, "(3*4)-2", right) == (False, False, False), "an answer that leaves a number out"
    assert grade(given, None, right) == (False, False, False)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="mode='fuzzy'"):
        grade(problem("1"), "1", mode="fuzzy")  # type: ignore[arg-type]


def test_what_a_file_gets_wrong_about_itself_is_named() -> None:
    good = EvalProblem(id="good", problem="?", answer="4", solution="so \\boxed{4}")
    silent = EvalProblem(id="silent", problem="?", answer="5", solution="no idea")
    off = EvalProblem(id="off", problem="?", answer="6", solution="\\boxed{7}")
    found = check_gold([good, silent, off])
    assert (found.problems, found.worked, found.unread, found.wrong) == (3, 3, ("silent",), ("off",))
    assert found.confused == ()
    twins = [EvalProblem(id=str(i), problem="?", answer=one) for i, one in enumerate(("0.5", "1/2"))]
    assert (check_gold(twins).worked, check_gold(twins).confused) == (0, ("0", "1"))


@pytest.mark.parametrize(
    ("mode", "golds", "paired"),
    [
        ("choice", ("A. Paris", "A. Rome", "A. Oslo"), 0),
        ("choice", ("A. Paris", "A. Rome", "B. Oslo"), 3),
        ("exact", ("Yes", "yes "), 0),
        ("exact", ("Yes", "no"), 2),
        ("numeric", ("0.5", "1/2", "$50%$"), 3),
        ("numeric", ("0.5", "1/2"), 0),
        ("math", ("4", "4", "4", "5"), 4),
        ("math", ("4",), 0),
    ],
)
def test_only_answers_that_differ_are_told_apart(mode: Any, golds: tuple[str, ...], paired: int) -> None:
    found = check_gold([EvalProblem(id=str(i), problem="?", answer=one) for i, one in enumerate(golds)], mode)
    assert (found.paired, found.confused) == (paired, ())


def test_a_file_is_never_checked_in_an_unknown_mode() -> None:
    with pytest.raises(ConfigError, match="mode='fuzzy'"):
        check_gold([problem("1")], "fuzzy")  # type: ignore[arg-type]


# ---------------------------------------------------------------- methods
