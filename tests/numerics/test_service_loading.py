"""What an engine is loaded from: presets of one's own, probes, secrets, shards, and mistakes that cost no load."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ets_engine.loading
from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, EngineError, ModelLoadError
from ets_engine.kv.layout import TreeLayout
from ets_engine.models import Preset, Probe, StepBoundary
from ets_engine.runtime import Runner, open_checkpoint
from ets_engine.runtime.hook import TreeForward
from ets_engine.service import ETSEngine

from .conftest import tiny_model
from .engines import save_policy

CPU = EngineConfig(device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ets_engine.loading, "load_causal_lm", load)


def save_probe(path: Path, width: int, weight: float = 1.0) -> str:
    layer = np.full((1, width), weight, np.float32), np.zeros(1, np.float32)
    Probe((layer,), policy="tiny").save(path)
    return f"probe:{path}"


@pytest.mark.parametrize("label", ["load_options", "verifier_load_options"])
@pytest.mark.parametrize(("option", "way_out"), [("token", "HF_TOKEN"), ("proxies", "HTTPS_PROXY")])
def test_secrets_are_refused_and_not_repeated(folder: str, label: str, option: str, way_out: str) -> None:
    config = EngineConfig.model_validate({label: {option: "hf_secret"}})
    with pytest.raises(ConfigError, match=f"set the environment variable {way_out}") as caught:
        open_checkpoint(folder, config, is_verifier=label != "load_options")
    assert "hf_secret" not in str(caught.value)


def test_a_missing_shard_is_named(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in Path(folder).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    index = {"weight_map": {"one": "model-00001-of-00002.safetensors", "two": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(ModelLoadError, match=r"lacks model-00002-of-00002.safetensors, which its index"):
        open_checkpoint(str(tmp_path), CPU).tensor_files()


@pytest.mark.usefixtures("nothing_loads")
def test_a_misspelt_preset_costs_no_load() -> None:
    with pytest.raises(ConfigError, match="preset='qwen' is unknown"):
        ETSEngine.from_pretrained("reference", config=EngineConfig(preset="qwen"))
    with pytest.raises(ConfigError, match="give one of them"):
        ETSEngine.from_pretrained("reference", config=EngineConfig(preset="plain"), preset=Preset("own", ""))


def test_a_preset_of_ones_own(folder: str) -> None:
    own = Preset("own", "", prompt="line", boundary=StepBoundary(tokens=3))
    with ETSEngine.from_pretrained(folder, "logprob", CPU, preset=own) as engine:
        assert engine.describe().policy.format == "own" and engine.name.startswith("engine-")
        result = engine.search("1+1?", SearchConfig(strategy="rebase", width=2, max_steps=3, trace=True))
        assert result.trace is not None and max(node.num_tokens for node in result.trace[1:]) <= 3
        with pytest.raises(EngineError, match="can be pickled"):
            pickle.dumps(engine)


def test_a_probe_of_another_width_is_refused_at_once(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reads 16 hidden units of policy='tiny', this policy has 32"):
        ETSEngine.from_pretrained(folder, save_probe(tmp_path / "probe", 16), CPU)


def test_a_probe_that_was_trained_again_has_another_name(folder: str, tmp_path: Path) -> None:
    names = []
    for weight in (1.0, 2.0, 1.0):
        with ETSEngine.from_pretrained(folder, save_probe(tmp_path / "probe", 32, weight), CPU) as engine:
            names.append(engine.name)
    assert names[0] == names[2] != names[1]
    assert all(name.startswith(f"{folder}+probe:{tmp_path / 'probe'}#") for name in names)


def test_layers_with_windows_share_one_plan_below_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TreeLayout] = []
    attend = TreeForward.attend

    def note(self: TreeForward, layer: int, *rest: Any) -> Any:
        seen.append(self.layout.within(self.windows[layer]))
        return attend(self, layer, *rest)

    runner = Runner(tiny_model("gemma3_text"), CPU)  # type: ignore[arg-type]
    monkeypatch.setattr(TreeForward, "attend", note)
    root = runner.tree.root()
    for tokens, layouts in (([1] * 8, 1), ([1], 2)):  # the windows are of 8 tokens
        seen.clear()
        runner.extend([(root, tokens)])
        assert len(seen) == 3 and len({id(one) for one in seen}) == layouts
