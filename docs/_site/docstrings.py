"""Griffe extension: examples in docstrings, `>>> ...`, are code, which Markdown would take for quotations."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^[ ]*>>> .*\n?(?:^[ ]*\S.*\n?)*)+", re.M)


class Examples(griffe.Extension):
    """Puts each example between fences."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Of every module, class and function, after it was read."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """The text with each example between fences."""
    return EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)
