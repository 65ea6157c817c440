"""What torchrun told this process of its peers.

One idea: two names of the environment, read without torch. Who has joined whom is
`training.parallel`'s.
"""

import os


def is_main_process() -> bool:
    """True unless torchrun started this process as another than the first."""
    return os.environ.get("RANK", "0") == "0"


def processes() -> int:
    """How many torchrun started, this one among them; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))
