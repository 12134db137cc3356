"""The LangChain adapter on the shipped models, for real."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
import torch
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from transformers import AutoModelForCausalLM, AutoTokenizer

from ets_engine import ConfigError, ETSEngine, get_engine
from ets_engine.reference import generate_problems, is_solved, policy_path
from ets_engine.types import SearchResult
from ets_integrations.langchain import ChatETS, ETSRunnable

PROBLEM = "Use 1, 3, 7 and 17 to make 22."


@pytest.fixture(scope="module")
def engine() -> Iterator[ETSEngine]:
    yield get_engine("reference")


def test_a_chain_answers_a_countdown(engine: ETSEngine) -> None:
    prompt = ChatPromptTemplate.from_messages([("system", "Solve it."), ("human", "Use {numbers} to make {goal}.")])
    chain = prompt | ChatETS(model="reference", width=16, seed=0) | StrOutputParser()
    assert is_solved(PROBLEM, chain.invoke({"numbers": "1, 3, 7 and 17", "goal": 22}))


def test_all_ways_to_ask_give_the_same_answer(engine: ETSEngine) -> None:
    chat = ChatETS(model="reference", width=8, seed=3)
    whole = chat.invoke(PROBLEM).text
    assert whole == "".join(chunk.text for chunk in chat.stream(PROBLEM))
    assert whole == asyncio.run(chat.ainvoke(PROBLEM)).text
    assert whole == engine.search(PROBLEM, chat.resolve_search()).text

    async def astream() -> str:
        return "".join([chunk.text async for chunk in chat.astream(PROBLEM)])

    assert whole == asyncio.run(astream())


def test_one_greedy_trajectory_is_what_transformers_would_generate() -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    model = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32)
    for row in generate_problems("countdown", None, seed=3, count=4):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(row.problem + "\n", add_special_tokens=False)]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
        plain = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert ChatETS(model="reference", width=1, strategy="greedy").invoke(row.problem).text == plain
        assert ChatETS(model="reference", width=1, temperature=0.0).invoke(row.problem).text == plain


def test_a_batch_of_32(engine: ETSEngine) -> None:
    problems = [row.problem for row in generate_problems("countdown", 4, seed=5, count=32)]
    before = engine.stats().policy_forwards
    messages = ChatETS(model="reference", width=4, seed=1).batch(problems)
    together = engine.stats().policy_forwards - before
    assert sum(is_solved(problem, one.text) for problem, one in zip(problems, messages, strict=True)) > 8
    alone = sum(one.response_metadata["ets"]["steps"] for one in messages) * 10
    assert together < alone / 3, "they advanced in the same forward passes"


def test_cancelling_gives_the_memory_back(engine: ETSEngine) -> None:
    async def leave() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ChatETS(model="reference", width=256).ainvoke(PROBLEM), timeout=0.05)

    asyncio.run(leave())
    done = threading.Event()
    for _ in range(200):
        if engine.stats().live == 0:
            done.set()
            break
        done.wait(0.05)
    assert done.is_set()


def test_the_runnable_streams_a_real_search(engine: ETSEngine) -> None:
    *events, result = ETSRunnable(model="reference", width=8, seed=0).stream(PROBLEM)
    assert len(events) > 3 and isinstance(result, SearchResult) and result.kv is not None
    assert result.kv.sharing_ratio > 1.0


def test_tools_are_refused_by_models_that_know_none(engine: ETSEngine) -> None:
    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    with pytest.raises(ConfigError, match="no chat template"):
        ChatETS(model="reference").bind_tools([add]).invoke(PROBLEM)


def test_tokens_are_the_policy_s(engine: ETSEngine) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    expected = len(tokenizer.encode(PROBLEM, add_special_tokens=False))
    assert ChatETS(model="reference").get_num_tokens(PROBLEM) == expected
