"""The `ets` command against an engine that never loads a model: exit codes, streams, contradictions, Ctrl-C."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import ets_engine
from ets_engine import cli
from ets_engine.config import SearchConfig
from ets_engine.errors import (
    ConfigError,
    ContextLengthError,
    ETSError,
    ModelLoadError,
    PoolExhaustedError,
    ProtocolError,
    ReferenceDomainError,
    UnsupportedModelError,
)
from ets_engine.search import run, search, trajectories
from ets_engine.testing import FakePolicy, HashEmbedder, TableVerifier
from ets_engine.types import Candidate, SearchResult, Timing

ROOT = Path(ets_engine.__file__).parents[1]
NO_ANSWER = {"answer": None, "candidates": (), "trajectories": 0}
PROBLEM = "Use 4, 6, 10 and 19 to make 16."


class FakeEngine:
    """Grows a tree of made-up steps; remembers how it was loaded and asked."""

    def __init__(self, *, error=None, **changes):
        self.error, self.changes = error, changes
        self.loaded = self.asked = None
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def search(self, problem, config, *, on_event, cancel):
        if self.error is not None:
            raise self.error
        self.asked = (problem, config)
        policy, embedder = FakePolicy(seed=3), HashEmbedder()
        tree = run(search(config), policy, TableVerifier(), embedder, on_event=on_event, should_stop=cancel.is_set)
        best = max(trajectories(tree, "last"), key=lambda path: path.score)
        answer = best.text.split()[-1]
        fields = {
            "problem": problem,
            "text": best.text,
            "answer": answer,
            "score": best.score,
            "steps": best.steps,
            "candidates": (Candidate(answer=answer, votes=1, weight=1.0, score=best.score, steps=best.steps),),
            "finish_reason": "cancelled" if tree.stopped else "stop",
            "prompt_tokens": 8,
            "generated_tokens": tree.generated_tokens,
            "verifier_tokens": 0,
            "path_tokens": best.num_tokens,
            "trajectories": len(tree.finished),
            "num_errors": 0,
            "kv": None,
            "verifier_kv": None,
            "timing": Timing(wall_s=1, policy_s=1, verifier_s=0, select_s=0, bytes_moved=0, decode_steps=1),
            "strategy": config.strategy,
            "width": config.width,
            "seed": config.seed,
            "trace": tree.trace() if config.trace else None,
        }
        return SearchResult.model_validate({**fields, **self.changes})


@pytest.fixture
def ets(monkeypatch):
    """Run `ets solve` in this process on a fake engine."""

    def command(*words, engine=None, stdin=None):
        engine = FakeEngine() if engine is None else engine

        def load(*how):
            engine.loaded = how
            return engine

        monkeypatch.setattr(cli, "load_engine", load)
        return CliRunner().invoke(cli.app, ["solve", *words], input=stdin)

    return command


def assert_fails(done, code, *words):
    """The exit code, nothing on standard output, one line on standard error that holds these words."""
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith("ets: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_an_answer_is_shown_and_exits_0(ets):
    engine = FakeEngine()
    done = ets(PROBLEM, "--width", "4", engine=engine)
    assert (done.exit_code, done.stderr) == (0, "")
    assert PROBLEM in done.stdout and "Answer" in done.stdout and "path to the answer" not in done.stdout
    assert engine.closed


def test_options_become_settings(ets):
    engine = FakeEngine()
    options = {
        "--model": "m",
        "--verifier": "v",
        "--device": "cpu",
        "--strategy": "ets",
        "--width": 8,
        "--seed": 7,
        "--temperature": 0.5,
        "--max-tokens": 300,
        "--max-step-tokens": 20,
        "--lambda-b": 0.25,
        "--lambda-d": 0,
        "--kv-budget": 900,
    }
    done = ets("Any problem", *(str(word) for pair in options.items() for word in pair), engine=engine)
    assert done.exit_code == 0, done.stderr
    model, verifier, engine_config = engine.loaded
    assert (model, verifier, engine_config.device) == ("m", "v", "cpu")
    assert engine.asked == (
        "Any problem",
        SearchConfig(
            strategy="ets",
            width=8,
            seed=7,
            temperature=0.5,
            max_tokens=300,
            max_step_tokens=20,
            lambda_b=0.25,
            lambda_d=0.0,
            kv_budget_tokens=900,
        ),
    )


def test_without_options_the_defaults_of_the_library_hold(ets):
    engine = FakeEngine()
    assert ets(PROBLEM, engine=engine).exit_code == 0
    assert engine.loaded[:2] == ("reference", None)
    assert engine.asked == (PROBLEM, SearchConfig())


def test_help_states_the_defaults_of_the_library():
    text = " ".join(CliRunner().invoke(cli.app, ["solve", "--help"]).stdout.split())
    for option, field in [
        ("--strategy", "strategy"),
        ("--width", "width"),
        ("--seed", "seed"),
        ("--temperature", "temperature"),
        ("--max-tokens", "max_tokens"),
        ("--max-step-tokens", "max_step_tokens"),
        ("--lambda-b", "lambda_b"),
        ("--lambda-d", "lambda_d"),
    ]:
        description = text.split(f" {option} ")[1].split(" --")[0]
        assert f"[default: {SearchConfig.model_fields[field].default}]" in description, option


def test_no_option_is_shown_by_its_own_name():
    """Typer 0.27 drops an option whose metavar is its name in capitals."""
    commands = typer.main.get_command(cli.app).commands
    assert len(commands) >= 6
    for command in commands.values():
        for one in command.params:
            is_option = one.param_type_name == "option"
            assert not (is_option and (one.metavar or "").lower() == one.name), (command.name, one.name)


def test_json_is_the_whole_result_and_nothing_else(ets):
    done = ets(PROBLEM, "--json")
    result = SearchResult.model_validate_json(done.stdout)
    assert (done.exit_code, done.stderr, result.problem, result.trace) == (0, "", PROBLEM, None)
    assert set(json.loads(done.stdout)) == set(SearchResult.model_fields)


def test_json_with_tree_holds_the_trace_and_draws_nothing(ets):
    done = ets(PROBLEM, "--json", "--tree", "--width", "4")
    assert len(SearchResult.model_validate_json(done.stdout).trace) > 4


def test_json_of_a_search_without_an_answer_is_whole_too(ets):
    done = ets(PROBLEM, "--json", engine=FakeEngine(**NO_ANSWER, finish_reason="length"))
    assert done.exit_code == 1
    assert SearchResult.model_validate_json(done.stdout).answer is None
    assert done.stderr == "ets: no answer: every branch ran out of tokens; raise --max-tokens or --width\n"


def test_tree_is_drawn_below_the_result(ets):
    done = ets(PROBLEM, "--tree", "--width", "4")
    assert done.exit_code == 0
    assert done.stdout.index("Answer") < done.stdout.index("path to the answer")


def test_a_dash_reads_the_problem_from_standard_input(ets):
    engine = FakeEngine()
    assert ets("-", stdin=f"\n{PROBLEM}\n\n", engine=engine).exit_code == 0
    assert engine.asked[0] == PROBLEM


@pytest.mark.parametrize(
    ("words", "stdin", "said"),
    [
        (["-"], "", "PROBLEM is empty"),
        ([" \n"], None, "PROBLEM is empty"),
        (["-"], b"\xff\xfe", "not valid UTF-8"),
        (["Use \udcff"], None, "not valid UTF-8"),
        (["What is 2+2?"], None, "--model NAME_OR_PATH"),
        ([PROBLEM, "--strategy", "magic"], None, "'ets_kv'"),
        ([PROBLEM, "--width", "0"], None, "width=0"),
        ([PROBLEM, "--temperature", "nan"], None, "temperature=nan"),
        ([PROBLEM, "--strategy", "beam", "--kv-budget", "500"], None, "'beam' cannot honour a KV budget"),
        ([PROBLEM, "--strategy", "ets_published", "--kv-budget", "500"], None, "kv_budget_tokens=500"),
        ([PROBLEM, "--strategy", "rebase", "--lambda-b", "1"], None, "--lambda-b has no effect with strategy 'rebase'"),
        ([PROBLEM, "--strategy", "ets_kv", "--lambda-d", "1"], None, "--lambda-d has no effect with strategy 'ets_kv'"),
        ([PROBLEM, "--strategy", "greedy", "--width", "4"], None, "--width 4 has no effect with strategy 'greedy'"),
        ([PROBLEM, "--strategy", "greedy", "--temperature", "1"], None, "--temperature 1 has no effect"),
        ([PROBLEM, "--model", "mine"], None, "pass --verifier"),
    ],
)
def test_bad_usage_exits_2_before_anything_is_loaded(ets, words, stdin, said):
    engine = FakeEngine()
    assert_fails(ets(*words, stdin=stdin, engine=engine), 2, said)
    assert engine.loaded is None


def test_an_unknown_option_exits_2(ets):
    done = ets(PROBLEM, "--widht", "4")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--width" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("what was asked\nfor"), 2),
        (ReferenceDomainError("what was asked\nfor"), 2),
        (ContextLengthError("what was asked\nfor"), 2),
        (ETSError("what was asked\nfor"), 1),
        (ModelLoadError("what was asked\nfor"), 1),
        (UnsupportedModelError("what was asked\nfor"), 1),
        (PoolExhaustedError("what was asked\nfor"), 1),
        (ProtocolError("what was asked\nfor"), 1),
    ],
)
def test_every_error_is_one_line_and_says_whose_it_is(ets, error, code):
    engine = FakeEngine(error=error)
    assert_fails(ets(PROBLEM, engine=engine), code, "ets: what was asked for\n")
    assert engine.closed


def test_an_unforeseen_error_is_one_line_unless_its_traceback_is_wanted(ets, monkeypatch):
    monkeypatch.delenv("ETS_TRACEBACK", raising=False)
    engine = FakeEngine(error=ZeroDivisionError("what happened"))
    assert_fails(ets(PROBLEM, engine=engine), 1, "ZeroDivisionError: what happened", "ETS_TRACEBACK=1")
    monkeypatch.setenv("ETS_TRACEBACK", "1")
    assert isinstance(ets(PROBLEM, engine=engine).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("cancelled", "stopped before"),
        ("error", "every branch failed"),
        ("no_answer", "; raise --width or try another"),
    ],
)
def test_no_answer_exits_1_and_still_shows_what_it_cost(ets, reason, said):
    done = ets(PROBLEM, engine=FakeEngine(**NO_ANSWER, finish_reason=reason))
    assert done.exit_code == 1
    assert done.stderr.startswith("ets: no answer: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert "Tokens" in done.stdout


def test_version():
    assert CliRunner().invoke(cli.app, ["--version"]).stdout == f"ets {ets_engine.__version__}\n"


def test_help_is_light():
    code = (
        "import sys; from ets_engine import cli\n"
        "try: cli.app(['solve', '--help'])\n"
        "except SystemExit: print({'torch', 'transformers', 'numpy', 'scipy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "PROBLEM" in done.stdout and done.stdout.endswith("set()\n")


# ---- Ctrl-C: a process of its own, and real signals

SLOW_ENGINE = """
    import sys, threading, time
    from ets_engine import cli
    from test_cli import FakeEngine

    class Slow(FakeEngine):
        def search(self, problem, config, *, on_event, cancel):
            print("searching", file=sys.stderr, flush=True)
            while not cancel.is_set() or {stubborn}:
                time.sleep(0.01)
            print("stopping", file=sys.stderr, flush=True)
            return super().search(problem, config, on_event=on_event, cancel=threading.Event())

    def load(*_):
        if {loading}:
            print("searching", file=sys.stderr, flush=True)
            time.sleep(60)
        return Slow(finish_reason="cancelled", **{changes})

    cli.load_engine = load
    cli.main()
"""


@pytest.fixture
def start():
    """Start `ets solve` with an engine that searches until it is told to stop; no process outlives its test."""
    processes = []

    def command(*words, stubborn=False, loading=False, stderr=subprocess.PIPE, **changes):
        code = textwrap.dedent(SLOW_ENGINE).format(stubborn=stubborn, loading=loading, changes=changes)
        paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
        process = subprocess.Popen(
            [sys.executable, "-c", code, "solve", PROBLEM, "--width", "4", *words],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "TERM": "xterm", "COLUMNS": "80"},
        )
        processes.append(process)
        return process

    yield command
    for process in processes:
        process.kill()
        process.communicate()


def test_json_is_pure_even_when_a_c_library_prints():
    """HiGHS writes to descriptor 1 behind Python's back."""
    code = """
        import os, sys
        from ets_engine import cli
        from test_cli import FakeEngine

        class Chatty(FakeEngine):
            def search(self, *args, **options):
                os.write(1, b"debug line of a C library\\n")
                return super().search(*args, **options)

        cli.load_engine = lambda *_: Chatty()
        cli.main()
    """
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), "solve", PROBLEM, "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
    )
    assert json.loads(done.stdout)["problem"] == PROBLEM


def read_until(descriptor, wanted, seen=b""):
    """Everything that comes from a terminal up to what is wanted, or to its end."""
    deadline_s = time.monotonic() + 30
    while wanted is None or wanted not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))
        assert ready, f"{wanted!r} did not come, only {seen!r}"
        try:
            more = os.read(descriptor, 4096)
        except OSError:  # the other side is closed
            return seen
        if not more:
            return seen
        seen += more
    return seen


def test_ctrl_c_prints_the_best_so_far_and_exits_0(start):
    process = start("--json")
    assert process.stderr.readline() == "searching\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (0, "stopping\n")
    assert SearchResult.model_validate_json(stdout).finish_reason == "cancelled"


def test_ctrl_c_before_anything_finished_exits_1(start):
    process = start(**NO_ANSWER)
    assert process.stderr.readline() == "searching\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr.splitlines()[1:] == ["ets: no answer: stopped before any trajectory finished"]


def test_a_second_ctrl_c_aborts_at_once(start):
    process = start(stubborn=True)
    assert process.stderr.readline() == "searching\n"
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):  # one is a request, and this engine does not hear it
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, "", "ets: aborted\n")


def test_ctrl_c_while_the_models_load_aborts(start):
    process = start(loading=True)
    assert process.stderr.readline() == "searching\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (130, "", "ets: aborted\n")


def test_progress_goes_to_a_terminal_on_standard_error_and_the_cursor_comes_back(start):
    ours, theirs = pty.openpty()
    process = start("--json", stderr=theirs)
    os.close(theirs)
    seen = read_until(ours, b"Searching")
    process.send_signal(signal.SIGINT)
    seen = read_until(ours, None, seen)
    stdout, _ = process.communicate(timeout=30)
    os.close(ours)
    assert process.returncode == 0
    json.loads(stdout)
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") > 0
    assert b"Loading the models" in seen
