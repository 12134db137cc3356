"""Settings of an engine: what they are called, and that equal ones are equal everywhere."""

from __future__ import annotations

from typing import Any

import pytest

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.reference import policy_path
from ets_engine.service import ETSEngine

OPTIONS: dict[str, Any] = {
    "revision": "main",
    "quantization_config": {"load_in_4bit": True, "bits": [{"b": 1, "a": 2}]},
}


def reversed_order(value: Any) -> Any:
    """The same value, its mappings written the other way round."""
    if isinstance(value, dict):
        return {key: reversed_order(value[key]) for key in reversed(value)}
    return [reversed_order(one) for one in value] if isinstance(value, list) else value


def test_equal_settings_are_one_key_however_their_mappings_are_written() -> None:
    for name in ("load_options", "verifier_load_options"):
        given: list[Any] = [OPTIONS, reversed_order(OPTIONS), OPTIONS | {"revision": "other"}]
        one, two, other = (EngineConfig.model_validate({name: options}) for options in given)
        assert one == two and hash(one) == hash(two) and one.fingerprint() == two.fingerprint()
        assert one != other and one.fingerprint() != other.fingerprint()


def test_fingerprints_stay_what_they_were() -> None:
    """They name results on disk."""
    assert SearchConfig().fingerprint() == "fc11ea1520aa1e94"
    assert EngineConfig(step_separator="\n", kv_pool_tokens=64).fingerprint() == "dbbb9bf15d40f1ca"


def test_what_was_changed_is_said_in_the_order_asked_for() -> None:
    config = EngineConfig(dtype="float64", load_options=reversed_order(OPTIONS), page_tokens=4)
    options = "{'quantization_config': {'bits': [{'a': 2, 'b': 1}], 'load_in_4bit': True}, 'revision': 'main'}"
    assert config.changed(["load_options", "preset", "dtype"]) == [f"load_options={options}", "dtype='float64'"]
    unsorted = config.model_copy(update={"load_options": {"b": 1, "a": 2}})  # which validates nothing
    assert unsorted.changed(["load_options"]) == ["load_options={'a': 2, 'b': 1}"]
    assert EngineConfig().changed(["preset", "load_options"]) == []


@pytest.mark.parametrize("verifier", [None, "logprob", "self_certainty"])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"verifier_format": "trl"}, "verifier_format='trl': no PRM is loaded here"),
        ({"step_separator": "|"}, r"step_separator='\|': no PRM is loaded here"),
        ({"verifier_load_options": {"token": "hunter2"}}, "verifier_load_options: no PRM is loaded here"),
    ],
    ids=["format", "separator", "load options"],
)
def test_settings_of_a_prm_need_a_prm(verifier: str | None, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}") as caught:
        ETSEngine.from_pretrained(policy_path(), verifier, EngineConfig(**settings))
    assert "hunter2" not in str(caught.value)
