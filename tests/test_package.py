"""The package as it is imported and shipped."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml

import e2sad_jax

ROOT = pathlib.Path(__file__).resolve().parents[1]


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
    python("import sys\nsys.modules['tensorflow'] = None\nimport e2sad_jax.run, e2sad_jax.plots, tensorboardX")
    frozen = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"^tensorflow(-cpu)?==", frozen, re.M)
    assert "://" not in frozen
    assert "file:" not in frozen


def test_declared_dependencies_are_those_that_the_constraints_pin():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *extras["dev"], *extras["docs"]]:
        assert re.split(r"[><=\[]", requirement)[0].lower().replace("-", "_") in pinned, requirement
    assert set(extras["docs"]) <= set(extras["dev"]), "the tests build the site"
    assert {"dev", "docs", "bench", "cuda", "tpu"} == set(extras)


def test_what_is_installed_are_the_packages_on_disk():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    files = (ROOT / "e2sad_jax").rglob("*.py")
    assert listed == sorted({".".join(file.relative_to(ROOT).parent.parts) for file in files})


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
