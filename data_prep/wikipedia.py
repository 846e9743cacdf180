"""Reads the pages of a MediaWiki XML dump from a stream of bytes, in bounded memory, with DTDs refused."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple
from xml.parsers import expat

from data_prep.errors import DataError

SILENCE_LIMIT = 16 << 20  # bytes that may pass without one XML event: more is a bomb or not a dump
FILE_NAMESPACE, CATEGORY_NAMESPACE, MEDIA_NAMESPACE = "6", "14", "-2"


class Page(NamedTuple):
    """One page as it stands in the dump. `text` is wikitext, empty when there is a reason to reject the page."""

    id: str
    title: str
    text: str
    rejected: str  # "", "other namespace", "redirect" or "too large"


@dataclass
class SiteNames:
    """What a dump says about its wiki: the language and the local names of the namespaces that carry no prose."""

    language: str = ""
    files: set[str] = field(default_factory=lambda: {"file", "image", "media"})  # lower case
    categories: set[str] = field(default_factory=lambda: {"category"})

    def hidden(self) -> frozenset[str]:
        """Lower-case prefixes of links that show no text."""
        return frozenset(self.files | self.categories)


class PageReader:
    """Turns chunks of XML into pages. `names` is filled as soon as the header has passed.

    `last_page` (the id of the last complete page) and `closed` (whether </mediawiki> was seen) tell a cut dump.
    """

    def __init__(self, name: str, *, max_page_bytes: int = 8 << 20, names: SiteNames | None = None):
        self.names = names or SiteNames()
        self.last_page = ""
        self.closed = False
        self._name = name
        self._max_characters = max_page_bytes
        self._pages: list[Page] = []
        self._quiet_bytes = 0
        self._path: list[str] = []
        self._pieces: list[str] = []
        self._num_characters = 0
        self._collecting = False
        self._values: dict[str, str] = {}
        self._namespace_key = ""
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.buffer_size = 1 << 16
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        # A dump has no DTD. Entities declared in one are how XML bombs and file disclosure work.
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.EntityDeclHandler = self._refuse
        self._parser.ExternalEntityRefHandler = self._refuse

    def feed(self, chunk: bytes) -> list[Page]:
        """The pages completed by this chunk; DataError when the XML is not well-formed or holds a DTD."""
        self._pages = []
        self._quiet_bytes += len(chunk)
        self._parse(chunk, final=False)
        if self._quiet_bytes > SILENCE_LIMIT:
            raise DataError(
                f"reading dump {self._name}: {self._quiet_bytes} bytes without an XML element - "
                "an oversized comment or not a MediaWiki dump - give a pages-articles dump"
            )
        return self._pages

    def finish(self) -> list[Page]:
        """The last pages; DataError when the XML ends too early."""
        self._pages = []
        self._parse(b"", final=True)
        return self._pages

    def _parse(self, chunk: bytes, *, final: bool) -> None:
        try:
            self._parser.Parse(chunk, final)
        except expat.ExpatError as error:
            if final and not self.closed:
                raise DataError(
                    f"reading dump {self._name}: ends before </mediawiki>, last complete page id "
                    f"({self.last_page or 'none'}) - the file was cut short - download it again, or keep the complete "
                    "pages with --allow-partial"
                ) from None
            raise DataError(
                f"reading dump {self._name}: line {error.lineno}, column {error.offset + 1} "
                f"({expat.ErrorString(error.code)}), after page id ({self.last_page or 'none'}) - "
                "not well-formed XML - download it again, or keep the pages before with --allow-partial"
            ) from None

    def _refuse(self, *_) -> int:
        raise DataError(
            f"reading dump {self._name}: document type or entity declaration - refused, since dumps have none and "
            "XML bombs need one - give a MediaWiki pages-articles dump"
        )

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        self._quiet_bytes = 0
        parent = self._path[-1] if self._path else ""
        self._path.append(tag)
        if tag == "page":
            self._values = {}
        elif tag == "redirect" and parent == "page":
            self._values["redirect"] = attributes.get("title", "")
        elif (tag in ("title", "ns", "id") and parent == "page") or (tag == "text" and parent == "revision"):
            if tag == "text" and (self._values.get("ns", "0") != "0" or "redirect" in self._values):
                return
            self._collect()
        elif tag == "namespace":
            self._namespace_key = attributes.get("key", "")
            self._collect()
        elif not parent:
            if tag != "mediawiki":
                raise DataError(
                    f"reading dump {self._name}: root element ({tag}) - not mediawiki - give a MediaWiki XML dump"
                )
            self.names.language = attributes.get("xml:lang", self.names.language)

    def _collect(self) -> None:
        self._pieces, self._num_characters, self._collecting = [], 0, True
        self._parser.CharacterDataHandler = self._characters

    def _characters(self, data: str) -> None:
        self._quiet_bytes = 0
        self._num_characters += len(data)
        if self._num_characters <= self._max_characters:
            self._pieces.append(data)

    def _end(self, tag: str) -> None:
        self._quiet_bytes = 0
        self._path.pop()
        if self._collecting:
            self._parser.CharacterDataHandler = None
            self._collecting = False
            value = "".join(self._pieces)
            self._pieces = []
            if tag == "namespace":
                self._add_namespace(value)
                return
            self._values[tag] = value
            if self._num_characters > self._max_characters:
                self._values["too large"] = tag
        if tag == "page":
            self._pages.append(self._page())
        elif tag == "mediawiki":
            self.closed = True

    def _add_namespace(self, name: str) -> None:
        if self._namespace_key in (FILE_NAMESPACE, MEDIA_NAMESPACE):
            self.names.files.add(name.lower())
        elif self._namespace_key == CATEGORY_NAMESPACE:
            self.names.categories.add(name.lower())

    def _page(self) -> Page:
        values = self._values
        self.last_page = values.get("id", self.last_page)
        rejected = ""
        if values.get("ns", "0") != "0":
            rejected = "other namespace"
        elif "redirect" in values:
            rejected = "redirect"
        elif "too large" in values:
            rejected = "too large"
        return Page(self.last_page, values.get("title", ""), "" if rejected else values.get("text", ""), rejected)


def read_pages(chunks: Iterable[bytes], reader: PageReader) -> Iterator[Page]:
    """All pages of a dump given as chunks of bytes (any sizes, UTF-8 or UTF-16 with a byte order mark)."""
    for chunk in chunks:
        yield from reader.feed(chunk)
    yield from reader.finish()
