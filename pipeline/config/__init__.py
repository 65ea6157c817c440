"""The run file: one TOML file, read strictly, and the tables it may have."""

from stillroom.pipeline.config.preparation import Prepare, Source
from stillroom.pipeline.config.run_file import (
    Capture,
    Generate,
    Objective,
    Run,
    Teacher,
    dump,
    load,
    parse,
    require,
)
from stillroom.pipeline.config.training import Evaluate, Student, Train
from stillroom.pipeline.config.vision import Vision

__all__ = [
    "Capture",
    "Evaluate",
    "Generate",
    "Objective",
    "Prepare",
    "Run",
    "Source",
    "Student",
    "Teacher",
    "Train",
    "Vision",
    "dump",
    "load",
    "parse",
    "require",
]
