"""The package as it is imported and shipped."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement

import e2sad_jax
from e2sad_jax import export

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONSTRAINTS = [ROOT / "constraints" / name for name in ("py311.txt", "py312.txt")]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_brings_nothing_beyond_jax_flax_optax_and_touches_no_device():
    """What makes an import slow is what it imports: there must be no other library in it, and no backend started."""
    out = python(
        "import sys, jax, flax, optax\n"
        "before = set(sys.modules)\n"
        "import e2sad_jax\n"
        "from jax._src import xla_bridge\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - {'e2sad_jax'}))\n"
        "print(xla_bridge._backends)"
    )
    assert out.splitlines() == ["[]", "{}"]


def test_load_comes_only_when_asked_for():
    out = python("import sys, e2sad_jax\nprint('orbax' in sys.modules)\ne2sad_jax.load\nprint('orbax' in sys.modules)")
    assert out.splitlines() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = e2sad_jax.lode


def test_a_whole_run_needs_no_tensorflow():
    """With it out of reach, everything that a run imports is there."""
    python(
        "import sys\nsys.modules['tensorflow'] = sys.modules['tensorflow_datasets'] = None\n"
        "import e2sad_jax.runs.run, e2sad_jax.reporting.plots, tensorboardX"
    )
    for file in CONSTRAINTS:
        frozen = file.read_text()
        assert not re.search(r"^tensorflow(-cpu)?==", frozen, re.M)
        assert "://" not in frozen
        assert "file:" not in frozen


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TESTED = ("data", "dev", "export", "tensorboard")  # extras that the tests install


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("file", CONSTRAINTS, ids=lambda file: file.stem)
def test_the_constraints_pin_all_that_an_installation_brings(file):
    """What the project asks for, and what that asks for in turn, by the metadata of the installed packages."""
    pinned = {normal(line.split("==")[0]) for line in file.read_text().splitlines()}
    extras = PROJECT["optional-dependencies"]
    assert {*TESTED, "docs", "aot", "bench", "cuda", "tpu"} == set(extras)
    assert set(extras["docs"]) <= set(extras["dev"]), "the tests build the site"
    wanted = [
        Requirement(text) for text in [*PROJECT["dependencies"], *(text for name in TESTED for text in extras[name])]
    ]
    seen = set()
    while wanted:
        requirement = wanted.pop()
        name = normal(requirement.name)
        assert name in pinned, f"{name}: not in {file.name}"
        for extra in {"", *requirement.extras} - {known for known in seen if known[0] == name}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for text in importlib.metadata.requires(name) or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    wanted.append(needed)


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    """By the names in the source: without an extra what every run needs, and in the extras what only some commands do."""
    named = {"absl": "absl-py", "orbax": "orbax-checkpoint", "PIL": "pillow"}
    imported: dict[str, set[str]] = {}
    for file in [*(ROOT / "e2sad_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names and name != "e2sad_jax":
                    imported.setdefault(normal(named.get(name, name)), set()).add(file.relative_to(ROOT).as_posix())
    own = {normal(Requirement(text).name) for text in PROJECT["dependencies"]}
    extra = {normal(Requirement(t).name): n for n, ts in PROJECT["optional-dependencies"].items() for t in ts}
    assert not own - set(imported), "declared, but not imported"
    undeclared = {name: files for name, files in imported.items() if name not in own | {"e2sad-jax", "experiments"}}
    assert undeclared == {
        "etils": {"e2sad_jax/data/builders.py", "e2sad_jax/data/tfds.py"},
        "requests": {"e2sad_jax/data/tfds.py"},
        "tensorflow-datasets": {"e2sad_jax/data/builders.py", "e2sad_jax/data/tfds.py"},
        "tensorboardx": {"e2sad_jax/runs/metrics.py"},
        "safetensors": {"e2sad_jax/export.py", "e2sad_jax/runs/parameters.py"},
        "torch": imported["torch"],
        "art": imported["art"],
    }
    assert all(file.startswith("experiments/step_cost/") for file in imported["torch"] | imported["art"])
    assert [extra[name] for name in ("etils", "requests", "tensorflow-datasets")] == ["data"] * 3
    assert (extra["tensorboardx"], extra["safetensors"]) == ("tensorboard", "export")
    for packages in export.NEEDS.values():
        assert {extra[normal(package)] for package in packages} == {"export"}


def test_version_is_one():
    assert e2sad_jax.__version__ == "0.1.0"
    assert (pathlib.Path(e2sad_jax.__file__).parent / "py.typed").exists()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == e2sad_jax.__version__
    assert re.search(rf"^## \[{re.escape(e2sad_jax.__version__)}\]", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_citation_has_what_its_format_asks_for():
    """The required keys of Citation File Format 1.2.0, of the software and of the paper; nothing misspelt."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert set(citation) <= {
        *("cff-version", "message", "title", "authors", "type", "version", "abstract", "license", "keywords"),
        *("preferred-citation", "repository-code", "url", "date-released", "doi", "identifiers", "references"),
    }
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= set(paper)
    assert all({"family-names", "given-names"} <= set(author) for author in paper["authors"])
    assert paper["type"] == "article"
    assert paper["year"] == 2018
