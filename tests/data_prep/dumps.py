"""Small dumps cut from the bundled sample, in the forms that Wikimedia ships."""

import bz2
from pathlib import Path

SAMPLE = Path(__file__).parents[2] / "data_prep/samples/wikipedia/enwiki-2016-sample.xml.bz2"


def dump_of(num_pages: int) -> tuple[str, list[str], str]:
    """The header, pages of the sample from the 61st on, and the footer, as text."""
    text = bz2.decompress(SAMPLE.read_bytes()).decode()
    begin, end = text.index("  <page>"), text.rindex("</page>") + len("</page>\n")
    pages = [page + "</page>\n" for page in text[begin:end].split("</page>\n")[60 : 60 + num_pages]]
    return text[:begin], pages, text[end:]


def multistream(folder: Path, pages_per_stream: int = 5) -> Path:
    """50 pages in Wikimedia's multistream form: header, streams of pages, footer, and an index."""
    header, pages, footer = dump_of(50)
    bodies = ["".join(pages[i : i + pages_per_stream]) for i in range(0, len(pages), pages_per_stream)]
    streams = [header, *bodies, footer]
    path = folder / "enwiki-multistream.xml.bz2"
    index = []
    with open(path, "wb") as file:
        for number, stream in enumerate(streams):
            if 0 < number < len(streams) - 1:
                index += [f"{file.tell()}:{n}:Title {n}\n" for n in range(pages_per_stream)]
            file.write(bz2.compress(stream.encode()))
    (folder / "enwiki-multistream-index.txt.bz2").write_bytes(bz2.compress("".join(index).encode()))
    return path
