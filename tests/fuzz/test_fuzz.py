"""Every decoder refuses a stranger's bytes by a StillroomError, or takes them; never anything else.

Three ways: the committed corpus, random damage of sound inputs, and a few seconds of atheris.
"""

import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.run import CORPUS
from tests.fuzz.targets import TARGETS, seeds, survives

SEEDS = seeds()


@pytest.mark.parametrize("name", TARGETS)
def test_sound_inputs_are_taken(name):
    assert all(survives(name, data) for data in SEEDS[name])


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_holds_no_finding(name):
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        survives(name, path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_inputs_are_refused_or_taken(name, data):
    sound = bytearray(data.draw(st.sampled_from(SEEDS[name])))
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(0, len(sound) - 1))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "grow"]))
        if kind == "flip":
            sound[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            sound[at : at + 8] = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"\x7f" * 8]))
        elif kind == "cut":
            del sound[at : at + data.draw(st.integers(1, 64))]
        else:
            sound[at:at] = data.draw(st.binary(max_size=16))
        if not sound:
            break
    survives(name, bytes(sound))


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"a":' * 5000, b"9" * 10_000, b'{"a":1,"a":2}', b"NaN", b"\xff\xfe", b'"\\'],
)
def test_hostile_json_is_refused(text):
    for name in ("manifest", "plan", "receipt", "codec"):
        assert not survives(name, text)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_atheris_finds_nothing_in_a_few_seconds(name):
    command = [sys.executable, "-m", "tests.fuzz.run", name, "--seconds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Is the code instrumented" not in done.stderr  # else it would be blind
