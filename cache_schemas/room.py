"""How many shards and examples a cache has room for.

One idea: a receipt lists its examples and a manifest its shards, and a reader parses only documents
of a bounded size, so what they have room for is known, and told before a capture begins.
"""

from stillroom.cache_schemas.errors import CacheError

MAX_SHARDS, MAX_PER_SHARD = 1 << 18, 1 << 16
"""Shards of a cache, and examples of one: what a manifest and a receipt have room for."""


def check_room(num_examples: int, per_shard: int) -> None:
    """Refuse a capture whose receipts or manifest would be larger than a reader takes.

    Raises:
        CacheError: says how many examples to keep in a shard.
    """
    shards = -(-num_examples // per_shard)
    if per_shard > MAX_PER_SHARD or shards > MAX_SHARDS:
        raise CacheError(
            f"{num_examples:,} examples, {per_shard:,} to a shard, make {shards:,} shards",
            expected=f"at most {MAX_PER_SHARD:,} examples in each of at most {MAX_SHARDS:,}",
            where="examples_per_shard",
            remedy=f"Keep {min(max(16, -(-num_examples // 4096)), MAX_PER_SHARD)} to a shard.",
        )
