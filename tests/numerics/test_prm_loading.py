"""A PRM's format is told from its checkpoint or given, and everything that can be wrong gives one clear line."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, LlamaConfig, Qwen2Config

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, ETSError, ModelLoadError, UnsupportedModelError
from ets_engine.models import PrmScorer, TrlFormat, detect_format, load_prm
from ets_engine.reference import prm_path
from ets_engine.runtime import load_weights, open_checkpoint
from ets_engine.service import ETSEngine

from .engines import save_policy
from .prms import PROBLEM, PUBLISHED, STEPS, WORDS, llama_tokenizer, mistral_tokenizer, qwen_tokenizer

CAUSAL = ("llemma", "math_shepherd", "rlhflow")


def on_cpu(**changes: Any) -> EngineConfig:
    return EngineConfig(device="cpu", page_tokens=4, prefix_cache_tokens=0, **changes)


def loading(path: str, **settings: Any) -> Callable[[], Any]:
    return lambda: load_prm(path, on_cpu(**settings))


def line_of(kind: type[ETSError], load: Callable[[], Any]) -> str:
    """The one line that it is refused with."""
    with pytest.raises(kind) as caught:
        load()
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", sorted(PUBLISHED))
def test_a_scorer_of_every_format_comes_from_its_folder(kind: str, tmp_path: Path) -> None:
    scorer = PrmScorer.from_pretrained(PUBLISHED[kind].save(tmp_path), on_cpu())
    expected = PUBLISHED[kind].scores(STEPS[:2])
    found = scorer.score_many(PROBLEM, [STEPS[:1], STEPS[:2]])
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", sorted(PUBLISHED))
def test_an_engine_takes_a_prm_of_every_format(kind: str, tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy")
    with ETSEngine.from_pretrained(policy, PUBLISHED[kind].save(tmp_path), on_cpu()) as engine:
        result = engine.search("1+1?", SearchConfig(width=2, max_steps=2, max_step_tokens=4, max_tokens=8))
    assert result.verifier_tokens > 0 and result.num_errors == 0


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_given_format_needs_no_name(kind: str, tmp_path: Path) -> None:
    path = PUBLISHED[kind].save(tmp_path, folder="model")
    found = PrmScorer.from_pretrained(path, on_cpu(verifier_format=kind)).score_many(PROBLEM, [STEPS[:1]])
    assert found == pytest.approx(PUBLISHED[kind].scores(STEPS[:1]), abs=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("peiyi9979/math-shepherd-mistral-7b-prm", "math_shepherd"),
        ("tkitsers/Llemma-reward-model", "llemma"),
        ("RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", "rlhflow"),
        ("RLHFlow/Llama3.1-8B-PRM-Mistral-Data", "rlhflow"),
        ("/models/Llama3.1-8B-PRM-Mistral-Data/", "rlhflow"),
        ("/hub/models--peiyi9979--math-shepherd-mistral-7b-prm/snapshots/8ac1", "math_shepherd"),
    ],
)
def test_plain_language_models_are_told_by_name(name: str, kind: str) -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    assert detect_format(name, config, ["model.norm.weight", "lm_head.weight"]) == kind


@pytest.mark.parametrize(
    "name",
    [
        "peiyi9979/math-shepherd-mistral-7b-rl",
        "EleutherAI/llemma_7b",
        "RLHFlow/LLaMA3-SFT",
        "meta-llama/Llama-3.1-8B-Instruct",
        "/prm/shepherd/of/somebody/model",
    ],
)
def test_policies_are_not_taken_for_prms(name: str) -> None:
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    line = line_of(ModelLoadError, lambda: detect_format(name, config, ["model.norm.weight", "lm_head.weight"]))
    assert "LlamaForCausalLM with no head of a PRM" in line and "verifier_format='math_shepherd'" in line


@pytest.mark.parametrize(
    ("architecture", "tensors", "kind"),
    [
        ("Qwen2ForPrmModel", ["lm_head.weight", "v_head.summary.weight", "v_head.summary.bias"], "skywork"),
        ("Qwen2ForRewardModel", ["v_head.summary.weight"], "skywork"),
        ("Qwen2ForProcessRewardModel", ["score.0.weight", "score.2.weight"], "qwen"),
        ("Qwen2ForTokenClassification", ["score.weight", "score.bias"], "trl"),
        ("GPT2ForTokenClassification", ["classifier.weight"], "trl"),
    ],
)
def test_heads_are_told_by_their_tensors(architecture: str, tensors: list[str], kind: str) -> None:
    assert detect_format("a/model", Qwen2Config(architectures=[architecture]), tensors) == kind


def test_an_outcome_reward_model_is_no_prm() -> None:
    config = Qwen2Config(architectures=["Qwen2ForSequenceClassification"])
    line = line_of(ModelLoadError, lambda: detect_format("RLHFlow/a-prm", config, ["score.weight"]))
    assert "Qwen2ForSequenceClassification with score.weight" in line


def test_the_shipped_prm_is_read_as_before() -> None:
    runner, format = load_prm("reference", on_cpu())
    assert isinstance(format, TrlFormat) and format.separator == "\n"
    text = "Use 1, 3, 7 and 17 to make 22.\n7-3=4 left 1 4 17\n"
    assert [*format.root_ids(text.split("\n")[0]), *format.step_ids(text.split("\n")[1])] == format.tokenizer(text)[
        "input_ids"
    ]
    assert load_prm(prm_path(), on_cpu())[0].num_parameters == runner.num_parameters


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_policy_in_place_of_a_prm(kind: str, tmp_path: Path) -> None:
    line = line_of(ModelLoadError, loading(PUBLISHED[kind].save(tmp_path, folder="my-model")))
    assert "my-model" in line and PUBLISHED[kind].architecture in line and "verifier_format" in line


@pytest.mark.parametrize("kind", ["skywork", "qwen", "trl"])
def test_a_model_without_the_head_of_a_given_format(kind: str, tmp_path: Path) -> None:
    path = PUBLISHED["rlhflow"].save(tmp_path)
    line = line_of(ModelLoadError, loading(path, verifier_format=kind))
    head = {"skywork": "v_head.summary.weight", "qwen": "score.0.weight", "trl": "score.weight"}[kind]
    assert f"as {kind!r}" in line and f"no weights for {head}" in line


def test_heads_are_never_made_up(tmp_path: Path) -> None:
    """Transformers would give a language model a random one, which judges at random."""
    checkpoint = open_checkpoint(PUBLISHED["rlhflow"].save(tmp_path), on_cpu())
    assert "no weights for score" in line_of(
        ModelLoadError, lambda: load_weights(checkpoint, AutoModelForTokenClassification)
    )


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("skywork", {"v_head.summary.weight": torch.zeros(2, 32)}, "v_head.summary has shapes ((2, 32), (1,))"),
        ("skywork", {"v_head.summary.bias": torch.zeros(2)}, "v_head.summary has shapes ((1, 32), (2,))"),
        ("qwen", {"score.2.weight": torch.zeros(3, 32)}, "score.2 has shapes ((3, 32), (2,))"),
        ("qwen", {"score.0.weight": torch.zeros(32, 16)}, "score.0 has shapes ((32, 16), (32,))"),
        ("qwen", {"score.2.weight": torch.zeros(2, 32, dtype=torch.int8)}, "score.2 is quantised"),
        ("trl", {"score.weight": torch.zeros(1, 32)}, "score has shapes ((1, 32), (2,))"),
        ("trl", {"num_labels": 3}, "3 labels, a PRM has 2"),
        ("trl", {"score.weight": None}, "no weights for score.weight"),
        ("qwen", {"model.norm.weight": None}, "no weights for model.norm.weight"),
        ("math_shepherd", {"lm_head.weight": None}, "no weights for lm_head.weight"),
    ],
)
def test_wrong_heads(kind: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    line = line_of(ModelLoadError, loading(PUBLISHED[kind].save(tmp_path, **changes)))
    assert says in line and f"as {kind!r}" in line


def changed(tokenizer: Any, template: str | None) -> Any:
    """A tokenizer with another chat template."""
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    return made


@pytest.mark.parametrize(
    ("kind", "tokenizer", "says"),
    [
        ("math_shepherd", mistral_tokenizer(tuple(WORDS[1:])), "no token 'ки'"),
        ("llemma", qwen_tokenizer(), "no token 'ки'"),
        ("math_shepherd", mistral_tokenizer((" ки",)), "no tokens '+' and '-'"),
        ("qwen", qwen_tokenizer(), "no token '<extra_0>'"),
        ("qwen", changed(qwen_tokenizer("<extra_0>"), None), "no chat template"),
        ("qwen", changed(qwen_tokenizer("<extra_0>"), "{{ messages[1].content }}"), "leaves turns out"),
        ("rlhflow", changed(llama_tokenizer(), None), "no chat template"),
        ("rlhflow", changed(llama_tokenizer(), "{{ raise_exception('no turns') }}"), "refuses"),
        (
            "rlhflow",
            changed(llama_tokenizer(), "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}"),
            "does not put '+' into a turn of its own",
        ),
        (
            "rlhflow",
            changed(llama_tokenizer(), "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"),
            "does not put '+' into a turn of its own",
        ),
    ],
)
def test_wrong_tokenizers(kind: str, tokenizer: Any, says: str, tmp_path: Path) -> None:
    path = PUBLISHED[kind].save(tmp_path)
    for file in Path(path).glob("*token*"):
        file.unlink()
    (Path(path) / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(path)
    line = line_of(ModelLoadError, loading(path))
    assert says in line and path in line


def test_separators_go_with_formats_that_have_them(tmp_path: Path) -> None:
    path = PUBLISHED["trl"].save(tmp_path)
    _, format = load_prm(path, on_cpu(step_separator="\n\n"))
    assert isinstance(format, TrlFormat) and format.separator == "\n\n"
    line = line_of(ConfigError, loading(PUBLISHED["qwen"].save(tmp_path), step_separator="\n\n"))
    assert "step_separator='\\n\\n'" in line and "'qwen'" in line


def test_weights_must_be_safetensors(tmp_path: Path) -> None:
    path = Path(PUBLISHED["trl"].save(tmp_path))
    (path / "model.safetensors").write_bytes(b"broken")
    assert "cannot be read" in line_of(ModelLoadError, loading(str(path)))
    (path / "model.safetensors").unlink()
    torch.save({}, path / "pytorch_model.bin")  # pickles are never read
    assert "save it as safetensors" in line_of(ModelLoadError, loading(str(path)))


def test_an_architecture_that_cannot_be_honoured_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "state_size": 4}')
    assert "recurrent state" in line_of(UnsupportedModelError, loading(str(tmp_path)))


def test_no_code_of_a_prm_runs_where_transformers_knows_its_type(tmp_path: Path) -> None:
    """The published folders name classes of their own, which may be trusted for the policy's sake."""
    own = {"AutoConfig": "configuration_rm.RMConfig", "AutoModel": "modeling_rm.RewardModel"}
    path = PUBLISHED["qwen"].save(tmp_path, auto_map=own)
    (Path(path) / "configuration_rm.py").write_text("raise SystemExit('it ran')")
    (Path(path) / "modeling_rm.py").write_text("raise SystemExit('it ran')")
    for trusts in (False, True):
        load_prm(path, on_cpu(trust_remote_code=trusts))


def test_loading_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Heads under other names are what transformers would make a long table of."""
    path = PUBLISHED["skywork"].save(tmp_path)
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        load_prm(path, on_cpu())
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_options_of_the_verifier_reach_its_model_alone(tmp_path: Path) -> None:
    path = PUBLISHED["trl"].save(tmp_path)
    runner, _ = load_prm(path, on_cpu(verifier_load_options={"max_position_embeddings": 64}))
    assert runner.context_tokens == 64
    assert load_prm(path, on_cpu(load_options={"max_position_embeddings": 64}))[0].context_tokens == 512
    line = line_of(ModelLoadError, loading(path, verifier_load_options={"atention": "eager"}))
    assert "'atention'" in line and path in line
