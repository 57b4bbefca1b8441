import io
import os

import pypdf
import pytest

from narrows.errors import InputError, NarrowsError
from narrows.retrieve.documents import read_document, read_documents


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def pdf_bytes(*pages, password=None):
    """A PDF of one line of Helvetica a page; an empty string makes a page without text."""
    writer = pypdf.PdfWriter()
    for text in pages:
        page = writer.add_blank_page(300, 200)
        if not text:
            continue
        font = pypdf.generic.DictionaryObject(
            {
                pypdf.generic.NameObject("/Type"): pypdf.generic.NameObject("/Font"),
                pypdf.generic.NameObject("/Subtype"): pypdf.generic.NameObject("/Type1"),
                pypdf.generic.NameObject("/BaseFont"): pypdf.generic.NameObject("/Helvetica"),
            }
        )
        content = pypdf.generic.DecodedStreamObject()
        content.set_data(f"BT /F1 12 Tf 20 100 Td ({text}) Tj ET".encode())
        page[pypdf.generic.NameObject("/Resources")] = pypdf.generic.DictionaryObject(
            {
                pypdf.generic.NameObject("/Font"): pypdf.generic.DictionaryObject(
                    {pypdf.generic.NameObject("/F1"): font}
                )
            }
        )
        page[pypdf.generic.NameObject("/Contents")] = writer._add_object(content)
    if password is not None:
        writer.encrypt(user_password=password, owner_password="owner", algorithm="AES-256")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


# ------------------------------------------------------------------------------------------ text


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "noname"])
def test_text_is_returned_unchanged(tmp_path, name):
    text = "# Title\r\n\r\nBeide, 漢字。 👩‍👩‍👧 \ttab\rold mac\n\n  end  "
    document = read_document(write(tmp_path, name, text))
    assert document.text == text
    assert document.name == str(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_mark_decides_and_is_no_text(tmp_path, encoding):
    text = "Naïve 漢字\r\n👍 done"
    assert read_document(write(tmp_path, "a.txt", text.encode(encoding))).text == text


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_in_either_byte_order(tmp_path, codec):
    assert read_document(write(tmp_path, "a.txt", ("\ufeffgrün\r\n").encode(codec))).text == (
        "grün\r\n"
    )


def test_legacy_encoding_is_detected(tmp_path):
    text = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 20
    assert read_document(write(tmp_path, "a.txt", text.encode("cp1251"))).text == text


def test_stdin():
    assert read_document("-", stdin=io.BytesIO(b"from\r\na pipe")).text == "from\r\na pipe"


def test_many_documents_keep_their_order_and_stdin_comes_once(tmp_path):
    a, b = write(tmp_path, "a.txt", "one"), write(tmp_path, "b.txt", "two")
    documents = read_documents([b, "-", a], stdin=io.BytesIO(b"three"))
    assert [d.text for d in documents] == ["two", "three", "one"]
    assert documents[1].name == "-"
    with pytest.raises(InputError, match="twice"):
        read_documents(["-", "-"], stdin=io.BytesIO(b"x"))


# ------------------------------------------------------------------------------------------ html


def test_html_gives_visible_text_in_blocks(tmp_path):
    page = """<!DOCTYPE html><html><head><title>no</title><style>p {color: red}</style>
    <script>var hidden = "no";</script></head><body><!-- no -->
    <h1>Big   <em>title</em></h1><p>First
    line<br>second</p><ul><li>one</li><li>two</li></ul><p hidden>no</p>
    <table><tr><td>a</td><td>b</td></tr><tr><td>c</td><td>d</td></tr></table>
    <pre>def f():
        return 1 &lt; 2</pre><noscript>no</noscript>&eacute; 漢字 👍</body></html>"""
    assert read_document(write(tmp_path, "page.txt", page)).text == (
        "Big title\n\nFirst line\nsecond\n\none\ntwo\n\na\tb\nc\td\n\n"
        "def f():\n        return 1 < 2\n\né 漢字 👍"
    )


def test_html_by_suffix_and_declared_encoding(tmp_path):
    page = '<meta charset="windows-1251"><p>Привет'.encode("cp1251")
    assert read_document(write(tmp_path, "a.htm", page)).text == "Привет"


def test_html_nested_beyond_the_recursion_limit(tmp_path):
    page = "<html>" + "<div>" * 3000 + "deep" + "</div>" * 3000
    assert read_document(write(tmp_path, "a.html", page)).text == "deep"


def test_markdown_that_mentions_html_stays_text(tmp_path):
    text = "# On `<html>`\n\n<b>bold</b>\n"
    assert read_document(write(tmp_path, "a.md", text)).text == text


def test_html_without_visible_text_is_empty(tmp_path):
    with pytest.raises(InputError, match="is empty"):
        read_document(write(tmp_path, "a.html", "<html><script>1</script></html>"))


# ------------------------------------------------------------------------------------------- pdf


def test_pdf_pages_in_order_whatever_the_suffix(tmp_path):
    path = write(tmp_path, "a.bin", pdf_bytes("Page one", "Page two"))
    assert read_document(path).text == "Page one\n\nPage two"


def test_pdf_with_an_empty_password_is_read(tmp_path):
    assert read_document(write(tmp_path, "a.pdf", pdf_bytes("open", password=""))).text == "open"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pdf_bytes("secret", password="pw"), "is encrypted: remove its password"),
        (pdf_bytes(""), "has no text layer"),
        (pdf_bytes("cut short")[:300], "is a damaged PDF"),
        (b"%PDF-1.7\nnothing more", "is a damaged PDF"),
        (b"just text", "is not a PDF"),
    ],
)
def test_unusable_pdf(tmp_path, data, message, capsys):
    with pytest.raises(InputError, match=message) as caught:
        read_document(write(tmp_path, "a.pdf", data))
    assert "\n" not in str(caught.value)
    assert "a.pdf" in str(caught.value)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("data", [b"", b" \r\n\t\n", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.pdf"])
def test_empty(tmp_path, data, name):
    with pytest.raises(InputError, match=r"is empty|is not a PDF"):
        read_document(write(tmp_path, name, data))


def test_empty_stdin_is_named():
    with pytest.raises(InputError, match="standard input is empty"):
        read_document("-", stdin=io.BytesIO(b""))


@pytest.mark.parametrize(
    "data",
    [
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8,
        b"\x7fELF\x02\x01\x01\x00" + bytes(64),
        b"PK\x03\x04\x14\x00\x00\x00" + bytes(range(256)),
        b"text\x00with a NUL",
        b"\xff\xfe" + b"\x00\xd8" * 7,
        bytes((i * 7919 + i * i * 31) % 256 for i in range(4096)),
    ],
)
def test_binary(tmp_path, data):
    with pytest.raises(InputError, match="is a binary file"):
        read_document(write(tmp_path, "a.txt", data))


def test_missing_directory_and_bad_names(tmp_path):
    for path, message in [
        (tmp_path / "none.txt", "does not exist"),
        (write(tmp_path, "f", "x") / "below", "does not exist"),
        (tmp_path, "is a directory"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
    ]:
        with pytest.raises(NarrowsError, match=message) as caught:
            read_document(path)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_unreadable(tmp_path):
    path = write(tmp_path, "a.txt", "x")
    path.chmod(0)
    with pytest.raises(InputError, match="may not be read"):
        read_document(path)


def test_permission_error_is_reported(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(InputError, match="may not be read"):
        read_document(tmp_path / "a.txt")
