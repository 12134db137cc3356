"""Our selectors reproduce recorded published selections, and the replay notices when they do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = HERE / "published_selection_cases.json"


def replay(path: Path) -> subprocess.CompletedProcess[str]:
    """Run the replay in a fresh process, as a reader would."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(
        [sys.executable, str(HERE / "replay.py"), str(path)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_all_recorded_cases_agree() -> None:
    done = replay(CASES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr == "60 of 60 cases agree\n"


def corrupt(cases: list[dict], what: str) -> int:
    """Falsify one case and return its number."""
    with_objective = next(
        n for n, case in enumerate(cases) if case["method"] == "softmax_costmodel" and case["lambda_d"]
    )
    number = {
        "beam shares": next(n for n, case in enumerate(cases) if case["method"] == "beam_search"),
        "rebase shares": next(n for n, case in enumerate(cases) if case["method"] == "softmax"),
    }.get(what, with_objective)
    case = cases[number]
    match what:
        case "objective":
            case["objective"] += 1e-6
        case "kept":
            case["kept"] = case["kept"][:-1]
        case "kv tokens":
            case["kv_tokens"] += 1
        case "score":
            case["nodes"][case["kept"][0]]["score"] = 0.0
        case "embedding":
            for leaf in case["frontier"]:
                case["nodes"][leaf]["embedding"] = case["nodes"][case["frontier"][0]]["embedding"]
        case "one child too many":  # on the last leaf served, where the published code itself can overshoot
            served = [place for place, share in enumerate(case["shares"]) if share]
            scores = [case["nodes"][leaf]["score"] for leaf in case["frontier"]]
            case["shares"][min(served, key=lambda place: scores[place])] += 1
        case "missing field":
            del case["width"]
        case "score out of range":
            case["nodes"][case["kept"][0]]["score"] = 1.5
        case "no case":
            cases[number] = 5
        case _:
            best = case["shares"].index(max(case["shares"]))
            case["shares"][best] -= 1
    return number


@pytest.mark.parametrize(
    "what",
    [
        "objective",
        "kept",
        "kv tokens",
        "score",
        "embedding",
        "one child too many",
        "missing field",
        "score out of range",
        "no case",
        "ets shares",
        "beam shares",
        "rebase shares",
    ],
)
def test_a_falsified_case_is_reported(what: str, tmp_path: Path) -> None:
    cases = json.loads(CASES.read_text())
    number = corrupt(cases, what)
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    done = replay(path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stdout.startswith(f"case {number} ")
    assert done.stderr == "59 of 60 cases agree\n"


def test_every_falsified_case_gets_its_line(tmp_path: Path) -> None:
    cases = json.loads(CASES.read_text())
    for case in cases[::2]:
        case["kv_tokens"] += 1
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases))
    done = replay(path)
    assert done.returncode == 1
    assert [line.split()[1] for line in done.stdout.splitlines()] == [str(number) for number in range(0, 60, 2)]
    assert done.stderr == "30 of 60 cases agree\n"


@pytest.mark.parametrize("text", [None, "no", '{"cases": []}'])
def test_a_file_without_cases_is_refused_in_one_line(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    if text is not None:
        path.write_text(text)
    done = replay(path)
    assert done.returncode == 2
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1 and str(path) in done.stdout


def test_no_cases_is_not_agreement(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text("[]")
    assert replay(path).returncode == 1
