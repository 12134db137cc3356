"""The KV cache as a tree: pages, ownership, index tensors."""

from ets_engine.kv.decode import DecodeLayout, DecodeLayoutBuilder
from ets_engine.kv.layout import LayoutBuilder, Row, Segment, TreeLayout
from ets_engine.kv.pool import KVPool, LayerShape
from ets_engine.kv.prefix_cache import PrefixCache
from ets_engine.kv.prefix_tree import PrefixTree

__all__ = [
    "DecodeLayout",
    "DecodeLayoutBuilder",
    "KVPool",
    "LayerShape",
    "LayoutBuilder",
    "PrefixCache",
    "PrefixTree",
    "Row",
    "Segment",
    "TreeLayout",
]
