import random
import resource
import time

import pytest
from dumps import dump_of

from data_prep.cleaning import clean_wikitext
from data_prep.errors import DataError
from data_prep.wikipedia import PageReader, read_pages


def page(number: int, text: str, extra: str = "", namespace: int = 0) -> str:
    return (
        f"<page><title>Title {number}</title><ns>{namespace}</ns><id>{number}</id>{extra}"
        f"<revision><id>9</id><text>{text}</text></revision></page>"
    )


def pages_of(xml: str | bytes, **options):
    data = xml.encode() if isinstance(xml, str) else xml
    return list(read_pages([data], PageReader("test", **options)))


def test_pages_have_the_id_of_the_page_and_not_of_the_revision():
    (only,) = pages_of(f"<mediawiki>{page(5, 'a &amp; b &lt;ref&gt;')}</mediawiki>")
    assert (only.id, only.title, only.text, only.rejected) == ("5", "Title 5", "a & b <ref>", "")


def test_pages_without_prose_are_rejected_with_the_reason():
    xml = page(1, "x", namespace=10) + page(2, "x", '<redirect title="y"/>') + page(3, "y" * 100) + page(4, "z")
    pages = pages_of(f"<mediawiki>{xml}</mediawiki>", max_page_bytes=50)
    assert [p.rejected for p in pages] == ["other namespace", "redirect", "too large", ""]
    assert [p.text for p in pages] == ["", "", "", "z"]


def test_the_size_of_the_chunks_does_not_matter():
    header, pages, footer = dump_of(12)
    data = (header + "".join(pages) + footer).encode()
    whole = pages_of(data)
    rng = random.Random(3)
    chunks, start = [], 0
    while start < len(data):
        size = rng.choice([1, 7, 100, 5000, 100_000])
        chunks.append(data[start : start + size])
        start += size
    assert list(read_pages(chunks, PageReader("chunks"))) == whole


def test_namespace_names_are_learnt_from_the_header():
    names = '<namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace>'
    reader = PageReader("test")
    list(read_pages([f'<mediawiki xml:lang="de"><siteinfo>{names}</siteinfo></mediawiki>'.encode()], reader))
    assert {"datei", "kategorie", "file"} <= reader.names.hidden() and reader.names.language == "de"


@pytest.mark.parametrize("bad", [b"\x00", b"\x01", b"\xff\xfe", b"\xc3\x28", b"\xed\xa0\x80", b"<b>", b"&nope;"])
@pytest.mark.fault(11)
def test_damaged_xml_is_an_error_with_line_and_column(bad):
    data = (
        b"<mediawiki>\n"
        + page(1, "fine").encode()
        + b"\n"
        + page(2, "XX").encode().replace(b"XX", bad)
        + b"</mediawiki>"
    )
    with pytest.raises(DataError, match=r"line 3, column \d+ \(.*\), after page id \(1\) - not well-formed XML"):
        pages_of(data)


@pytest.mark.fault(10)
def test_a_dump_cut_anywhere_is_never_taken_for_whole(injected):
    header, pages, footer = dump_of(3)
    data = (header + "".join(pages[:1]) + footer.rstrip()).encode()
    cuts = range(1, len(data), max(1, len(data) // 200))
    injected(len(cuts))
    for cut in cuts:
        with pytest.raises(DataError, match=r"ends before </mediawiki>|not well-formed"):
            pages_of(data[:cut])


BOMBS = {
    "billion laughs": '<!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]><mediawiki>&b;</mediawiki>',
    "quadratic": f'<!DOCTYPE l [<!ENTITY a "{"x" * 100_000}">]><mediawiki>{"&a;" * 10_000}</mediawiki>',
    "external entity": '<!DOCTYPE l [<!ENTITY x SYSTEM "file:///etc/passwd">]><mediawiki>&x;</mediawiki>',
    "external dtd": '<!DOCTYPE l SYSTEM "http://127.0.0.1:9/x.dtd"><mediawiki/>',
    "parameter entity": '<!DOCTYPE l [<!ENTITY % p SYSTEM "file:///etc/passwd"> %p;]><mediawiki/>',
    "plain doctype": "<!DOCTYPE mediawiki><mediawiki/>",
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.fault(14)
def test_xml_bombs_are_refused_at_once(bomb):
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="document type or entity declaration - refused"):
        pages_of(BOMBS[bomb])
    assert time.monotonic() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.fault(14)
def test_an_endless_comment_is_refused_instead_of_held_in_memory():
    def chunks():
        yield b"<mediawiki><!--"
        while True:
            yield b"x" * (4 << 20)

    with pytest.raises(DataError, match="without an XML element"):
        list(read_pages(chunks(), PageReader("endless")))


def test_another_root_element_is_refused():
    with pytest.raises(DataError, match=r"root element \(html\)"):
        pages_of("<html></html>")


@pytest.mark.fault(13)
def test_mutated_wikitext_is_always_cleaned(pages, injected):
    injected(300)
    rng = random.Random(0)
    marks = [
        "{{",
        "}}",
        "[[",
        "]]",
        "{|",
        "|}",
        "<ref>",
        "</ref>",
        "<!--",
        "''",
        "\n",
        "|",
        "=",
        "-{",
        "\x00",
    ]
    for _ in range(300):
        text = rng.choice(pages).text[:4000]
        for _ in range(rng.randint(1, 30)):
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(marks) + text[at + rng.choice([0, 0, 3]) :]
        cleaned = clean_wikitext(text)
        assert "{{" not in cleaned
