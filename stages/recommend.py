"""`stillroom recommend`: a trained recommender's list for one user."""

from dataclasses import asdict
from typing import Annotated

import typer

from stillroom.stages.arguments import AsJson, RunFile
from stillroom.stages.console import document, say, table


def recommend(
    run_file: RunFile,
    user: Annotated[str, typer.Option(help="A user of the interactions.")] = "",
    items: Annotated[str, typer.Option(help="Item ids in their place, oldest first.")] = "",
    top: Annotated[int, typer.Option(min=1, help="How many items.")] = 10,
    as_json: AsJson = False,
) -> None:
    """What the run's student recommends next."""
    from stillroom.cache_schemas.errors import ConfigError
    from stillroom.pipeline import config
    from stillroom.pipeline.plain_text import plain

    named = tuple(filter(None, (item.strip() for item in items.split(","))))
    if bool(user) == bool(named):
        raise ConfigError("whose list?", expected="--user NAME, or --items ID,ID,...")
    run = config.load(run_file)
    config.require(run.recommender, "recommender", str(run_file))
    from stillroom.pipeline.evaluation.ranking import recommend as ask

    history, found = ask(run, top, user, named)
    if as_json:
        document({"after": list(history), "items": [asdict(one) for one in found]})
        return
    if not found:
        say("nothing is left: every item was taken; exclude_seen = false lists them too")
    say("after " + "; ".join(plain(title, 60) for title in history))
    rows = [[one.item_id, plain(one.title, 80), f"{one.score:.3f}"] for one in found]
    table(f"recommended to {user or 'you'}", ["item", "title", "score"], rows)
