"""What the tests ask of a page: that it is whole, and what it shows."""

import html.parser
import re


def is_whole(path, pictures, titles):
    """One file, nothing fetched, every tag closed."""
    text = path.read_text()
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)""", text) == []
    assert text.count("data:image/png;base64,") == pictures
    parser = Tags()
    parser.feed(text)
    assert parser.open == []
    for title in titles:
        assert title in text


class Tags(html.parser.HTMLParser):
    """Open tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class Shown(html.parser.HTMLParser):
    """The text of each paragraph, heading, cell and item, code in it included."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def handle_starttag(self, tag, attrs):
        if tag in ("p", "h2", "th", "td", "li"):
            self.texts.append("")

    def handle_data(self, text):
        if self.texts:
            self.texts[-1] += text
