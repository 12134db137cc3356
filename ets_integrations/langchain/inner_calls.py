"""What marks a model call as a part of some turn, a draft or its mark: nobody who reads the turn is shown it."""

from __future__ import annotations

from langchain_core.runnables import RunnableConfig

INNER = RunnableConfig(tags=["nostream"])
"""LangGraph's `stream_mode="messages"` leaves such calls out; traces and `astream_events` have them."""
