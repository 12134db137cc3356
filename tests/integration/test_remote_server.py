"""Searches over real servers: `transformers serve` in a process of its own, and vLLM where ETS_TEST_VLLM names one.

For vLLM: `ETS_TEST_VLLM=openai:http://host:8000/v1#model`, a chat model that can add.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ets_engine.config import SearchConfig
from ets_engine.errors import ModelLoadError
from ets_engine.models import PrmScorer
from ets_engine.reference import generate_problems, is_solved, policy_path
from ets_engine.remote import connect
from ets_engine.types import StopReason

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
    """Four samples with this PRM solve two of three such problems; the server samples by the seed it is sent."""
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
        first = [node for node in result.trace if node.depth == 1]
        assert len({node.text for node in first}) > 1, "it samples"
        assert all(node.text.endswith("\n") for node in first if node.stop is StopReason.BOUNDARY)


def test_a_tokenizer_that_is_not_there_is_one_line(served: str) -> None:
    with (
        connect(served, tokenizer="/no/such/folder") as engine,
        pytest.raises(ModelLoadError, match="tokenizer='/no/such/folder' cannot be loaded"),
    ):
        engine.search("Use 1, 2 and 3 to make 6.", SearchConfig(strategy="greedy"))


@pytest.mark.skipif("ETS_TEST_VLLM" not in os.environ, reason="ETS_TEST_VLLM names no server")
def test_a_search_over_vllm() -> None:
    config = SearchConfig(strategy="rebase", width=8, max_step_tokens=128, max_tokens=512, trace=True)
    with connect(os.environ["ETS_TEST_VLLM"], lambda problem, steps: 1 / len(steps[-1])) as engine:
        result = engine.search("What is 17 + 25? Think step by step, then put the answer in \\boxed{}.", config)
        metrics = engine.server_metrics()
    assert (result.finish_reason, result.answer, result.num_errors) == ("stop", "42", 0)
    assert any(found is not None and found.queried_tokens for found in metrics.values())
