"""Models behind servers by name: one engine for each while somebody holds it, and what is no use with them."""

from __future__ import annotations

import gc
import pickle
import weakref
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ets_engine import cli
from ets_engine.errors import ConfigError
from ets_engine.evaluation.session import Plan
from ets_engine.service import ETSEngine
from ets_engine.services import find_service

ADDRESS = "openai:http://127.0.0.1:9#served"  # connecting asks nothing, so nobody need be there


@pytest.mark.parametrize("verifier", [None, f"judge:{ADDRESS}"])
def test_a_pickle_holds_the_address_and_finds_the_same_engine(verifier: str | None) -> None:
    engine = find_service(ADDRESS, verifier)
    assert pickle.loads(pickle.dumps(engine)) is engine


def test_an_address_written_in_another_way_is_the_same() -> None:
    engine = find_service(ADDRESS)
    assert find_service("openai:http://127.0.0.1:9/v1/#served") is engine


def test_nobody_keeps_an_engine_alive_that_nobody_uses() -> None:
    engine = weakref.ref(find_service(ADDRESS.replace("served", "left")))
    gc.collect()
    assert engine() is None


@pytest.mark.parametrize("verifier", [ADDRESS, f"judge:{ADDRESS}", f"pooling:{ADDRESS}"])
def test_a_served_verifier_is_no_model_to_load(verifier: str) -> None:
    with pytest.raises(ConfigError, match=r"goes with a policy behind a server, model='openai:...'; here pass a PRM"):
        ETSEngine.from_pretrained("reference", verifier)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "a PRM's name, judge:openai:URL#model or pooling:openai:URL#model"),
        (["--verifier", f"judge:{ADDRESS}", "--verifier-format", "trl"], "--verifier-format has no effect"),
        (["--verifier", f"judge:{ADDRESS}", "--step-separator", "|"], "--step-separator has no effect"),
    ],
    ids=["no verifier", "format", "separator"],
)
def test_solve_says_what_is_no_use(options: list[str], said: str) -> None:
    done = CliRunner().invoke(cli.app, ["solve", "1+1?", "--model", ADDRESS.replace("//", "//me:secret@"), *options])
    assert done.exit_code == 2 and done.stderr.count("\n") == 1
    assert said in done.stderr and "logprob" not in done.stderr and "secret" not in done.stderr


NO_ENDS = "name such texts: ets_engine.remote.connect(boundaries=[...])"


@pytest.mark.parametrize(
    ("words", "preset", "said"),
    [
        pytest.param(["solve", "1+1?"], "llama3", NO_ENDS, id="solve, no ends"),
        pytest.param(["check"], "llama3", NO_ENDS, id="check, no ends"),
        pytest.param(["bench", "--out"], "llama3", NO_ENDS, id="bench, no ends"),
        pytest.param(["bench", "--out"], "llama", "preset='llama' is unknown", id="bench, unknown"),
        pytest.param(["solve", "1+1?"], "reference", "the shipped reference models only know", id="solve, no family"),
    ],
)
def test_a_preset_that_does_not_fit_is_one_line(words: list[str], preset: str, said: str, tmp_path: Path) -> None:
    words = [*words, str(tmp_path)] if words[-1] == "--out" else words
    options = ["--model", ADDRESS, "--verifier", f"judge:{ADDRESS}", "--preset", preset]
    done = CliRunner().invoke(cli.app, [*words, *options])
    assert done.exit_code in (1, 2) and done.stderr.count("\n") == 1 and said in done.stderr


def test_a_bench_of_a_served_model_needs_a_verifier(tmp_path: Path) -> None:
    address = ADDRESS.replace("//", "//me:hunter2@")
    with pytest.raises(ConfigError, match=r"^model='openai:...' needs a model that scores its steps"):
        Plan(out=tmp_path, model=address)
    done = CliRunner().invoke(cli.app, ["bench", "--out", str(tmp_path / "out"), "--model", address])
    assert done.exit_code == 2 and "hunter2" not in done.stderr and not (tmp_path / "out").exists()
