"""What is shipped: only what belongs there, and the same byte for byte whenever and wherever it is built."""

import configparser
import email
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DIST_INFO = "e2sad_jax-0.1.0.dist-info"
LEFT_OUT = ("__pycache__", "build", "data", "dist", "runs")


def left_out(folder: str, names: list[str]) -> set[str]:
    made = LEFT_OUT if folder == str(ROOT) else ("__pycache__",)
    return {name for name in names if name in made or (name[0] == "." and name != ".gitignore")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[pathlib.Path]:
    """Two copies of the checkout, of other names, ages and permissions of files, each with what it builds in `dist`."""
    copies = []
    for name, seconds, mode in (("one", 1e9, 0o600), ("another", 1.5e9, 0o664)):
        copy = tmp_path_factory.mktemp(name) / name
        shutil.copytree(ROOT, copy, ignore=left_out)
        for path in [path for path in copy.rglob("*") if path.is_file()]:
            path.chmod(mode)
            os.utime(path, (seconds, seconds))
        code = "from hatchling import build; print(build.build_sdist('dist'), build.build_wheel('dist'))"
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": str(len(copies))}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        copies.append(copy)
    return copies


def files_in(archive: pathlib.Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as tar:
        return {name.split("/", 1)[1] for name in tar.getnames()}


def the(copy: pathlib.Path, pattern: str) -> pathlib.Path:
    (path,) = (copy / "dist").glob(pattern)
    return path


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_two_builds_are_equal_byte_for_byte(built, pattern):
    first, second = (the(copy, pattern) for copy in built)
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_the_wheel_holds_the_package_its_command_and_licences_and_nothing_else(built):
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "e2sad_jax").rglob("*.py")}
    held = files_in(the(built[0], "*.whl"))
    about = {name for name in held if name.startswith(DIST_INFO)}
    assert held - about == sources | {"e2sad_jax/py.typed", "e2sad_jax/data/digits.npz"}
    names = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "licenses/NOTICE")
    assert {name.split("/", 1)[1] for name in about} == set(names)
    scripts = configparser.ConfigParser()
    scripts.read_string(zipfile.ZipFile(the(built[0], "*.whl")).read(f"{DIST_INFO}/entry_points.txt").decode())
    assert {section: dict(scripts[section]) for section in scripts.sections()} == {
        "console_scripts": {"e2sad": "e2sad_jax.cli:console"}
    }


def test_the_wheel_says_whose_the_digits_are(built):
    wheel = zipfile.ZipFile(the(built[0], "*.whl"))
    metadata = email.message_from_bytes(wheel.read(f"{DIST_INFO}/METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-4.0"
    notice = " ".join(wheel.read(f"{DIST_INFO}/licenses/NOTICE").decode().split())
    owed = (
        "digits.npz",
        "E. Alpaydin and C. Kaynak",
        "10.24432/C50P49",
        "creativecommons.org/licenses/by/4.0",
        "changed",
    )
    for words in owed:
        assert words in notice


def test_the_wheel_comes_out_of_the_source_distribution_too(built, tmp_path):
    with tarfile.open(the(built[0], "*.tar.gz")) as tar:
        tar.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    code = "from hatchling import build; build.build_wheel('dist')"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, check=True)
    assert the(source, "*.whl").read_bytes() == the(built[0], "*.whl").read_bytes()


def test_the_source_distribution_holds_what_tests_need(built):
    held = files_in(the(built[0], "*.tar.gz"))
    assert {
        "Makefile",
        "constraints/py311.txt",
        "constraints/py312.txt",
        "setup.cfg",
        "tests/conftest.py",
        "docs/running.md",
        "NOTICE",
        "LICENSE",
    } <= held
    assert {name.split("/")[0] for name in held} <= {path.name for path in ROOT.iterdir()} | {"PKG-INFO"}
    assert not [name for name in held if name.startswith((".ci", "runs", "data/"))]


def test_nothing_that_is_shipped_needs_what_is_not():
    """The package is shipped alone: it must not import the programs beside it."""
    beside = re.compile(r"^\s*(?:from|import) (?:experiments|benchmarks|tests|examples)\b", re.M)
    assert not [path for path in (ROOT / "e2sad_jax").rglob("*.py") if beside.search(path.read_text())]
