"""LangChain's own standard suites, unchanged, on a scripted engine."""

from __future__ import annotations

from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from ets_engine import register_service
from ets_integrations.langchain import ChatETS

from .scripted import scripted


@pytest.fixture(autouse=True, scope="module")
def services() -> None:
    for name in ("fake/ets", "fake/other"):
        register_service(name, scripted(name=name)[0])


class TestUnit(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatETS

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "fake/ets"}


class TestIntegration(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatETS

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "fake/ets", "width": 3}

    @property
    def model_override_value(self) -> str:
        return "fake/other"

    @property
    def supports_json_mode(self) -> bool:
        return False

    @property
    def supported_usage_metadata_details(self) -> dict[str, Any]:
        return {
            "invoke": ["cache_read_input", "reasoning_output"],
            "stream": ["cache_read_input", "reasoning_output"],
        }

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        return self._ask(stream)

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        return self._ask(stream)

    def _ask(self, stream: bool) -> AIMessage:
        model = ChatETS(model="fake/ets", width=3)
        if not stream:
            return model.invoke("Hello")
        whole: AIMessageChunk | None = None
        for chunk in model.stream("Hello"):
            assert isinstance(chunk, AIMessageChunk)
            whole = chunk if whole is None else whole + chunk
        assert whole is not None
        return whole
