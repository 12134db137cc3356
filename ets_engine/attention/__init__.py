"""Tree attention: one public function over several implementations."""

from ets_engine.attention.api import AttentionLayout, SegmentLayout, tree_attention

__all__ = ["AttentionLayout", "SegmentLayout", "tree_attention"]
