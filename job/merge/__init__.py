"""Add the adapter to the base's weights, shard by shard, and prove that the sum is right.

The result is a sealed folder that plain transformers loads and that needs nothing of ours.
"""

from job.merge.step import folder, merged, other, readable, tell

__all__ = ["folder", "merged", "other", "readable", "tell"]
