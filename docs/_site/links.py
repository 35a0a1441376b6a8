"""MkDocs hook: the site holds whatever its pages link to, wherever in the repository that lies.

Pages link as the repository lies, `../results/README.md`, so a link works where the code is hosted. In the site a file has
the same place, but for those of `docs/`, which are at its root. Folders and source files become pages; all else is copied.
"""

import pathlib
import posixpath
import re
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)[^)#\s]+")
SOURCE = {".py": "python", ".sh": "sh"}
_files: dict[str, pathlib.Path] = {}  # by their place in the site


def place(path: pathlib.Path) -> str:
    """Where in the site a file or folder of the repository is, as MkDocs names sources."""
    name = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
    if path.is_dir():
        return f"{name}/index.md"
    return f"{name}.md" if path.suffix in SOURCE else name


def text_of(path: pathlib.Path) -> str:
    """A file or folder as Markdown."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        listed = sorted(f.name for f in path.iterdir() if f.suffix in SOURCE and f.name != "__init__.py")
        return f"# {name}\n\n" + "".join(f"- [{file}]({file})\n" for file in listed)
    text = path.read_text(encoding="utf-8")
    return f"# {name}\n\n````{SOURCE[path.suffix]}\n{text}````\n" if path.suffix in SOURCE else text


def linked(path: pathlib.Path, text: str) -> Iterator[tuple[str, pathlib.Path]]:
    """The links of a page to what is there in the repository."""
    for link in LINK.findall(text) if path.suffix not in SOURCE else ():
        target = ((path if path.is_dir() else path.parent) / link).resolve()
        if target.exists() and target.is_relative_to(ROOT):
            yield link, target


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to, and what that links to."""
    _files.clear()
    pages = [DOCS / file.src_uri for file in files.documentation_pages()]
    waiting = [ROOT / "README.md", *pages]
    while waiting:
        path = waiting.pop()
        uri = place(path)
        if uri in _files:
            continue
        _files[uri] = path
        page = uri.endswith(".md")
        if page:
            text = text_of(path)
            waiting += [target for _, target in linked(path, text)]
        if files.get_file_from_path(uri) is None:
            files.append(
                File.generated(config, uri, content=text)
                if page
                else File.generated(config, uri, abs_src_path=str(path))
            )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of the repository into those of the site."""
    here = page.file.src_uri
    there = {link: posixpath.relpath(place(to), posixpath.dirname(here)) for link, to in linked(_files[here], markdown)}
    return LINK.sub(lambda match: there.get(match[0], match[0]), markdown)
