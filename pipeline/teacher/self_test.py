"""The start-up self-test of the private hooks against vLLM's public API.

One idea: the same prompts, asked once with our mark and once without, in the same engine; a hook that
reads the wrong row, the wrong layer of the API or nothing at all cannot pass.
"""


def self_test(engine) -> None:
    pass
