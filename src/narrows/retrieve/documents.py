"""Reading a user's files to text: plain text, Markdown, HTML and PDF.

What a file is, is decided by its first bytes and only then by its suffix. Line ends are left
as they are, so that spans into ``Document.text`` mean something to the user.
"""

from __future__ import annotations

import codecs
import io
import logging
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal

import charset_normalizer
import pypdf
import regex
from bs4.dammit import EncodingDetector

from narrows.contracts import Document
from narrows.errors import InputError
from narrows.retrieve.html import html_text

STDIN = "-"
"""The name that means standard input."""

Kind = Literal["pdf", "html", "text"]

_BOMS = (  # UTF-32 first: its little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SNIFFED_BYTES = 1024
_HTML_START = regex.compile(
    r"\s*+(?:<\?xml[^>]*+>\s*+)?(?:<!--(?s:.*?)-->\s*+)*<(?:!doctype\s+html|html)\b",
    regex.IGNORECASE,
)
_HTML_SUFFIXES = {".html", ".htm", ".xhtml"}
_NOT_TEXT = regex.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]")  # what no text editor writes
_QUIET = logging.NullHandler()


def read_document(path: str | Path, *, stdin: BinaryIO | None = None) -> Document:
    """Read one file, or standard input for ``"-"``, to text.

    Args:
        path: the file; plain text and Markdown are returned unchanged, of HTML and PDF the text.
        stdin: where ``"-"`` reads from; None is the process's own standard input.

    Raises InputError, in one line, for a missing or unreadable file, a directory, a binary, an
    encrypted, damaged or text-less PDF, and a document without any text.
    """
    name = str(path)
    data = (stdin or sys.stdin.buffer).read() if name == STDIN else _read_bytes(name)
    shown = "standard input" if name == STDIN else name
    kind = _kind(data, name)
    if kind == "pdf":
        text = _pdf_text(data, shown)
    elif kind == "html":
        text = html_text(_decode(data, shown, _declared_encoding(data)))
    else:
        text = _decode(data, shown)
    if not text.strip():
        raise InputError(f"{shown} is empty: give a document with text in it")
    return Document(name, text)


def read_documents(paths: Iterable[str | Path], *, stdin: BinaryIO | None = None) -> list[Document]:
    """``read_document`` for each path, in order. Raises InputError also if ``"-"`` comes twice."""
    names = [str(path) for path in paths]
    if names.count(STDIN) > 1:
        raise InputError("standard input ('-') is named twice: it can be read only once")
    return [read_document(name, stdin=stdin) for name in names]


def _read_bytes(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{name} does not exist: check the path") from None
    except IsADirectoryError:
        raise InputError(f"{name} is a directory: name the files in it instead") from None
    except PermissionError:
        raise InputError(f"{name} may not be read: check its permissions") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{name!r} cannot be read ({reason}): check the path") from None


def _kind(data: bytes, name: str) -> Kind:
    encoding = _bom_encoding(data)
    head = data[:_SNIFFED_BYTES].decode(encoding or "latin-1", errors="ignore")
    if head.lstrip().startswith("%PDF-"):
        return "pdf"
    if _HTML_START.match(head):
        return "html"
    suffix = Path(name).suffix.lower()
    if suffix == ".pdf" and data:
        raise InputError(f"{name} is not a PDF, whatever its name says: check the file")
    return "html" if suffix in _HTML_SUFFIXES else "text"


def _bom_encoding(data: bytes) -> str | None:
    return next((encoding for bom, encoding in _BOMS if data.startswith(bom)), None)


def _declared_encoding(data: bytes) -> str | None:
    """The character set an HTML page names in its own markup, if Python knows it."""
    declared = EncodingDetector.find_declared_encoding(data, is_html=True)
    try:
        return codecs.lookup(declared).name if declared else None
    except LookupError:
        return None


def _decode(data: bytes, shown: str, declared: str | None = None) -> str:
    """Bytes to text: by byte order mark, as UTF-8, as ``declared``, or as what the bytes look
    like. Raises InputError for bytes that are no text."""
    text = None
    marked = _bom_encoding(data)
    for encoding in (marked,) if marked else ("utf-8", declared):
        if encoding is not None and text is None:
            try:
                text = data.decode(encoding)
            except (UnicodeError, LookupError):  # LookupError: a codec that is not a text one
                continue
    if text is None and not marked:
        best = charset_normalizer.from_bytes(data).best()
        text = None if best is None else str(best)
    if text is None or _NOT_TEXT.search(text):
        raise InputError(
            f"{shown} is a binary file: give plain text, Markdown, HTML or PDF (convert it first)"
        )
    return text


def _pdf_text(data: bytes, shown: str) -> str:
    """The text layer of a PDF, pages a blank line apart."""
    logging.getLogger("pypdf").addHandler(_QUIET)  # its remarks on odd files are not for stderr
    try:
        reader = pypdf.PdfReader(io.BytesIO(data))
        locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if locked else [page.extract_text() for page in reader.pages]
    except Exception as error:  # on damaged files pypdf raises whatever its parser trips over
        raise InputError(
            f"{shown} is a damaged PDF ({type(error).__name__}): repair it or print it anew"
        ) from error
    if locked:
        raise InputError(f"{shown} is encrypted: remove its password first")
    text = "\n\n".join(page.strip("\n") for page in pages)
    if not text.strip():
        raise InputError(f"{shown} has no text layer: run text recognition (OCR) on it first")
    # A broken font map can yield half of a surrogate pair, which no tokenizer takes.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
