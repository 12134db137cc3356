"""Recipe: the same search on the local engine and over an OpenAI-compatible server, compared problem by problem.

Starts `transformers serve` on the shipped policy, or takes the server of it at --address (vLLM, SGLang, any other).
Both sides have the shipped PRM as their verifier. They draw different samples, so the difference is noise around 0.

python cookbook/remote_server.py --problems 20
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from ets_engine import ETSEngine, SearchConfig
from ets_engine.answers import ReferenceView
from ets_engine.evaluation.paired import percent
from ets_engine.models import PrmScorer
from ets_engine.protocols import SearchService
from ets_engine.reference import generate_problems, is_solved, policy_path
from ets_engine.remote import connect

START_S = 180


@contextmanager
def transformers_serve() -> Iterator[str]:
    """The address of a server of our own, on a free port of this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", policy_path(), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    silent = {"env": {**os.environ, "HF_HUB_OFFLINE": "1"}, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **silent) as process:
        try:
            until_s = time.monotonic() + START_S
            while process.poll() is None and time.monotonic() < until_s:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx.RequestError:
                    time.sleep(0.2)
            else:
                sys.exit("transformers serve did not start; pip install 'ets-integrations[serve]'")
            yield f"openai:http://127.0.0.1:{port}/v1#{policy_path()}"
        finally:
            process.terminate()


def measure(name: str, engine: SearchService, problems: list[str], config: SearchConfig) -> list[bool]:
    """Search all problems, print a line, and say which were solved."""
    began_s = time.perf_counter()
    results = [future.result() for future in [engine.submit(problem, config) for problem in problems]]
    seconds = time.perf_counter() - began_s
    solved = [is_solved(result.problem, result.text) for result in results]
    share = percent(solved)
    kv = [result.kv for result in results if result.kv is not None]
    sharing = sum(one.sharing_ratio for one in kv) / len(kv)
    errors = sum(result.num_errors for result in results)
    accuracy = f"{share.mean:.1f} % [{share.low:.1f}, {share.high:.1f}]"
    print(f"{name:16}{accuracy:>22}{sharing:>12.2f}{errors:>8}{seconds:>10.1f}")
    return solved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=20)
    parser.add_argument("--numbers", type=int, default=4, choices=(4, 5, 6), help="given numbers of a problem")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--address", help="openai:URL#model of a server of the shipped policy, instead of our own")
    args = parser.parse_args()
    rows = generate_problems("countdown", args.numbers, seed=3, count=args.problems)
    problems = [row.problem for row in rows]
    # lambda_d=0: only the local engine has the policy's hidden states, which say how differently steps reason
    config = SearchConfig(width=args.width, max_step_tokens=48, lambda_d=0.0, seed=0)
    print(f"{'engine':16}{'solved':>22}{'KV sharing':>12}{'errors':>8}{'s, all':>10}")
    with ETSEngine.from_pretrained("reference") as engine:
        local = measure("local", engine, problems, config)

    def over(address: str) -> list[bool]:
        prm = PrmScorer.from_pretrained("reference")
        options = {"boundaries": ["\n"], "tokenizer": policy_path(), "view": ReferenceView()}
        with connect(address, prm, timeout_s=600, **options) as engine:
            return measure("server", engine, problems, config)

    if args.address:
        remote = over(args.address)
    else:
        with transformers_serve() as address:
            remote = over(address)
    gap = percent((one - other for one, other in zip(remote, local, strict=True)), least=-1.0)
    print(f"server - local: {gap.mean:+.1f} points, 95 % interval [{gap.low:+.1f}, {gap.high:+.1f}]")


if __name__ == "__main__":
    main()
