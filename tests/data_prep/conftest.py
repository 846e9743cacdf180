"""Paths to the bundled sample and a small WordPiece tokenizer made of its words."""

import json
from collections import Counter
from pathlib import Path

import pytest
from dumps import SAMPLE, dump_of

from data_prep.bz2_streams import decompress
from data_prep.prepare import PrepareConfig, prepare
from data_prep.wikipedia import PageReader, read_pages


@pytest.fixture(scope="session")
def sample() -> Path:
    """The bundled dump: 206 pages, 99 redirects, 1 page of another namespace."""
    return SAMPLE


@pytest.fixture(scope="session")
def small_dump(tmp_path_factory) -> Path:
    """50 pages of the sample, 31 of them no redirects, 1.8 MB of XML, uncompressed."""
    header, pages, footer = dump_of(50)
    path = tmp_path_factory.mktemp("dump") / "small.xml"
    path.write_text(header + "".join(pages) + footer, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pages():
    """The 106 articles of the bundled dump."""
    return [page for page in read_pages(decompress(SAMPLE), PageReader("sample")) if not page.rejected]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory, pages) -> Path:
    """A BERT folder of vocab.txt only: letters, digits, and 4,000 frequent words of the sample."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = Counter(word for page in pages for word in page.text.lower().split() if word.isalpha() and word.isascii())
    alphabet = [chr(code) for code in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *alphabet, *(f"##{sign}" for sign in alphabet)]
    frequent = [word for word, _ in sorted(words.items(), key=lambda item: (-item[1], item[0])) if len(word) > 1]
    vocabulary += frequent[:4000]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def jsonl(tmp_path) -> Path:
    """40 small documents of 5 to 12 sentences."""
    path = tmp_path / "documents.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(40):
            text = " ".join(f"Document {number} says a thing about item {k} here." for k in range(5 + number % 8))
            file.write(json.dumps({"id": number, "title": f"Title {number}", "text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, sample, tokenizer_folder) -> Path:
    """The sample as BERT pairs of 128 tokens, in several parts."""
    out = tmp_path_factory.mktemp("prepared") / "shards"
    prepare(
        PrepareConfig(source=(str(sample),), out=out, tokenizer=str(tokenizer_folder), length=128, part_megabytes=1.0)
    )
    return out
