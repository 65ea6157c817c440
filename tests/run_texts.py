"""Run files as text, for tests and benchmarks that start the command."""

TRAIN = """
name = "far"
directory = "{directory}"
[teacher]
model = "{teacher}"
dtype = "float32"
[student]
keep_every = 2
[[objective]]
name = "forward_kl"
[train]
cache = "{cache}"
steps = {steps}
batch_tokens = 96
workers = 0
{more}
"""
"""A student of every other block, from a cache; `more` takes keys of [train], then tables."""
