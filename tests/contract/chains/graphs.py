"""LangGraph graphs that the tests stream."""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.runnables import RunnableLambda
from langgraph.graph import END, START, MessagesState, StateGraph


def graph(model: BaseChatModel) -> Any:
    """A LangGraph graph of one node, which answers by this model."""

    def solve(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    async def asolve(state: MessagesState) -> dict[str, Any]:
        return {"messages": [await model.ainvoke(state["messages"])]}

    built = StateGraph(MessagesState)
    built.add_node("solve", RunnableLambda(solve, afunc=asolve))
    built.add_edge(START, "solve")
    built.add_edge("solve", END)
    return built.compile()
