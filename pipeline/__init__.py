"""How the work is done: corpus, teacher, cache, data, objectives, kernels, training.

One idea: plain functions and small classes that a program can call. No command line and no
terminal drawing here; those live in `stages`.
"""

from stillroom.pipeline import cpu_wheels

cpu_wheels.install()
