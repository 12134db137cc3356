"""Recipe: a LangGraph graph with a searched node: live progress, streamed text, a checkpoint of plain messages.

python cookbook/langgraph_progress.py
"""

from __future__ import annotations

import argparse
from typing import Any

from langchain_core.messages import HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph

from ets_integrations.langchain import ChatETS

PROBLEM = "Use 1, 10, 11, 13 and 20 to make 33."


def build_graph(model: ChatETS) -> Any:
    """START -> solve -> END, with memory."""

    def solve(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    graph.add_node("solve", solve)
    graph.add_edge(START, "solve")
    graph.add_edge("solve", END)
    return graph.compile(checkpointer=InMemorySaver())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    args = parser.parse_args()
    graph = build_graph(ChatETS(model="reference", width=args.width, seed=0))
    thread = {"configurable": {"thread_id": "1"}}
    question = {"messages": [HumanMessage(PROBLEM)]}
    for mode, data in graph.stream(question, thread, stream_mode=["custom", "messages"]):
        if mode == "custom":
            print(
                f"{data['type']:10} depth {data['depth']}: {data['kept']} of {data['frontier']} branches kept, "
                f"{data['finished']} finished, best score {data['best_score']:.2f}, KV {data['kv_unique_tokens']}"
            )
        elif text := data[0].text:
            print(f"text       {text!r}")
    message = graph.get_state(thread).values["messages"][-1]
    ets = message.response_metadata["ets"]
    print(f"checkpoint {ets['answer']}, score {ets['score']:.2f}, {ets['candidates'][0]['votes']} votes")


if __name__ == "__main__":
    main()
