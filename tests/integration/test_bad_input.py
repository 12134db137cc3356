"""Whatever is wrong with a model, a verifier or a server is one line with the way out, and loses no other search.

Folders are made from the shipped models, so that everything but what is wrong with them is right.
"""

from __future__ import annotations

import json
import logging
import math
import socketserver
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import (
    ConfigError,
    ContextLengthError,
    EngineError,
    ETSError,
    ModelLoadError,
    ProtocolError,
    UnsupportedModelError,
)
from ets_engine.reference import policy_path, prm_path
from ets_engine.remote import connect
from ets_engine.service import ETSEngine, get_engine
from ets_engine.services import find_service
from ets_engine.types import SearchResult, StopReason

PROBLEM = "Use 1, 3, 7 and 17 to make 22."
POLICY, PRM = policy_path(), prm_path()


def line_of(kind: type[ETSError], act: Callable[[], Any]) -> str:
    """The one line that it ends in."""
    with pytest.raises(kind) as caught:
        act()
    line = str(caught.value)
    assert line and "\n" not in line and "Traceback" not in line
    return line


# ---------------------------------------------------------------------- folders

WRONG_FOLDERS = {
    "empty": {},
    "no config": {"without": ["config.json"]},
    "broken config": {"files": {"config.json": b"{nope"}},
    "unknown type": {"config": {"model_type": "nope"}},
    "no tokenizer": {"without": ["tokenizer.json", "tokenizer_config.json"]},
    "no weights": {"without": ["model.safetensors"]},
    "pickled weights": {"without": ["model.safetensors"], "files": {"pytorch_model.bin": b"\x80\x04K\x05."}},
    "a pointer of git": {"files": {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\nsize 5\n"}},
    "weights of another size": {"config": {"vocab_size": 50}},
    "too few weights": {"config": {"num_hidden_layers": 7}},
    "encoder-decoder": {"config": {"model_type": "t5"}},
    "mamba": {"config": {"model_type": "mamba"}},
    "3 labels": {"source": PRM, "config": {"num_labels": 3, "id2label": {i: str(i) for i in range(3)}}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where each wrong folder lies, and by what other names wrong models go."""
    home = tmp_path_factory.mktemp("models")
    places = {name: str(_make(home / name.replace(" ", "-"), **how)) for name, how in WRONG_FOLDERS.items()}
    (home / "text").write_text("no probe")
    return {
        **places,
        "no such folder": str(home / "missing"),
        "no such hub name": "no-such/model",
        "weights alone": f"{POLICY}/model.safetensors",
        "policy": POLICY,
        "PRM": PRM,
        "no such probe": f"probe:{home / 'missing'}",
        "text as probe": f"probe:{home / 'text'}",
        "weights as probe": f"probe:{POLICY}/model.safetensors",
    }


def _make(
    folder: Path,
    source: str | None = None,
    without: Sequence[str] = (),
    config: dict[str, Any] | None = None,
    files: dict[str, bytes] | None = None,
) -> Path:
    """A shipped model, with some files left out or other contents in them; without any change an empty folder."""
    folder.mkdir()
    if not (source or without or config or files):
        return folder
    for file in Path(source or POLICY).iterdir():
        if file.is_file() and file.name not in [*without, *(files or {})]:
            (folder / file.name).symlink_to(file)
    for name, content in (files or {}).items():
        (folder / name).write_bytes(content)
    if config:
        changed = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(changed))
    return folder


def load(model: str, verifier: str | None = "logprob", **settings: Any) -> ETSEngine:
    return ETSEngine.from_pretrained(model, verifier, EngineConfig(device="cpu", **settings))


WRONG_MODELS = [
    ("no such folder", ModelLoadError, "no model at", "give a folder with config.json"),
    ("no such hub name", ModelLoadError, "no model at", "a hub name that is cached here or reachable"),
    ("weights alone", ConfigError, "is a file", "give the folder that holds it"),
    ("empty", ModelLoadError, "no model at", "give a folder with config.json"),
    ("no config", ModelLoadError, "no model at", "give a folder with config.json"),
    ("broken config", ModelLoadError, "is not a valid JSON file", "give a folder with config.json"),
    ("unknown type", ModelLoadError, "`nope`", "give a folder with config.json"),
    ("no tokenizer", ModelLoadError, "no usable tokenizer", "tokenizer.save_pretrained(path)"),
    ("no weights", ModelLoadError, "cannot be loaded", "they must be *.safetensors"),
    ("pickled weights", ModelLoadError, "cannot be loaded", "they must be *.safetensors"),
    ("a pointer of git", ModelLoadError, "cannot be loaded", "they must be *.safetensors"),
    (
        "weights of another size",
        ModelLoadError,
        "model.embed_tokens.weight is [249, 192] and should be [50, 192]",
        "of the same model",
    ),
    ("too few weights", ModelLoadError, "no weights for model.layers.6.", "give the checkpoint of one"),
    ("encoder-decoder", UnsupportedModelError, "'t5'", "use a decoder with plain softmax attention"),
    ("mamba", UnsupportedModelError, "'mamba'", "use a decoder with plain softmax attention"),
    ("PRM", ModelLoadError, "is a classifier", "give a language model here, and a PRM as the verifier"),
]


@pytest.mark.parametrize(("name", "kind", "says", "way_out"), WRONG_MODELS, ids=[row[0] for row in WRONG_MODELS])
def test_a_wrong_model(folders: dict[str, str], name: str, kind: type[ETSError], says: str, way_out: str) -> None:
    line = line_of(kind, lambda: load(folders[name]))
    assert says in line and way_out in line
    assert folders[name] in line or kind is UnsupportedModelError, "its config.json is fine, and names the type"


def test_every_way_to_an_engine_says_the_same() -> None:
    ways = (ETSEngine.from_pretrained, get_engine, find_service)
    lines = {line_of(ModelLoadError, lambda way=way: way("no-such/model", "logprob")) for way in ways}
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        pytest.param("no such hub name", {}, "give a folder with config.json", id="no such hub name"),
        pytest.param("no tokenizer", {}, "no usable tokenizer: .*; save one there with", id="no tokenizer"),
        pytest.param("no weights", {}, "save it as safetensors", id="no weights"),
        pytest.param("mamba", {}, "recurrent state", id="mamba"),
        pytest.param("policy", {}, "if it is a PRM, pass verifier_format='math_shepherd'", id="policy"),
        pytest.param(
            "policy", {"verifier_format": "trl"}, "as 'trl': .* has no weights for score.weight", id="policy as trl"
        ),
        pytest.param("PRM", {"verifier_format": "qwen"}, "no weights for score.0.weight", id="another head"),
        pytest.param(
            "PRM",
            {"verifier_format": "math_shepherd"},
            "no token 'ки', .*; load the tokenizer of the PRM's training, or pass another verifier_format",
            id="no special token",
        ),
        pytest.param("PRM", {"verifier_format": "rlhflow"}, "has no chat template, .*; load the", id="no template"),
        pytest.param("3 labels", {}, "it has 3 labels, a PRM has 2: wrong and right", id="3 labels"),
        pytest.param("no such probe", {}, "cannot be read: .*; give a file of Probe.save", id="no such probe"),
        pytest.param("text as probe", {}, "cannot be read: .*; give a file of Probe.save", id="text as probe"),
        pytest.param("weights as probe", {}, "no probe of format 'ets-probe-1'; write it with", id="weights as probe"),
    ],
)
def test_a_wrong_verifier(folders: dict[str, str], name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelLoadError, match=says) as caught:
        load(POLICY, folders[name], **settings)
    line = str(caught.value)
    assert "\n" not in line and (folders[name] in line or name == "mamba")


@pytest.mark.parametrize(
    ("settings", "kind", "says"),
    [
        pytest.param(
            {"preset": "qwen9"}, ConfigError, "preset='qwen9' is unknown; choose 'auto' or one of", id="preset"
        ),
        pytest.param(
            {"preset": "qwen_math"}, ConfigError, "needs a chat template, .* has none; choose 'plain'", id="template"
        ),
        pytest.param({"verifier_format": "qwenn"}, ConfigError, "'qwenn': Input should be 'auto', ", id="format"),
        pytest.param({"presett": "plain"}, ConfigError, "presett='plain': Extra inputs", id="no such setting"),
        pytest.param(
            {"load_options": {"torch_dtype": "auto"}}, ConfigError, "set EngineConfig.dtype", id="decided option"
        ),
        pytest.param(
            {"load_options": {"ignore_mismatched_sizes": True}},
            ConfigError,
            "weights that do not fit are always an error",
            id="made-up weights",
        ),
        pytest.param({"load_options": {"atention": "x"}}, ModelLoadError, "argument 'atention'", id="unknown option"),
        pytest.param(
            {"load_options": {"quantization_config": {"quant_method": "magic"}}},
            ModelLoadError,
            "Unknown quantization type, got magic",
            id="quantisation",
        ),
    ],
)
def test_a_wrong_setting(settings: dict[str, Any], kind: type[ETSError], says: str) -> None:
    with pytest.raises(kind, match=says) as caught:
        load(POLICY, **settings)
    assert "\n" not in str(caught.value)


def test_an_embedder_that_is_not_there() -> None:
    if find_spec("sentence_transformers") is None:
        assert "pip install sentence-transformers" in line_of(ConfigError, lambda: load(POLICY, embedder="no/such"))
    else:
        line = line_of(ModelLoadError, lambda: load(POLICY, embedder="/no/such"))
        assert "embedder='/no/such'" in line and "give a sentence-transformers model" in line


# ---------------------------------------------------------------------- searches


@pytest.fixture(scope="module")
def engine() -> Iterator[ETSEngine]:
    """One engine for all bad searches, which must serve each good one in between."""
    with load(POLICY) as made:
        yield made


@pytest.fixture(scope="module")
def good(engine: ETSEngine) -> SearchResult:
    return engine.search(PROBLEM, small())


def small(**changes: Any) -> SearchConfig:
    """Four branches of up to three steps, each cut after 6 tokens."""
    short = {"strategy": "rebase", "width": 4, "max_steps": 3, "max_step_tokens": 6}
    return SearchConfig(**{**short, **changes})


def assert_goes_on(engine: ETSEngine, good: SearchResult) -> None:
    """The engine is as it was before."""
    assert engine.search(PROBLEM, small()).model_dump(exclude={"timing"}) == good.model_dump(exclude={"timing"})


class Batch:
    """A scorer of all new steps at once."""

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self.answer = answer

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> Any:
        return self.answer(len(paths))


def failing(problem: str, steps: Sequence[str]) -> float:
    raise LookupError("not in the table")


@pytest.mark.parametrize(
    ("verifier", "says"),
    [
        pytest.param(lambda problem, steps: math.nan, None, id="NaN"),  # it says itself that it cannot judge
        pytest.param(failing, "not in the table", id="raises"),
        pytest.param(lambda problem: 1.0, "takes 1 positional argument", id="takes no steps"),
        pytest.param(lambda problem, steps: "good", "'good'", id="text"),
        pytest.param(lambda problem, steps: None, "NoneType", id="nothing"),
        pytest.param(Batch(lambda count: [0.5] * (count - 1)), "verifier function failed", id="a score too few"),
        pytest.param(Batch(lambda count: [0.5] * (count + 1)), "verifier function failed", id="a score too many"),
        pytest.param(Batch(lambda count: 0.5), "'float' object is not iterable", id="one for all"),
        pytest.param(Batch(lambda count: ["good"] * count), "'good'", id="texts"),
    ],
)
def test_a_verifier_that_fails_ends_its_branches(
    engine: ETSEngine, good: SearchResult, verifier: Any, says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = engine.search(PROBLEM, small(), verifier=verifier)
    assert (result.finish_reason, result.num_errors, result.answer) == ("error", 4, None)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (says is not None) and all("\n" not in line and str(says) in line for line in lines)
    assert_goes_on(engine, good)


def test_a_verifier_that_fails_now_and_then_ends_those_branches_alone(engine: ETSEngine, good: SearchResult) -> None:
    seen: list[float] = []

    def now_and_then(problem: str, steps: Sequence[str]) -> float:
        seen.append(0.5 if len(seen) % 2 else math.nan)
        return seen[-1]

    result = engine.search(PROBLEM, small(max_steps=8, trace=True), verifier=now_and_then)
    assert result.trace is not None and max(node.depth for node in result.trace) > 1
    failed = [node for node in result.trace if node.stop is StopReason.ERROR]
    assert 0 < sum(map(math.isnan, seen)) == len(failed) == result.num_errors
    assert_goes_on(engine, good)


@pytest.mark.parametrize(
    ("verifier", "kind", "says"),
    [
        pytest.param(lambda problem, steps: 7, ProtocolError, "returned 7.0 .*; scores lie in", id="too large"),
        pytest.param(
            Batch(lambda count: [-1.0] * count), ProtocolError, "returned -1.0 .*; scores lie", id="too small"
        ),
        pytest.param(lambda problem, steps: math.inf, ProtocolError, "returned inf .*; scores lie in", id="infinite"),
        pytest.param(3, ConfigError, "verifier=3 is no function of problem and steps", id="no function"),
        pytest.param("reference", ConfigError, "verifier='reference' is no function", id="a name"),
    ],
)
def test_a_verifier_that_breaks_its_contract_ends_its_search(
    engine: ETSEngine, good: SearchResult, verifier: Any, kind: type[ETSError], says: str
) -> None:
    with pytest.raises(kind, match=says) as caught:
        engine.search(PROBLEM, small(), verifier=verifier)
    assert "\n" not in str(caught.value)
    assert_goes_on(engine, good)


def test_a_prompt_beyond_the_context(good: SearchResult) -> None:
    context = good.prompt_tokens
    with load(POLICY, load_options={"max_position_embeddings": context}) as short:
        line = line_of(ContextLengthError, lambda: short.search(PROBLEM, small()))
        assert f"a prompt of {context} tokens does not fit a context of {context} tokens" in line
        assert short.search(PROBLEM[:20], small()).num_errors == 0
    with load(POLICY, PRM, verifier_load_options={"max_position_embeddings": context}) as short:
        line = line_of(ContextLengthError, lambda: short.search(PROBLEM, small()))
        assert f"the verifier reads the problem as {context} tokens" in line and "longer context" in line


def test_a_branch_beyond_the_context_ends_and_the_others_go_on(engine: ETSEngine) -> None:
    """Whole solutions are one step here, of different lengths; the context has room for the shortest."""
    config = SearchConfig(strategy="best_of_n", width=4, max_steps=1, trace=True)
    whole = engine.search(PROBLEM, config).trace
    assert whole is not None and {node.stop for node in whole[1:]} == {StopReason.FINISHED}
    shortest = min(node.num_tokens for node in whole[1:])
    context = whole[0].num_tokens + shortest + 1
    with load(POLICY, load_options={"max_position_embeddings": context}) as short:
        result = short.search(PROBLEM, config)
        assert result.trace is not None and (result.finish_reason, result.num_errors) == ("stop", 0)
        for node, cut in zip(whole[1:], result.trace[1:], strict=True):
            fits = node.num_tokens == shortest
            assert cut.stop is (StopReason.FINISHED if fits else StopReason.LENGTH)
            assert node.text.startswith(cut.text) and (cut.text == node.text) is fits
        assert 0 < result.trajectories < 4


# ---------------------------------------------------------------------- servers


class Loopback(socketserver.ThreadingTCPServer):
    """Sends the same bytes whatever it is asked, or nothing."""

    daemon_threads = True
    reply: bytes | None = None
    gate: threading.Event


class Handler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.recv(65536)
        server: Any = self.server
        if server.reply is None:
            server.gate.wait(10)
        else:
            self.request.sendall(server.reply)


@pytest.fixture(scope="module")
def server() -> Iterator[Loopback]:
    with Loopback(("127.0.0.1", 0), Handler) as made:
        made.gate = threading.Event()
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.gate.set()
        made.shutdown()
        thread.join()


def http(status: str, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode() + body


OOM = b'{"error": {"message": "out of\\nmemory"}}'


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        pytest.param(http("500 Internal Server Error", OOM), "answered 500: out of memory", id="500"),
        pytest.param(http("200 OK", b"<html>hello"), "no JSON object: '<html>hello'; give the address", id="garbage"),
        pytest.param(http("200 OK", b""), "no JSON object: ''; give the address", id="empty body"),
        pytest.param(http("200 OK", b'{"choi', 100), "broke off: .*expected 100", id="half a body"),
        pytest.param(b"", "broke off: .*without sending a response", id="no reply"),
        pytest.param(b"220 mail\r\n\r\n", "broke off: .*illegal status line", id="another protocol"),
        pytest.param(None, r"did not answer within 0.2 s; .*raise timeout_s", id="hangs"),
        pytest.param(
            http("401 Unauthorized", b""), "answered 401: .*; put a valid key into .* OPENAI_API_KEY", id="401"
        ),
        pytest.param(http("404 Not Found", b""), "answered 404: Not Found; look at .*/v1/models", id="404"),
        pytest.param(http("200 OK", b"{}"), "has no choices", id="no choices"),
    ],
)
def test_a_wrong_server(server: Loopback, reply: bytes | None, says: str) -> None:
    server.reply = reply
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    with connect(f"openai:{url}#m", retries=0, timeout_s=0.2) as engine:
        with pytest.raises(EngineError, match=says) as caught:
            engine.search("1+1?", SearchConfig(strategy="greedy"))
        line = str(caught.value)
        assert "\n" not in line and (url in line or "the server's reply" in line)


def test_a_server_that_is_not_there() -> None:
    with connect("openai:http://127.0.0.1:9/v1#m", retries=0) as engine:
        line = line_of(EngineError, lambda: engine.search("1+1?", SearchConfig(strategy="greedy")))
    assert line.startswith("http://127.0.0.1:9/v1/completions") and "start the server, or correct the address" in line


@pytest.mark.parametrize(
    ("model", "verifier", "says"),
    [
        pytest.param("openai:", None, "write openai:http://host:8000/v1#model-name", id="nothing"),
        pytest.param("openai:http://host:8000/v1", None, "write openai:http://host:8000/v1#model-name", id="no model"),
        pytest.param("openai:host:8000#m", None, "must be like http://host:8000/v1", id="no scheme"),
        pytest.param("openai:http://host:99999#m", None, "must be like http://host:8000/v1", id="no port"),
        pytest.param("openai:http://me:secret@host#m", None, "keep secrets out of addresses", id="a password"),
        pytest.param("openai:http://host#m", "openai:http://host#m", "say what it is, judge:openai", id="judge or PRM"),
        pytest.param("openai:http://host#m", "judge:http://host#m", "write openai:http://host", id="a judge's address"),
        pytest.param("openai:http://host#m", "pooling:openai:http://host#m", "one of qwen, lines", id="unknown PRM"),
        pytest.param("openai:http://host#m", "logprob", "no server tells; give judge:openai", id="logprob"),
        pytest.param("reference", "judge:openai:http://host#m", "with a policy behind a server", id="served judge"),
    ],
)
def test_a_wrong_address(model: str, verifier: str | None, says: str) -> None:
    line = line_of(ConfigError, lambda: find_service(model, verifier))
    assert says in line and "secret@" not in line
