"""Recipe: an agent whose hard step is searched: its own model looks things up, the answer comes from a tree search.

python cookbook/langchain_agent.py

The shipped models cannot call tools, so the agent's own model is a stand-in that looks up the rules and then guesses;
with your chat model in its place the two lines with `middleware=` and `tools=` stay as they are.
"""

from __future__ import annotations

import argparse
from typing import Any

from langchain.agents import create_agent
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage

from ets_engine.reference import is_right_answer
from ets_integrations.agents import ETSMiddleware, no_pending_tools
from ets_integrations.langchain import ChatETS, ETSRunnable, ets_tool

PROBLEM = "Use 1, 3, 7 and 17 to make 22."


class StandIn(GenericFakeChatModel):
    """Says what it was given, in turn, and takes any tools."""

    def bind_tools(self, tools: Any, **kwargs: Any) -> StandIn:
        return self


def look_up_rules(game: str) -> str:
    """Rules of a number game."""
    return f"In {game} every number is used exactly once."


def call(name: str, **arguments: str) -> AIMessage:
    return AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": "1"}])


def ask(agent: Any) -> str:
    state = agent.invoke({"messages": [HumanMessage(PROBLEM)]})
    return state["messages"][-1].text


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    turns = [call("look_up_rules", game="countdown"), AIMessage("17+7-1-3")]
    search = ChatETS(model="reference", output="answer", seed=0)
    middleware = ETSMiddleware(search, when=no_pending_tools, tools=False, width=16)

    plain = create_agent(StandIn(messages=iter(turns)), tools=[look_up_rules])
    searched = create_agent(StandIn(messages=iter(turns)), tools=[look_up_rules], middleware=[middleware])
    tool = ets_tool(ETSRunnable(model="reference", width=16, seed=0))
    turns = [call("solve_hard_problem", question=PROBLEM), AIMessage("as the tool says")]
    with_tool = create_agent(StandIn(messages=iter(turns)), tools=[tool])

    for name, agent in {"plain agent": plain, "last call searched": searched}.items():
        answer = ask(agent)
        print(f"{name:20}{answer:24}{'right' if is_right_answer(PROBLEM, answer) else 'wrong'}")
    state = with_tool.invoke({"messages": [HumanMessage(PROBLEM)]})
    print(f"{'search as a tool':20}{state['messages'][-2].text.splitlines()[0]}")


if __name__ == "__main__":
    main()
