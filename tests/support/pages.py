"""An HTML page as a browser sees it: what it fetches, what it shows, and whether its tags are balanced."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID_TAGS = ("meta", "br", "img", "link", "input", "hr")
FETCHING_ATTRIBUTES = ("src", "href", "xlink:href", "srcset", "data")
FETCHING_TAGS = ("script", "link", "iframe", "object", "base", "form")


class ParsedPage(HTMLParser):
    """Collects text, headings and addresses. An AssertionError on an unbalanced tag."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.text: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in FETCHING_TAGS
        self._collect_addresses(attrs)
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._collect_addresses(attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings.append(data)

    def _collect_addresses(self, attrs: list[tuple[str, str | None]]) -> None:
        assert not any(name.startswith("on") for name, _ in attrs)
        self.fetched += [value or "" for name, value in attrs if name in FETCHING_ATTRIBUTES]


def parse_page(html: str) -> ParsedPage:
    """The page; an AssertionError if a tag is left open."""
    page = ParsedPage()
    page.feed(html)
    page.close()
    assert not page.open
    return page


def assert_self_contained(html: str) -> None:
    """Nothing is fetched, ids are unique, and links within the page have a target."""
    page = parse_page(html)
    assert all(target.startswith("#") for target in page.fetched)
    assert not re.search(r"url\((?!#)|@import", html)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)
