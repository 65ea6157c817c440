"""Who writes: the engine that can draw from the mixture that was asked for.

One idea: this is the only place that knows every writer; `generation.writers` says what they share.
"""

from stillroom.pipeline.generation.writers import Generator, Writers
from stillroom.pipeline.teacher.protocol import EngineName


def open_generator(name: EngineName, writers: Writers) -> Generator:
    """Load whoever writes.

    Raises:
        ConfigError: this engine cannot draw from that mixture.
        TeacherError: a model cannot be loaded or served.
    """
    models = writers.models()
    if name == "reference":
        from stillroom.pipeline.generation.reference_writer import ReferenceGenerator

        return ReferenceGenerator(writers)
    if len(models) > 1:
        from stillroom.pipeline.generation.vllm_mixture import VllmMixture

        return VllmMixture(writers)
    from stillroom.pipeline.generation.vllm_writer import VllmGenerator

    return VllmGenerator(writers, models[0][1])
