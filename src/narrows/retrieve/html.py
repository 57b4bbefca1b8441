"""The visible text of an HTML page, with its block structure as line ends."""

from __future__ import annotations

import regex
from bs4 import BeautifulSoup, CData, NavigableString, PageElement, Tag

_INVISIBLE = frozenset(("script", "style", "template", "noscript", "title"))
_TAGS = {  # by what separates an element from its neighbours
    "\t": "td th",
    "\n": "br dd dt li option tr",
    "\n\n": "address article aside blockquote body caption center details dialog div dl fieldset "
    "figcaption figure footer form h1 h2 h3 h4 h5 h6 header hr html legend main nav ol p pre "
    "section select summary table textarea ul",
}
_BREAKS = {tag: gap for gap, tags in _TAGS.items() for tag in tags.split()}
_STRENGTH = ("", "\t", "\n", "\n\n")
_PREFORMATTED = frozenset(("pre", "textarea"))
_SPACE = regex.compile(r"[ \t\r\n\f]+")


def html_text(markup: str) -> str:
    """What a reader of the page sees: no scripts, styles, comments or ``hidden`` elements.

    Runs of white space become one space outside ``<pre>``; paragraphs are a blank line apart,
    list items and table rows a line, table cells a tab.
    """
    page = _Page()
    waiting: list[tuple[PageElement | str, bool]] = [(BeautifulSoup(markup, "html.parser"), False)]
    while waiting:  # not recursion: pages nest deeper than Python does
        node, preformatted = waiting.pop()
        if isinstance(node, Tag):
            if node.name in _INVISIBLE or node.has_attr("hidden"):
                continue
            gap = _BREAKS.get(node.name, "")
            page.separate(gap)
            waiting.append((_Break(gap), False))
            inside = preformatted or node.name in _PREFORMATTED
            waiting.extend((child, inside) for child in reversed(node.contents))
        elif isinstance(node, _Break):
            page.separate(node)
        elif type(node) in (NavigableString, CData):  # their subclasses are comments and the like
            page.write(str(node), preformatted)
    return page.text()


class _Break(str):
    """The separator due where an element ends."""


class _Page:
    """Text written so far, and the strongest separator asked for since."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._due = ""

    def separate(self, gap: str) -> None:
        self._due = max(self._due, gap, key=_STRENGTH.index)

    def write(self, text: str, preformatted: bool) -> None:
        if not preformatted:
            text = _SPACE.sub(" ", text)
            if self._due or not self._parts or self._parts[-1].endswith(" "):
                text = text.lstrip(" ")
        if not text:
            return
        if self._parts:
            self._parts.append(self._due)
        self._due = ""
        self._parts.append(text)

    def text(self) -> str:
        return regex.sub(r"[ \t]+(?=\n|$)", "", "".join(self._parts)).strip("\n")
