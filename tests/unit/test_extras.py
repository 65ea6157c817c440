"""A package that is not there is named with the extra that brings it, and extras are real."""

import re
import tomllib
from pathlib import Path

import pytest

from stillroom.cache_schemas.errors import ConfigError
from stillroom.cache_schemas.extras import extra_package

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_a_package_that_is_not_there():
    with pytest.raises(ConfigError, match="no_such_package") as found:
        extra_package("no_such_package.part", "ray", "--flag")
    told = str(found.value)
    assert told.startswith("--flag: no_such_package cannot be imported (")
    assert told.endswith("Install it with pip install 'stillroom[ray]'.")


def test_a_package_that_is_there():
    assert extra_package("json.decoder", "ray", "--flag").JSONDecoder


def test_every_extra_that_a_message_or_a_page_names_exists():
    places = [*ROOT.glob("[ps]*/**/*.py"), *ROOT.glob("runbooks/*.md"), ROOT / "README.md"]
    named = {
        (extra.strip(), place.name)
        for place in places
        for group in re.findall(r"stillroom\[([a-z, ]+)\]", place.read_text())
        for extra in group.split(",")
    }
    assert named
    assert {(extra, place) for extra, place in named if extra not in EXTRAS} == set()
