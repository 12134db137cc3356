"""`ets models`, `ets check`, and `ets solve` over a server: what they print, refuse and ask for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import ets_engine.remote
from ets_engine import cli
from ets_engine.catalog import KNOWN_MODELS
from ets_engine.config import EngineConfig
from ets_engine.evaluation import read_summary, session
from ets_engine.evaluation.problems import EvalProblem
from ets_engine.models.presets import PRESETS
from ets_engine.reference import policy_path, prm_path
from ets_engine.remote import ServerDescription
from ets_engine.types import EngineDescription, SearchResult

PROBLEM = "Use 1, 3, 7 and 17 to make 22."
LINES = ["17-3=14 left 1 7 14\n", "14+7=21 left 1 21\n", "21+1=22\n"]  # which solve it


def ets(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words), env={"COLUMNS": "80"})


def assert_fails(done: Result, code: int, *words: str) -> None:
    """The exit code, nothing on standard output, one line on standard error that holds these words."""
    assert (done.exit_code, done.stdout) == (code, "")
    assert done.stderr.startswith("ets: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


# ---------------------------------------------------------------------- ets models


def test_presets_and_models_are_listed_within_80_columns() -> None:
    done = ets("models")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    firsts = {line.split()[0] for line in lines if line.strip()}
    assert firsts >= {one.name for one in PRESETS} | {one.name for one in KNOWN_MODELS}, "no name is broken"


@pytest.mark.parametrize(
    ("options", "figures"),
    [
        pytest.param((), "15.2 GB 57.3 kB 940 MB 313 MB", id="as it is"),  # 16 * 1024 tokens of 57344 bytes
        pytest.param(("--width", "64"), "15.2 GB 57.3 kB 3.76 GB 1.25 GB", id="width"),
        pytest.param(("--tokens", "100"), "15.2 GB 57.3 kB 91.8 MB 30.6 MB", id="tokens"),
        pytest.param(("--sharing", "1"), "15.2 GB 57.3 kB 940 MB 940 MB", id="nothing shared"),
        pytest.param(
            ("--width", "4", "--tokens", "10", "--sharing", "2.5"), "15.2 GB 57.3 kB 2.29 MB 918 kB", id="all three"
        ),
    ],
)
def test_memory_by_hand(options: tuple[str, ...], figures: str) -> None:
    """28 layers x 2 x 4 KV heads x 128 numbers of 2 bytes = 57344 bytes a token; 7,615,616,512 weights of 2 bytes."""
    lines = ets("models", *options).stdout.splitlines()
    [row] = [line for line in lines if "Qwen/Qwen2.5-Math-7B-Instruct " in line]
    assert " ".join(row.split()[1:]) == figures


@pytest.mark.parametrize(
    ("option", "value"),
    [("--width", "0"), ("--tokens", "-5"), ("--sharing", "0.5"), ("--sharing", "nan"), ("--sharing", "inf")],
)
def test_figures_below_1_are_refused(option: str, value: str) -> None:
    assert_fails(ets("models", option, value), 2, f"{option} {value}: give 1 or more")


# ---------------------------------------------------------------------- ets check


def test_the_shipped_models_work_together() -> None:
    done = ets("check", "--device", "cpu")
    assert (done.exit_code, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    text = " ".join(done.stdout.split())
    for fact in (
        "policy: model reference (LlamaForCausalLM, 2,483,328 parameters, float32 on cpu)",
        "policy: format reference",
        "policy: steps end with '\\n', have at most 48 tokens",
        "policy: context 768 tokens policy: weights 9.93 MB policy: KV a token 4.61 kB",
        "verifier: format trl",
        "paths of 768 tokens, nothing shared",
        "embedder the policy's own hidden states",
        "Trial search: answer ",
    ):
        assert fact in text


def test_json_is_what_was_found_and_nothing_else() -> None:
    done = ets("check", "--device", "cpu", "--json")
    assert (done.exit_code, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    found = EngineDescription.model_validate_json(done.stdout)
    assert set(json.loads(done.stdout)) == set(EngineDescription.model_fields)
    assert found.verifier is not None and (found.policy.format, found.verifier.format) == ("reference", "trl")


def test_a_policy_may_judge_itself_or_be_alone() -> None:
    found = EngineDescription.model_validate_json(ets("check", "--verifier", "logprob", "--json").stdout)
    assert (found.verifier, found.verifier_name) == (None, "logprob")
    done = ets("check", "--model", policy_path(), "--preset", "plain", "--problem", PROBLEM)
    assert done.exit_code == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "policy: format plain" in text and "verifier none: each search brings a function" in text


def test_paths_are_no_longer_than_the_context_of_their_model() -> None:
    done = ets("check", "--device", "cpu", "--tokens", "100")
    assert done.stdout.count("of 100 tokens, nothing shared") == 2
    assert ets("check", "--device", "cpu", "--tokens", "5000").stdout.count("of 768 tokens, nothing shared") == 2


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        pytest.param(["--preset", "qwen9"], 2, "preset='qwen9' is unknown; choose 'auto' or", id="preset"),
        pytest.param(["--preset", "qwen_math"], 2, "needs a chat template", id="chat template"),
        pytest.param(["--verifier-format", "qwenn"], 2, "verifier_format='qwenn'", id="format"),
        pytest.param(
            *(["--verifier", "logprob", "--step-separator", r"\n\n"], 2, r"step_separator='\n\n': no PRM is loaded"),
            id="separator",
        ),
        pytest.param(["--device", "quantum"], 2, "device='quantum' is unknown", id="device"),
        pytest.param(["--tokens", "0"], 2, "--tokens 0: give 1 or more", id="tokens"),
        pytest.param(["--problem", "2+2?"], 2, "the shipped reference models only know", id="problem"),
        pytest.param(["--model", "no/such"], 1, "no model at 'no/such'", id="model"),
        pytest.param(["--verifier", "no/such"], 1, "no model at 'no/such'", id="verifier"),
        pytest.param(["--verifier", policy_path()], 1, "cannot tell which PRM this is", id="policy as verifier"),
        pytest.param(["--model", "openai:http://me:hunter2@h#m"], 2, "keep secrets out of addresses", id="password"),
        pytest.param(
            ["--model", "openai:http://h#m", "--verifier-format", "trl"], 2, "no PRM is loaded here", id="its format"
        ),
        pytest.param(["--model", "openai:http://127.0.0.1:9/v1#m"], 1, "start the server, or correct", id="nobody"),
        pytest.param(
            ["--model", f"{policy_path()}/config.json", "--verifier", "logprob"],
            2,
            f"config.json' is a file; give the folder that holds it, {policy_path()!r}",
            id="file",
        ),
        pytest.param(
            ["--verifier", f"{prm_path()}/model.safetensors"], 2, f"that holds it, {prm_path()!r}", id="file of a PRM"
        ),
    ],
)
def test_what_is_wrong_is_one_line(options: list[str], code: int, said: str) -> None:
    done = ets("check", *options)
    assert_fails(done, code, said)
    assert "hunter2" not in done.stderr


# ---------------------------------------------------------------------- ets solve over a server


class Handler(BaseHTTPRequestHandler):
    """Writes the same three lines for every prompt, takes what vLLM takes, and has figures of its cache.

    Its PRM is of Qwen's format and refuses all others.
    """

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/pooling":
            is_read = all(text.endswith("<extra_0>") for text in body["input"])
            return self.reply(200 if is_read else 400, {"data": [{"data": [[0.25, 0.75]]} for _ in body["input"]]})
        if self.path != "/v1/completions":
            return self.reply(404, {})
        done = sum(line in body["prompt"] for line in LINES)
        text = "".join(LINES[done:])
        stop = min((one for one in body.get("stop", ()) if one in text), key=text.find, default=None)
        text = text if stop is None else text[: text.find(stop) + len(stop)]
        choice = {"text": text, "finish_reason": "stop", "stop_reason": stop}
        count = body.get("n", 1)
        choices = [{"index": index, **choice} for index in range(count)]
        return self.reply(200, {"choices": choices, "usage": {"prompt_tokens": 9, "completion_tokens": 9 * count}})

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self.reply(200, {"data": [{"id": "m", "max_model_len": 640}]})
        if self.path == "/metrics":
            return self.reply(200, "vllm:prefix_cache_queries_total 80\nvllm:prefix_cache_hits_total 60\n")
        return self.reply(404, {})

    def reply(self, status: int, body: dict[str, Any] | str) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def address() -> Iterator[str]:
    """Of a model behind a server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"openai:http://127.0.0.1:{server.server_port}/v1#m"
        server.shutdown()
        thread.join()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `connect` is asked for; a model without a tokenizer gets the problem on a line of its own."""
    connect, seen = ets_engine.remote.connect, list[tuple[Any, ...]]()

    def noting(*how: Any, **more: Any) -> Any:
        seen.append(how)
        return connect(*how, **{**more, "template": "plain", "retries": 0})

    monkeypatch.setattr(ets_engine.remote, "connect", noting)
    return seen


def test_an_address_reaches_its_server(address: str, asked: list[tuple[Any, ...]]) -> None:
    done = ets("solve", PROBLEM, "--model", address, "--verifier", "reference", "--width", "2", "--json")
    assert done.stderr == "" and asked == [(address, "reference", EngineConfig())]
    result = SearchResult.model_validate_json(done.stdout)
    assert (result.text, len(result.steps), result.num_errors) == ("".join(LINES), 1, 0)
    assert 0 < result.score < 1, "the shipped PRM judged it"


@pytest.mark.parametrize("served", ["m", "reference"])
def test_a_preset_says_how_a_served_model_is_asked_and_read(address: str, served: str) -> None:
    how = ("--verifier", "reference", *(("--preset", "reference") if served == "m" else ()))
    address = address.replace("#m", f"#{served}")
    result = SearchResult.model_validate_json(ets("solve", PROBLEM, "--model", address, *how, "--json").stdout)
    assert [step.text for step in result.steps if step.text] == LINES
    assert result.answer is not None and eval(result.answer) == 22
    done = ets("check", "--model", address, *how)
    assert (done.exit_code, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert "policy: format reference policy: prompts the problem on a line of its own" in text
    assert "steps end with '\\n'" in text and f"Trial search: answer {result.answer}" in text


@pytest.mark.parametrize("preset", ["reference", "plain"])
def test_a_bench_reads_solutions_of_the_families_as_their_checkers_do(
    address: str, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the engine would read: there is no answer of mathematics in them."""
    asked = [EvalProblem(id="0", problem=PROBLEM, answer="17-3+7+1", family="countdown")]
    monkeypatch.setattr(session, "load_problems", lambda *data, **how: asked)
    options = ("--verifier", "reference", "--strategies", "ets", "--widths", "2", "--concurrency", "1")
    done = ets("bench", "--out", str(tmp_path), "--model", address, "--preset", preset, *options)
    assert done.exit_code == 0, done.stderr
    summary = read_summary(tmp_path / "summary.json")
    assert [row.solved.mean for row in summary.rows] == [100.0] * len(summary.rows)
    assert summary.settings[-1].search["preset"] == preset
    done = ets("bench", "--out", str(tmp_path), "--model", address, "--preset", "chat", *options)
    assert_fails(done, 2, f"preset='{preset}' instead of 'chat'")


def test_a_bench_is_told_what_a_served_prm_reads(address: str, asked: list[tuple[Any, ...]], tmp_path: Path) -> None:
    prm = f"pooling:{address}"
    options = ("--model", address, "--verifier", prm, "--limit", "1", "--strategies", "ets", "--widths", "2")
    options = ("bench", "--out", str(tmp_path), *options, "--concurrency", "1")
    assert_fails(ets(*options), 2, "what the PRM 'm' reads is not known; pass verifier_format 'qwen' or 'trl'")
    done = ets(*options, "--verifier-format", "qwen")
    assert done.exit_code == 0, done.stderr
    assert asked[-1][:2] == (address, prm) and asked[-1][2].verifier_format == "qwen"
    summary = read_summary(tmp_path / "summary.json")
    assert [row.failed for row in summary.rows] == [0]
    assert summary.settings[-1].search["verifier_format"] == "qwen"
    done = ets(*options, "--verifier-format", "trl", "--step-separator", r"\n\n")
    assert_fails(done, 2, "verifier_format='qwen' instead of 'trl'", r"step_separator")
    assert asked[-1][2].step_separator == "\n\n"


@pytest.mark.parametrize(
    ("verifier", "format", "said"),
    [
        pytest.param("reference", "qwenn", "verifier_format='qwenn'", id="unknown"),
        pytest.param("logprob", "trl", "no PRM is loaded here that would read it", id="no PRM"),
        pytest.param("reference", "qwen", "no weights for score.0.weight", id="of another head"),
    ],
)
def test_a_format_that_the_verifier_of_a_bench_does_not_read_is_refused(
    verifier: str, format: str, said: str, tmp_path: Path
) -> None:
    options = ("--verifier", verifier, "--limit", "1", "--strategies", "greedy", "--latency-problems", "0")
    done = ets("bench", "--out", str(tmp_path / "out"), *options, "--verifier-format", format)
    assert_fails(done, 1 if "weights" in said else 2, said)
    assert not (tmp_path / "out").exists()


def test_check_says_what_is_known_of_a_server(address: str, asked: list[tuple[Any, ...]]) -> None:
    done = ets("check", "--model", address, "--verifier", "reference", "--problem", PROBLEM)
    assert (done.exit_code, done.stderr) == (0, "") and asked == [(address, "reference", EngineConfig())]
    assert max(map(len, done.stdout.splitlines())) <= 80
    text = " ".join(done.stdout.split())
    url = address.removeprefix("openai:").partition("#")[0]
    for fact in (
        f"policy: model m at {url} policy: context 640 tokens",
        "policy: format chat policy: prompts the problem on a line of its own policy: steps end with '\\n\\n'",
        "server: token ids as prompts: no, with choices: no server: n choices yes server: seed yes",
        "server: metrics prefix-cache figures server: one call",
        "verifier reference",
        "Trial search: answer ",
    ):
        assert fact in text, fact
    assert " for one token" in text


def test_check_of_a_server_as_json_and_without_a_verifier(address: str, asked: list[tuple[Any, ...]]) -> None:
    done = ets("check", "--model", address, "--json")
    assert (done.exit_code, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    found = ServerDescription.model_validate_json(done.stdout)
    assert (found.name, found.context_tokens, found.verifier_name, found.cuts) == ("m", 640, None, True)


def test_a_bench_of_a_served_model_counts_kv_and_knows_no_bandwidth(
    address: str, asked: list[tuple[Any, ...]], tmp_path: Path
) -> None:
    options = ("--verifier", "reference", "--limit", "2", "--strategies", "best_of_n,ets", "--widths", "2")
    options += ("--concurrency", "2")
    done = ets("bench", "--out", str(tmp_path), "--model", address, *options, "--latency-problems", "1")
    assert done.exit_code == 0, done.stderr
    summary = read_summary(tmp_path / "summary.json")
    assert not {"preset", "verifier_format"} & set(summary.settings[-1].search), "only what was named is a setting"
    rows = summary.rows
    assert {row.name for row in rows} >= {"ets@2", "best_of_n@2"} and not any(row.failed for row in rows)
    for row in rows:
        assert row.mean_kv_tokens and row.published_kv_tokens and row.sharing_ratio and row.p50_s and row.together_per_s
        assert (row.gb_s, row.flops, row.mean_kv_mb, row.mean_prm_kv_tokens) == (None,) * 4


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        pytest.param(["--verifier", "logprob"], 2, "verifier='logprob' reads what the policy computes", id="logprob"),
        pytest.param(["--verifier", "openai:http://h#m"], 2, "say what it is, judge:openai", id="judge or PRM"),
        pytest.param([], 2, "pass --verifier", id="no verifier"),
        pytest.param(
            ["--verifier", "pooling:openai:http://h#m", "--verifier-format", "skywork"],
            2,
            "a PRM is of 'qwen' or 'trl'",
            id="format of a served PRM",
        ),
    ],
)
def test_what_cannot_judge_there_is_refused(
    address: str, asked: list[tuple[Any, ...]], words: list[str], code: int, said: str
) -> None:
    assert_fails(ets("solve", "1+1?", "--model", address, *words), code, said)


@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        pytest.param("openai:http://127.0.0.1:9/v1#m", 1, "start the server, or correct the address", id="nobody"),
        pytest.param("openai:http://127.0.0.1", 2, "write openai:http://host:8000/v1#model-name", id="no model"),
    ],
)
def test_a_server_that_is_not_there_is_one_line(asked: list[tuple[Any, ...]], model: str, code: int, said: str) -> None:
    assert_fails(ets("solve", "1+1?", "--model", model, "--verifier", "reference"), code, said)


def test_a_served_verifier_needs_a_served_policy() -> None:
    done = ets("solve", PROBLEM, "--verifier", "judge:openai:http://h#m")
    assert_fails(done, 2, "verifier='judge:openai:http://h#m' goes with a policy behind a server")


def test_solve_refuses_a_file_and_settings_that_nothing_reads() -> None:
    done = ets("solve", PROBLEM, "--model", f"{policy_path()}/config.json", "--verifier", "logprob")
    assert_fails(done, 2, "config.json' is a file; give the folder that holds it")
    done = ets("solve", PROBLEM, "--model", policy_path(), "--verifier", "logprob", "--verifier-format", "trl")
    assert_fails(
        done, 2, "verifier_format='trl': no PRM is loaded here that would read it, steps are scored by 'logprob'"
    )
