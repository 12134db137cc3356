"""PRMs of every published format read what their published code reads, and score as plain transformers from scratch."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from ets_engine.config import EngineConfig
from ets_engine.models import PrmFormat, PrmVerifier, load_prm
from ets_engine.models.prm_formats import QwenFormat, SkyworkFormat, TagFormat, TrlFormat, TurnFormat
from ets_engine.runtime import Runner

from .prms import PROBLEM, PUBLISHED, STEPS, Published, mistral_tokenizer, qwen_tokenizer

KINDS = sorted(PUBLISHED)
CPU = EngineConfig(device="cpu", page_tokens=4, prefix_cache_tokens=0)
MAKE = {
    "math_shepherd": partial(TagFormat.of, kind="math_shepherd"),
    "llemma": partial(TagFormat.of, kind="llemma"),
    "rlhflow": TurnFormat.of,
    "skywork": SkyworkFormat,
    "qwen": QwenFormat.of,
    "trl": TrlFormat,
}


@pytest.fixture(params=KINDS)
def published(request: pytest.FixtureRequest) -> Published:
    """Every format in turn."""
    return PUBLISHED[request.param]


def whole(format: PrmFormat, steps: list[str]) -> tuple[list[int], list[int]]:
    """Our ids of a solution, and where the marks are."""
    ids = format.root_ids(PROBLEM)
    marks = []
    for number, step in enumerate(steps):
        ids += format.step_ids(step, is_first=number == 0)
        marks.append(len(ids) - 1)
    return ids, marks


def test_pieces_are_the_ids_of_the_published_code(published: Published) -> None:
    rng = Random(published.kind)
    format = MAKE[published.kind](published.tokenizer())
    for _ in range(20):
        steps = rng.choices(STEPS, k=rng.randint(1, 6))
        ids, marks = whole(format, steps)
        expected, places = published.ids(published.tokenizer(), steps)
        assert (ids, marks) == (expected[: places[-1] + 1], places)


def test_white_space_around_texts_is_left_out(published: Published) -> None:
    format = MAKE[published.kind](published.tokenizer())
    assert format.root_ids(f" {PROBLEM}\n") == format.root_ids(PROBLEM)
    for is_first in (True, False):
        assert format.step_ids("\n So it is. \n\n", is_first=is_first) == format.step_ids(
            "So it is.", is_first=is_first
        )
        assert format.step_ids("", is_first=is_first)[-1] == format.step_ids("a", is_first=is_first)[-1]


def test_a_tag_of_the_policys_own_is_not_doubled() -> None:
    format = TagFormat.of(mistral_tokenizer(), "math_shepherd")
    assert format.step_ids("So it is. ки\n", is_first=False) == format.step_ids("So it is.", is_first=False)


def test_separators_are_a_setting() -> None:
    tokenizer = qwen_tokenizer()
    for format in (TrlFormat(tokenizer, "\n\n"), SkyworkFormat(tokenizer, "\n\n")):
        one, two = format.step_ids("a\nb", is_first=True), format.step_ids("a\n\nb", is_first=True)
        mark = tokenizer.encode("\n\n")
        assert one == [*tokenizer.encode("a\nb"), *mark] and len(mark) == 1
        assert two.count(mark[0]) == 2
    assert TrlFormat(tokenizer, "\n\n").root_ids("1+1?") == tokenizer.encode("1+1?\n\n")


def test_scores_of_a_random_tree(published: Published, tmp_path: Path) -> None:
    runner, format = load_prm(published.save(tmp_path, shards=3), CPU)
    assert format.name == published.kind, "told from the folder alone"
    verifier = PrmVerifier(runner, format, PROBLEM, search="a", merges=False)
    rng = Random(published.kind)
    paths: dict[int, list[str]] = {0: []}
    scores: dict[int, float] = {}
    kept = [0]
    for _ in range(3):
        parents = [rng.choice(kept) for _ in range(5)]
        nodes = list(range(len(paths), len(paths) + 5))
        for node, parent in zip(nodes, parents, strict=True):
            paths[node] = [*paths[parent], f"{rng.choice(STEPS)} {rng.randint(0, 99)}"]
        found = verifier.score(nodes, parents, [paths[node][-1] for node in nodes])
        scores |= zip(nodes, found, strict=True)
        kept = rng.sample(nodes, 2)
        verifier.retain(kept)
        runner.tree.check_integrity()
    for node, score in scores.items():
        assert score == pytest.approx(published.scores(paths[node])[-1], abs=1e-4)
    assert max(scores.values()) - min(scores.values()) > 0.02
    added = sum(len(format.step_ids(steps[-1], is_first=len(steps) == 1)) for steps in paths.values() if steps)
    assert verifier.usage.tokens == runner.stats.tokens == len(format.root_ids(PROBLEM)) + added, "each token once"


def test_dropped_kv_is_read_again_the_same(published: Published, tmp_path: Path) -> None:
    runner, format = load_prm(published.save(tmp_path), CPU)
    verifier = PrmVerifier(runner, format, PROBLEM, "a", read_step=lambda text: text.replace("NOISE", ""))
    verifier.score([1], [0], [f"{STEPS[0]}NOISE"])
    verifier.score([2], [1], [STEPS[1]])
    verifier.drop()
    assert runner.tree.resident_tokens == 0
    expected = published.scores([*STEPS[:2], STEPS[2]])[-1]
    assert verifier.score([3], [2], [STEPS[2]]) == pytest.approx([expected], abs=1e-4)
    assert verifier.usage.tokens == len(whole(format, STEPS[:3])[0])


def test_a_step_that_outgrows_the_context_fails_alone(published: Published, tmp_path: Path) -> None:
    runner, format = load_prm(published.save(tmp_path, max_position_embeddings=256), CPU)
    verifier = PrmVerifier(runner, format, PROBLEM, search="a")
    room = runner.context_tokens - len(format.root_ids(PROBLEM))
    fits = max(n for n in range(room) if len(format.step_ids("a " * n, is_first=True)) <= room)
    texts = ["a " * fits, "a " * (fits + 4), "b"]
    scores = verifier.score([1, 2, 3], [0, 0, 0], texts)
    assert [math.isnan(score) for score in scores] == [False, True, False]
    assert scores[2] == pytest.approx(published.scores(["b"])[0], abs=1e-4)


def test_heads_run_in_fp32_on_a_decoder_in_bf16(published: Published, tmp_path: Path) -> None:
    runner, format = load_prm(published.save(tmp_path), EngineConfig(device="cpu", dtype="bfloat16"))
    assert runner.dtype == torch.bfloat16
    assert runner.logits(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.float32
    scores = PrmVerifier(runner, format, PROBLEM, search="a").score([1, 2], [0, 0], STEPS[:2])
    assert scores == pytest.approx([published.scores([step])[0] for step in STEPS[:2]], abs=0.1)


@pytest.mark.parametrize("kind", ["llemma", "math_shepherd", "rlhflow"])
def test_only_the_rows_that_decide_are_kept_of_a_vocabulary(kind: str, tmp_path: Path) -> None:
    published = PUBLISHED[kind]
    runner, _ = load_prm(published.save(tmp_path), CPU)
    outputs = 1 if kind == "llemma" else 2
    assert runner.logits(torch.zeros(3, 32)).shape == (3, outputs)
    rows = {name: parameter.numel() for name, parameter in published.decoder.named_parameters()}
    assert runner.num_parameters == sum(rows.values()) - rows["lm_head.weight"] + outputs * 32


def test_tied_embeddings_stay_whole(tmp_path: Path) -> None:
    published = PUBLISHED["rlhflow"]
    changes: dict[str, Any] = {"tie_word_embeddings": True, "lm_head.weight": None}
    path = published.save(tmp_path, **changes)
    runner, format = load_prm(path, CPU)
    verifier = PrmVerifier(runner, format, PROBLEM, search="a")
    (score,) = verifier.score([1], [0], [STEPS[0]])
    ids, marks = published.ids(published.tokenizer(), STEPS[:1])
    model: Any = published.decoder.model
    with torch.inference_mode():
        hidden = model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
        logits = hidden @ model.embed_tokens.weight.T
    assert score == pytest.approx(published.read(logits, hidden, {}, published.tokenizer())[marks[0]].item(), abs=1e-4)


def test_the_load_check_runs_through_the_head(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[torch.Size] = []
    logits = Runner.logits
    monkeypatch.setattr(Runner, "logits", lambda self, hidden: (read.append(hidden.shape), logits(self, hidden))[1])
    load_prm(published.save(tmp_path), CPU)
    assert read == [(6, 32), (6, 32)]
