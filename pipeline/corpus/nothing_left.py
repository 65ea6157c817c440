"""What is said where no example came out of the sources.

One idea: what was left out is counted by its reason, and each reason has a setting of its own. It
leaves nothing out itself.
"""

from collections import Counter

from stillroom.cache_schemas.errors import CorpusError
from stillroom.pipeline.config.preparation import Prepare

WINDOW = (
    "Raise [prepare] window = {}, where no answer stands in so few tokens with what it answers; or "
    "check that conversations hold answers."
)
LEAST = "Lower [prepare] min_tokens = {}."


def nothing_came_out(config: Prepare, dropped: Counter[str]) -> CorpusError:
    """The error of a corpus without examples.

    Args:
        config: how it was prepared.
        dropped: reason -> how many were left out for it.
    """
    lost = +dropped
    reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in lost.items())
    too_long = any(name.endswith("longer_than_the_window") for name in lost)
    remedies = [WINDOW.format(config.window)] * (too_long or "windows_without_targets" in lost)
    remedies += [LEAST.format(config.min_tokens)] * ("short_windows" in lost)
    return CorpusError(
        "no example came out of the sources" + (f" (left out: {reasons})" if reasons else ""),
        expected="at least one document of two tokens",
        where=", ".join(source.name for source in config.source) or "[[prepare.source]]",
        remedy=" ".join(remedies) or "Check the sources.",
    )
