"""The documentation's site: built strictly, read here as a browser would, without a network."""

import html.parser
import importlib
import inspect
import os
import pathlib
import subprocess
import sys
import types
import urllib.parse
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


class Page(html.parser.HTMLParser):
    """Where a page's links and pictures lead, what a browser loads for it, and the anchors it has."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "src" in values:
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload", "preconnect"):
            self.loaded.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's, about the generator's next version
    done = subprocess.run(build, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[pathlib.Path, Page]:
    found = {path: Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(found) > 30
    return found


def test_every_link_leads_to_a_file_of_the_site_and_to_an_anchor_that_it_has(pages):
    followed = 0
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert parts.fragment in pages[target].anchors | {"__comments"}, f"{path.name}: {link}"
            followed += 1
    assert followed > 1000


def test_nothing_is_loaded_from_elsewhere(pages, site):
    for path, page in pages.items():
        assert not [link for link in page.loaded if urllib.parse.urlsplit(link).netloc], path.name
    for sheet in site.rglob("*.css"):
        assert "url(http" not in sheet.read_text(), sheet.name


def test_what_pages_link_to_outside_of_docs_is_there(site):
    """A table of results as a page, its picture, a source file as a page, a picture of the documentation."""
    results = "results/defenses_mnist"
    for name in (
        f"{results}/compare.html",
        f"{results}/compare.png",
        "e2sad_jax/networks/cpu_conv.py.html",
        "digits.png",
        "jsma.png",
    ):
        assert (site / name).is_file(), name
    assert "0.862" in (site / results / "compare.html").read_text()
    assert "conv_general_dilated" in (site / "e2sad_jax/networks/cpu_conv.py.html").read_text()


# The pages of the reference, and the modules whose public names each has.
MODULES = {
    "attacks": ["attacks"],
    "losses": ["losses"],
    "defenses": ["defenses"],
    "networks": ["networks"],
    "data": ["data", "data.transforms"],
    "training": ["training"],
    "evaluation": ["evaluation", "evaluation.surfaces"],
    "load": ["runs.classifier"],
    "errors": ["errors"],
}


def public(module: types.ModuleType) -> list[Any]:
    """The functions and classes that a module is for: those of `__all__`, or all that it defines without an underscore."""
    named = getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
    ]
    values = [getattr(module, name) for name in named if not name.startswith("_")]
    return [v for v in values if (inspect.isfunction(inspect.unwrap(v)) and v.__name__ != "main") or inspect.isclass(v)]


@pytest.mark.parametrize("page", MODULES)
def test_the_reference_has_every_public_function(page, pages, site):
    anchors = pages[site / "api" / f"{page}.html"].anchors
    for name in MODULES[page]:
        module = importlib.import_module(f"e2sad_jax.{name}")
        values = public(module)
        assert len(values) >= 2
        for value in values:  # where it is defined, or where it is to be had
            places = {f"{value.__module__}.{value.__name__}", f"{module.__name__}.{value.__name__}"}
            assert places & anchors, value
    if page == "attacks":
        text = (site / "api" / "attacks.html").read_text()
        assert "budget in <code>norm</code>, at least 0" in text, "arguments are there"
        assert "&gt;&gt;&gt; " not in text.replace('<span class="gp">&gt;&gt;&gt; </span>', ""), "examples are code"
