"""A wheel of the package, installed without its checkout: the commands find the presets and the SLURM template."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.launching import Finished, environment, launch, write_inputs

ROOT = Path(__file__).resolve().parents[2]
OLDEST_SETUPTOOLS = 77  # as pyproject.toml requires


def lacks_build_backend() -> bool:
    try:
        return int(version("setuptools").partition(".")[0]) < OLDEST_SETUPTOOLS
    except PackageNotFoundError:
        return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(lacks_build_backend(), reason=f"needs setuptools >= {OLDEST_SETUPTOOLS} to build a wheel"),
]


def pip(*words: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that nothing is written into the checkout."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "trainer", copy / "trainer", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", copy / "wheels", copy)
    (built,) = (copy / "wheels").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel)
    return target


def run(installed: Path, workspace: Path, *words: str) -> Finished:
    """Run Python in `workspace` with the installed package before everything else, and not with the checkout."""
    return launch([sys.executable, *words], workspace, variables=environment() | {"PYTHONPATH": str(installed)})


def test_the_wheel_contains_real_files(wheel: Path) -> None:
    presets = {path.name: path.read_bytes() for path in (ROOT / "trainer" / "ds_configs").glob("*.json")}
    assert len(presets) > 5
    with zipfile.ZipFile(wheel) as archive:
        packed = {name: archive.read(name) for name in archive.namelist()}
    for name, content in presets.items():
        assert packed[f"trainer/ds_configs/{name}"] == content
    assert packed["trainer/cluster/slurm.sbatch"].startswith(b"#!/bin/bash\n")
    assert {name.partition("/")[0] for name in packed if ".dist-info" not in name} == {"trainer"}


def test_the_package_has_no_links_out_of_itself() -> None:
    """A clone without support for links has text files in their place."""
    assert [path for path in (ROOT / "trainer").rglob("*") if path.is_symlink()] == []
    assert (ROOT / "ds_configs" / "zero3.json").read_bytes() == (ROOT / "trainer/ds_configs/zero3.json").read_bytes()
    assert (ROOT / "launch" / "slurm.sbatch").read_bytes() == (ROOT / "trainer/cluster/slurm.sbatch").read_bytes()


def test_commands_run_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    where = run(installed, tmp_path, "-c", "import trainer; print(trainer.__file__)")
    assert where.stdout == f"{installed / 'trainer' / '__init__.py'}\n", where.everything
    usage = run(installed, tmp_path, "-m", "trainer", "--help")
    assert usage.code == 0 and usage.stdout.startswith("Usage: python -m trainer COMMAND")
    described = run(installed, tmp_path, "-m", "trainer", "train", "tiny.yaml", "deepspeed=zero2", "--dry-run")
    assert described.code == 0, described.everything
    assert "under ZeRO stage 2" in described.stdout
    job = run(installed, tmp_path, "-m", "trainer", "submit", "tiny.yaml", "--gpus=2", "--time=1:00:00", "--print")
    assert job.code == 0, job.everything
    assert "#SBATCH --gpus-per-node=2\n" in job.stdout and "-m trainer train tiny.yaml)\n" in job.stdout
