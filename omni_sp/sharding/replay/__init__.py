"""Blocks that were followed once are replayed: the same local operations and exchanges, without following again."""

from omni_sp.sharding.replay.graphs import ForwardGraphs
from omni_sp.sharding.replay.player import BlockPlayer, block_lists
from omni_sp.sharding.replay.store import BlockCounts, TapeStore

__all__ = ["BlockCounts", "BlockPlayer", "ForwardGraphs", "TapeStore", "block_lists"]
