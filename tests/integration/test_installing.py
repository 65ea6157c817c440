"""`install.sh` on a stand-in for Python and pip: where torch comes from, and what is said."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/usr/bin/env bash
# A Python whose pip installs nothing, and finds torch's CPU build only in the index in $HAS.
case "$*" in
    *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    "-m pip --version"*) ;;
    *"-m pip install"*)
        echo "$*" >>asked
        if [ "$HAS" = configured ] || [[ "$*" == *"--extra-index-url $HAS"* ]]; then
            echo "Installing collected packages: torch"
        else
            echo "ERROR: No matching distribution found for torch==2.13.0+cpu"
            exit 1
        fi ;;
    *sysconfig*) mkdir -p site; echo site ;;
    *"import torchvision"*) [ "$FITS" = yes ] ;;
    -V) echo "Python 3.11.7" ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """Runs the script in a directory of its own: index that has torch -> the finished process."""
    for name in ("install.sh", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "pipeline").mkdir()
    shutil.copy(ROOT / "pipeline" / "cpu_wheels.py", tmp_path / "pipeline")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)

    def run(has: str, fits: str = "yes", **more: str) -> subprocess.CompletedProcess:
        told = {"PYTHON": str(tmp_path / "python"), "VARIANT": "cpu", "HAS": has, "FITS": fits}
        environment = os.environ | told | more
        return subprocess.run(
            ["bash", "install.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return run


def asked(tmp_path) -> list[str]:
    return (tmp_path / "asked").read_text().splitlines()


def test_what_is_configured_is_tried_first_and_suffices(setup, tmp_path):
    done = setup("configured")
    assert done.returncode == 0, done.stderr
    (only,) = asked(tmp_path)
    assert "--extra-index-url" not in only
    assert setup("configured").returncode == 0
    assert len(asked(tmp_path)) == 1, "the second time it does nothing"


def test_pytorchs_own_index_is_taken_where_none_has_the_cpu_build(setup, tmp_path):
    done = setup("https://torch.example/cpu", TORCH_INDEX="https://torch.example/cpu")
    assert done.returncode == 0, done.stderr
    assert "taking it from PyTorch's own, https://torch.example/cpu" in done.stdout
    assert len(asked(tmp_path)) == 2


def test_no_index_at_all_is_one_message(setup):
    done = setup("nowhere", TORCH_INDEX="https://torch.example/cpu")
    assert done.returncode == 2
    assert "nor https://torch.example/cpu have PyTorch's CPU build" in done.stderr


@pytest.mark.parametrize(("fits", "mended"), [("yes", False), ("no", True)])
def test_wheels_that_do_not_fit_are_mended_for_every_program(setup, tmp_path, fits, mended):
    assert setup("configured", fits).returncode == 0
    assert (tmp_path / "site" / "_cpu_wheels.pth").exists() == mended
