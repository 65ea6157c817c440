"""A run file's text: byte order marks, and paths as a shell would read them."""

import pytest

from stillroom.cache_schemas.errors import ConfigError
from stillroom.pipeline import config
from stillroom.pipeline.objectives import registry

TEXT = """
name = "run"
directory = "$STILLROOM_TEST_ROOM/run"
[teacher]
model = "~/teacher"
[train]
cache = "${STILLROOM_TEST_ROOM}/cache"
caches = { second = "$STILLROOM_TEST_ROOM/second" }
[train.heldout.page]
cache = "~/heldout"
[evaluate]
students = { mine = "~/mine" }
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("STILLROOM_TEST_ROOM", "/room")
    monkeypatch.setenv("HOME", "/home/me")
    return tmp_path / "run.toml"


def test_paths_are_read_as_a_shell_reads_them(file):
    file.write_text(TEXT)
    run = config.load(file)
    assert (run.directory, run.teacher.model) == ("/room/run", "/home/me/teacher")
    assert (run.train.cache, run.train.caches["second"]) == ("/room/cache", "/room/second")
    assert run.train.heldout["page"].cache == "/home/me/heldout"
    assert run.evaluate.students["mine"] == "/home/me/mine"


def test_a_variable_that_is_not_set_is_named(file, monkeypatch):
    file.write_text(TEXT)
    monkeypatch.delenv("STILLROOM_TEST_ROOM")
    with pytest.raises(ConfigError, match=r"the environment has no variable \$STILLROOM_TEST_ROOM"):
        config.load(file)
    monkeypatch.setenv("STILLROOM_TEST_ROOM", "/room")
    assert config.load(file).directory == "/room/run"


def test_a_byte_order_mark_is_read(file):
    file.write_text(TEXT, encoding="utf-8-sig")
    assert config.load(file).name == "run"


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("[train]\nlearning_rate = {}", "train.learning_rate"),
        ("[[objective]]\nname = 'forward_kl'\nweight = {}", "objective.0.weight"),
        (
            "[[objective]]\nname = 'forward_kl'\nsource_weights = {{ web = {} }}",
            "objective.0.source_weights.web",
        ),
    ],
)
def test_a_number_that_is_none_is_refused(file, line, key, number):
    """TOML has words for infinity and for no number; a run would stop on them hours later."""
    file.write_text(f"name = 'run'\ndirectory = 'run'\n{line.format(number)}\n")
    with pytest.raises(ConfigError, match=rf"'{key}': Input should be .*(finite|greater)"):
        config.load(file)


def test_options_are_as_strict():
    with pytest.raises(ConfigError, match=r"temperature.*(finite|greater)"):
        registry.find("forward_kl", {"temperature": float("inf")}, "objective")


@pytest.mark.parametrize(
    ("short", "meant"),
    [
        ("lr", "learning_rate"),
        ("lrate", "learning_rate"),
        ("wd", "weight_decay"),
        ("bs", "batch_tokens"),
        ("batch_size", "batch_tokens"),
        ("seq_len", "sequence_length"),
        ("stpes", "steps"),
    ],
)
def test_what_is_written_short_is_known_for_what_it_means(short, meant, file):
    file.write_text(TEXT.replace("[train]", f"[train]\n{short} = 1"))
    with pytest.raises(ConfigError, match=f"'train.{short}'. Did you mean '{meant}'"):
        config.load(file)
