"""The images: clean to the linter, the locked environments, no root, nothing secret. No engine builds them here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "cluster" / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_linter_finds_nothing(file: Path):
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    assert linter is not None, "hadolint is part of the environment (cluster/lock/cpu.txt); run make setup"
    done = subprocess.run([linter, str(file)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_locked_not_root_and_without_secrets(file: Path):
    text = file.read_text(encoding="utf-8")
    lock = re.search(r"COPY cluster/lock/(\w+\.txt)", text)
    assert lock is not None
    assert (ROOT / "cluster" / "lock" / lock[1]).is_file()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1] == "1000:1000"
    assert not re.search(r"(?i)(api_?key|password|secret|token)\s*=\s*[\"']?[A-Za-z0-9]{8,}", text)
    assert ":latest" not in text


def test_images_carry_no_runs_and_no_secrets():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {".git", ".venv", ".env", ".netrc", "runs"} <= set(ignored)


@pytest.mark.parametrize("name", ["cpu.txt", "gpu.txt"])
def test_every_package_of_a_lock_has_one_version(name: str):
    lines = (ROOT / "cluster" / "lock" / name).read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[A-Za-z0-9.!+_-]+", line) for line in packages)
    names = [re.split(r"[\[=]", line)[0].lower().replace("_", "-") for line in packages]
    assert len(set(names)) == len(names)


def test_both_locks_have_the_same_versions_of_what_decides_numbers():
    versions = {}
    for name in ("cpu.txt", "gpu.txt"):
        lines = (ROOT / "cluster" / "lock" / name).read_text(encoding="utf-8").splitlines()
        versions[name] = {
            package.lower().replace("-cpu", ""): version.partition("+")[0]
            for package, _, version in (line.partition("==") for line in lines)
        }
    for package in ("torch", "vllm", "ray", "deepspeed", "transformers", "hydra-core"):
        assert versions["cpu.txt"][package] == versions["gpu.txt"][package], package
