"""Searches over real servers: `transformers serve` in a process of its own, and vLLM where the environment names one.

    vllm serve ets_engine/reference/policy --served-model-name ref --dtype float32 --port 8801
    vllm serve ets_engine/reference/prm --served-model-name refprm --dtype float32 --port 8802 --runner pooling
    export ETS_TEST_VLLM=openai:http://127.0.0.1:8801/v1#ref ETS_TEST_VLLM_PRM=openai:http://127.0.0.1:8802/v1#refprm

vLLM's CPU build (0.32) wants VLLM_CPU_KVCACHE_SPACE=1 as well, --enforce-eager, and for the policy
--max-num-batched-tokens 65536: it dies of a request with a seed whose prompt it reads in parts ("CPU Generator does not
use offset").
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ModelLoadError
from ets_engine.evaluation.session import Plan, compare
from ets_engine.models import PrmScorer
from ets_engine.reference import generate_problems, is_solved, policy_path
from ets_engine.remote import Address, PoolingVerifier, RemoteEngine, Replicas, connect
from ets_engine.remote.verifier import LAYOUTS
from ets_engine.types import SearchResult, StopReason

START_S = 120  # a busy machine takes long to import a model library


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of `transformers serve` on the shipped policy."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", policy_path()]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, env={**os.environ, **offline}, stdout=out, stderr=out)
        try:
            _wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"openai:http://127.0.0.1:{port}/v1#{policy_path()}"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.RequestError:
            time.sleep(0.2)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")


def test_a_search_over_transformers_serve_solves_problems(served: str) -> None:
    """Four samples with this PRM solve these two problems (80 of 80 times).

    The server has one generator for all its requests and each seeds it, so that what is drawn hangs on their order: now
    and then all of a prompt's first steps are the same (1 of 32 times), never all of a search's.
    """
    problems = [row.problem for row in generate_problems("countdown", 4, seed=1, count=2)]
    config = SearchConfig(strategy="ets", width=4, max_step_tokens=32, seed=0, trace=True)
    with connect(served, PrmScorer.from_pretrained("reference"), boundaries=["\n"], tokenizer=policy_path()) as engine:
        results = [engine.search(problem, config) for problem in problems]
        assert engine.server_metrics() == {served.removeprefix("openai:").partition("#")[0]: None}
    assert [result.finish_reason for result in results] == ["stop"] * 2
    assert any(is_solved(result.problem, result.text) for result in results)
    for result in results:
        assert result.num_errors == 0 and result.kv is not None and result.trace is not None
        assert result.prompt_tokens > 10 and result.kv.sharing_ratio > 1
        steps = [node for node in result.trace if node.depth]
        assert len({(node.parent, node.text) for node in steps}) > len({node.parent for node in steps}), "it samples"
        assert all(node.text.endswith("\n") for node in steps if node.stop is StopReason.BOUNDARY)


def test_a_bench_over_transformers_serve_reads_the_families_answers(served: str, tmp_path: Path) -> None:
    """What `ets bench --data countdown --model openai:... --preset reference --verifier reference` does.

    The server draws without a seed, so what is solved differs; an expression as answer does not.
    """
    config = EngineConfig(preset="reference")
    plan = Plan(
        out=tmp_path, model=served, verifier="reference", engine=config, limit=2, strategies=["ets"], widths=[4]
    )
    summary = compare(replace(plan, concurrency=1, base=SearchConfig(max_tokens=160)))
    assert not any(row.failed for row in summary.rows)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    answers = [one["answer"] for row in rows if row["kind"] == "search" for one in row["outcomes"].values()]
    assert len(answers) == 2
    assert any(answer and any(sign in answer for sign in "+-*/") for answer in answers), answers


def test_a_tokenizer_that_is_not_there_is_one_line(served: str) -> None:
    with (
        connect(served, tokenizer="/no/such/folder") as engine,
        pytest.raises(ModelLoadError, match="tokenizer='/no/such/folder' cannot be loaded"),
    ):
        engine.search("Use 1, 2 and 3 to make 6.", SearchConfig(strategy="greedy"))


# ---------------------------------------------------------------------- vLLM, with the shipped models

PROBLEM = "Use 1, 3, 7 and 17 to make 22."
PATHS = [
    ["7-3=4 left 1 4 17\n"],
    ["7-3=4 left 1 4 17\n", "17+4=21 left 1 21\n"],
    ["7-3=4 left 1 4 17\n", "17-4=13 left 1 13\n"],
    ["17-3=14 left 1 7 14\n", "14+7=21 left 1 21\n", "21+1=22\n"],
]


def _named(variable: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"{variable} names no server")
    return os.environ[variable]


@pytest.fixture
def vllm() -> Iterator[tuple[Replicas, str]]:
    """The server of the policy, and the model's name there."""
    where = Address.parse(_named("ETS_TEST_VLLM"))
    replicas = Replicas.connect(where)
    yield replicas, where.model
    replicas.close()


def _search_vllm(verifier: object, config: SearchConfig, settings: EngineConfig | None = None) -> SearchResult:
    with connect(_named("ETS_TEST_VLLM"), verifier, settings, boundaries=["\n"]) as engine:  # type: ignore[arg-type]
        return engine.search(PROBLEM, config)


def test_vllm_is_known_for_what_it_can() -> None:
    with connect(_named("ETS_TEST_VLLM")) as engine:
        assert isinstance(engine, RemoteEngine)
        found = engine.describe()
    assert found.token_prompts and found.token_ids and found.choices and found.seed and found.cuts
    assert (found.stop, list(found.metrics.values())) == ("told", [True])
    assert found.prompts.endswith("by the server's tokenizer")
    assert found.context_tokens == 768 and 0 < found.call_s < 60


def test_vllm_completes_token_ids_and_says_what_it_sampled(vllm: tuple[Replicas, str]) -> None:
    """Two choices of one step: stop text kept, its tokens told, their log-probabilities those of the model here."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    model = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32).eval()
    prompt = tokenizer(f"{PROBLEM}\n")["input_ids"]
    replicas, name = vllm
    body = {"model": name, "prompt": prompt, "n": 2, "max_tokens": 48, "temperature": 1.0, "seed": 3, "logprobs": 0}
    more = {"stop": ["\n"], "include_stop_str_in_output": True, "return_token_ids": True}
    reply = replicas.post("/completions", {**body, **more})
    assert reply["usage"]["prompt_tokens"] == len(prompt) and len(reply["choices"]) == 2
    for choice in reply["choices"]:
        ids = choice["token_ids"]
        assert choice["text"].endswith("\n") and choice["text"] == tokenizer.decode(ids)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "\n")
        with torch.no_grad():
            rows = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = rows[range(len(ids)), ids].tolist()
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-3)


def test_a_search_over_vllm_solves_a_problem_and_keeps_its_tokens() -> None:
    prm = PrmScorer.from_pretrained("reference")
    config = SearchConfig(width=8, max_step_tokens=48, seed=0, trace=True)
    result = _search_vllm(prm, config)
    assert (result.finish_reason, result.num_errors) == ("stop", 0) and is_solved(PROBLEM, result.text)
    assert result.kv is not None and result.kv.sharing_ratio > 1 and result.trace is not None
    first = [node for node in result.trace if node.depth == 1]
    assert len({node.text for node in first}) > 1, "it samples"
    assert all(node.text.endswith("\n") for node in first if node.stop is StopReason.BOUNDARY)


def test_vllm_reads_what_was_read_before_from_its_prefix_cache(vllm: tuple[Replicas, str]) -> None:
    """Its blocks have up to 128 tokens on a CPU."""
    with connect(_named("ETS_TEST_VLLM")) as engine:
        found = []
        for _ in range(2):
            body = {"model": vllm[1], "prompt": [5] * 400, "max_tokens": 1, "temperature": 0.0}
            vllm[0].post("/completions", body)
            [metrics] = engine.server_metrics().values()
            assert metrics is not None and metrics.queried_tokens is not None and metrics.hit_tokens is not None
            found.append(metrics)
    assert found[1].queried_tokens - found[0].queried_tokens == 400
    assert found[1].hit_tokens - found[0].hit_tokens >= 256


def test_scores_of_a_prm_on_vllm_are_those_of_the_prm_here() -> None:
    where = Address.parse(_named("ETS_TEST_VLLM_PRM"))
    served = PoolingVerifier(Replicas.connect(where), where.model, layout=LAYOUTS["lines"])
    here = PrmScorer.from_pretrained("reference").score_many(PROBLEM, PATHS)
    try:
        assert served.score_many(PROBLEM, PATHS) == pytest.approx(here, abs=1e-3)
        too_long, *rest = served.score_many(PROBLEM, [["1 " * 900], *PATHS])
        assert too_long != too_long and rest == pytest.approx(here, abs=1e-3), "one that is too long fails alone"
    finally:
        served.close()


def test_a_search_with_policy_and_prm_on_vllm() -> None:
    prm = f"pooling:{_named('ETS_TEST_VLLM_PRM')}"
    config = SearchConfig(width=8, max_step_tokens=48, seed=0)
    result = _search_vllm(prm, config, EngineConfig(verifier_format="trl"))
    assert (result.finish_reason, result.num_errors) == ("stop", 0) and is_solved(PROBLEM, result.text)
