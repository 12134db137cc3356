"""What models, servers and files say is shown as it is by the commands: no markup, and nothing for the terminal."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import ets_engine.remote
from ets_engine import cli
from ets_engine.evaluation.records import Outcome, Record, Settings
from ets_engine.evaluation.summary import summarise
from ets_engine.evaluation.table import summary_view

ESCAPE = "\x1b]0;mine\x07\x1b[31mred\x1b[0m\x9b2J\u202e"
SHOWN = "red2J"


def ets(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words), env={"COLUMNS": "80"})


def printed(summary: Any) -> str:
    file = StringIO()
    Console(file=file, width=80, highlight=False).print(summary_view(summary))
    return file.getvalue()


def serve(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """Have every address lead to a server whose model says the same to everything."""

    def answer(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/completions"):
            return httpx.Response(404)
        count = json.loads(request.content).get("n", 1)
        choices = [{"index": place, "text": said, "finish_reason": "stop"} for place in range(count)]
        return httpx.Response(200, json={"choices": choices})

    connect = ets_engine.remote.connect
    how: dict[str, Any] = {"template": "[/b] {problem}", "transport": httpx.MockTransport(answer), "retries": 0}
    monkeypatch.setattr(ets_engine.remote, "connect", lambda *given, **more: connect(*given, **{**more, **how}))


@pytest.mark.parametrize("answer", ["[/b]", "[a,b]", "[red]2", "[link=http://b]2"])
def test_check_shows_a_models_answer_whatever_it_is(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    serve(monkeypatch, f"So it is \\boxed{{{answer}}}.")
    done = ets("check", "--model", "openai:http://a/v1#[/m]")
    assert (done.exit_code, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert f"Trial search: answer {answer}, " in text
    assert "policy: model [/m] at http://a/v1" in text and "prompts the problem in '[/b] {problem}'" in text


def test_a_table_of_results_leaves_the_terminal_alone() -> None:
    told = {"model": ESCAPE, "verifier": "v", "weights": "w", "data": ESCAPE, "search": {}, "device": "cpu"}
    settings = Settings(**told, dtype="float32", machine={}, copy_gb_s=1.0)
    votes = {"weighted": Outcome(answer=None, strict=False, lenient=False, solved=False)}
    where: dict[str, Any] = {"problem": "p", "digest": "", "seed": 0, "concurrency": 4, "outcomes": votes}
    record = Record(method="ets@4", level=ESCAPE, error=f"answered 500: {ESCAPE}", **where)
    text = printed(summarise([settings, record]))
    assert all(sign == "\n" or sign.isprintable() for sign in text), text
    assert f"answered 500: {SHOWN}" in text and f"{SHOWN}:0" in text


def test_ids_of_a_file_leave_the_terminal_alone(tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"id": ESCAPE, "problem": "?", "answer": "4", "solution": "no idea"}))
    done = ets("grade", str(file))
    assert done.exit_code == 1 and f"no answer found: {SHOWN}\n" in done.stdout
    assert all(sign == "\n" or sign.isprintable() for sign in done.stdout)
