"""What is installed is `stillroom` alone, usable beside a project with a `pipeline.py` of its own.

One idea: the source distribution and the wheel are made from a copy of what git tracks, and the
wheel is used from a fresh environment that sees our dependencies and not this checkout.
"""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "cache-v1" / "small"
BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, sys.argv[1])(sys.argv[2]))"
USE = """
import json, sys
from importlib import import_module
import stillroom
before = sorted({"torch", "numpy", "vllm", "transformers"} & set(sys.modules))
cache = stillroom.TeacherCache.open(sys.argv[1])
reading = sorted({"vllm", "transformers"} & set(sys.modules))
import importlib.util, torch
hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(6, 4)
ids, logprobs = torch.tensor([[1, 2]] * 3), torch.full((3, 2), 0.3).log()
stillroom.topk_divergence(hidden, head, ids, logprobs).sum().backward()
print(json.dumps({
    "mine": [import_module(name).MINE for name in ("pipeline", "stages.mine")],
    "file": stillroom.__file__,
    "version": stillroom.__version__,
    "before": before,
    "reading": reading,
    "examples": len(cache),
    "finite": bool(hidden.grad.isfinite().all()),
    "other": [n for n in ("cache_schemas",) if importlib.util.find_spec(n)],
    "missing": [n for n in stillroom.__all__ if not hasattr(stillroom, n)],
}))
"""


def run(*command, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution of what git tracks, with the links as links."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    run("git", "checkout-index", "--all", f"--prefix={source}/", cwd=ROOT)
    run(sys.executable, "-c", BUILD, "build_sdist", target, cwd=source)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """The wheel, made from the source distribution."""
    source, target = tmp_path_factory.mktemp("unpacked"), tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(source, filter="data")
    run(sys.executable, "-c", BUILD, "build_wheel", target, cwd=next(source.iterdir()))
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def interpreter(wheel, tmp_path_factory) -> Path:
    """Python of a fresh environment with the wheel in it, and our dependencies within reach."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    packages = next(place.glob("lib/python*/site-packages"))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    run(*install, "--target", packages, wheel, cwd=place)
    # A folder named in a .pth file is searched, but its own .pth files are not read, and so this
    # checkout's editable install is out of sight.
    ours = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "dependencies.pth").write_text("\n".join(ours) + "\n")
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Somebody's project, with the commonest names there are."""
    place = tmp_path_factory.mktemp("project")
    (place / "pipeline.py").write_text("MINE = 'pipeline'\n")
    (place / "stages").mkdir()
    (place / "stages" / "mine.py").write_text("MINE = 'stages'\n")
    return place


def test_the_wheel_has_one_name_at_its_top(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"stillroom"}
    assert {"stillroom/py.typed", "stillroom/cache_schemas/FORMAT.md"} <= set(names)


def test_the_wheel_holds_every_module_once(wheel):
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    listed = run("git", "ls-files", "stillroom", "pipeline", "stages", "cache_schemas", cwd=ROOT)
    tracked = {name for name in listed.split() if name.endswith(".py")}
    assert packed == {f"stillroom/{name.removeprefix('stillroom/')}" for name in tracked}


def test_a_project_with_its_own_pipeline_uses_the_wheel(interpreter, project):
    said = json.loads(run(interpreter, "-c", USE, GOLDEN, cwd=project))
    assert said["mine"] == ["pipeline", "stages"]
    assert Path(said["file"]).is_relative_to(interpreter.parents[1])
    assert said["version"] != "0+unknown"
    assert (said["before"], said["reading"], said["other"], said["missing"]) == ([], [], [], [])
    assert said["examples"] > 0
    assert said["finite"]


def test_the_command_runs_beside_it_too(interpreter, project):
    shown = run(interpreter, "-m", "stillroom.stages", "cache", "verify", GOLDEN, cwd=project)
    assert "5 examples" in shown
    assert "are right" in shown


def test_entry_points_lead_somewhere(interpreter, project):
    code = (
        "from importlib.metadata import distribution\n"
        "[point.load() for point in distribution('stillroom').entry_points]"
    )
    run(interpreter, "-c", code, cwd=project)
