"""The names in a run file that no cache is needed to check: objectives, their options, caches.

One idea: a misspelt objective is found before a teacher has worked for it, so whoever prepares,
captures or trains asks here first. What a cache has to hold is `combine.terms_of`'s question.
"""

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline.config import Run
from stillroom.pipeline.config.recommending import OWN_CACHES
from stillroom.pipeline.config.strict import nearest
from stillroom.pipeline.objectives import registry
from stillroom.pipeline.objectives.presets import expand


def check_names(run: Run) -> None:
    """Refuse names that nothing has.

    Raises:
        ConfigError: an objective, an option or a cache; the nearest name is said.
    """
    for number, table in enumerate(run.objective, start=1):
        where = f"[[objective]] {number}"
        for line in expand(table):
            spec, _ = registry.find(line.name, line.options, where)
            if run.recommender is not None:
                registry.check_recommends(spec, where)
        _check_cache(run, table.cache, where)
    if run.recommender is not None and run.recommender.distilled is not None:
        _check_cache(run, run.recommender.distilled.cache, "[recommender.distilled] cache")


def _check_cache(run: Run, name: str, where: str) -> None:
    if run.train is None:  # whoever trains elsewhere names caches there
        return
    own = OWN_CACHES if run.recommender is not None else ()
    known = sorted({*own, *run.train.caches})
    if name and name not in known:
        raise ConfigError(
            f"no cache '{name}'",
            expected=f"one of {known}",
            where=where,
            remedy=f"Name it under [train.caches]. {nearest(name, known)}".rstrip(),
        )
