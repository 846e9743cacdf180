import bz2
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.errors import ConfigError, DataError
from data_prep.sources import Document, ReadOptions, blend, fingerprint, open_source, read_source

ROWS = [{"id": n, "title": f"T{n}", "text": f"Text number {n} with ünïcode 日本 and\nline feeds."} for n in range(500)]


def read(path, **options) -> list[Document]:
    return list(read_source(open_source(0, str(path)), ReadOptions(**options), range_bytes=None))


def as_jsonl() -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst", "a.parquet", "saved", "multi.jsonl.gz"]
)
def test_every_form_gives_the_same_documents(name, tmp_path):
    path = tmp_path / name
    data = as_jsonl()
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=100)
    elif name == "saved":
        import datasets

        datasets.Dataset.from_list(ROWS).save_to_disk(str(path))
    elif name == "multi.jsonl.gz":
        path.write_bytes(gzip.compress(data[:5000]) + gzip.compress(data[5000:]))
    else:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}.get(path.suffix, bytes)
        path.write_bytes(pack(data))
    documents = read(path)
    assert [(d.id, d.title, d.text) for d in documents] == [(str(r["id"]), r["title"], r["text"]) for r in ROWS]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst", "a.parquet"])
@pytest.mark.fault(10)
def test_a_cut_file_is_an_error_that_names_it(name, tmp_path, injected):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes({".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}[path.suffix](as_jsonl()))
    content = path.read_bytes()
    injected(4)
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match=name.replace(".", r"\.")):
            read(path)


def test_text_files_are_cut_at_blank_lines_or_taken_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("First document.\nIts second line.\n\n\nSecond document.\n", encoding="utf-8")
    assert [d.text for d in read(path)] == ["First document.\nIts second line.", "Second document."]
    assert [d.id for d in read(path)] == ["a.txt:1", "a.txt:5"]
    assert len(read(path, txt_documents="file")) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.fault(11)
def test_text_in_unicode_encodings_is_read(encoding, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Ünïcode 日本.\r\nZeile zwei.\r\n\r\nDrei.", encoding=encoding)
    assert [d.text for d in read(path)] == ["Ünïcode 日本.\nZeile zwei.", "Drei."]


@pytest.mark.fault(11)
def test_bytes_that_are_not_text_are_replaced_and_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good \xff\xfe bad\x00 and \x07 bell\n")
    (document,) = read(path)
    assert document.replaced == 4
    assert document.text == "good \ufffd\ufffd bad\ufffd and \ufffd bell"


def test_wikiextractor_folders_are_read_file_by_file(tmp_path):
    for folder, number in (("AA", 0), ("AA", 1), ("AB", 0)):
        path = tmp_path / folder / f"wiki_{number:02d}"
        path.parent.mkdir(exist_ok=True)
        name = f"{folder}{number}"
        path.write_text(
            f'<doc id="{name}1" url="https://x/?curid=1" title="A "quoted" title">\n'
            f'A "quoted" title\n\nText of {name}.\n</doc>\n'
            f'<doc id="{name}2" url="u" title="Two">\nTwo\n\nMore text.\n</doc>\n',
            encoding="utf-8",
        )
    documents = read(tmp_path)
    assert [d.id for d in documents] == ["AA01", "AA02", "AA11", "AA12", "AB01", "AB02"]
    assert documents[0].title == 'A "quoted" title' and documents[0].text.strip() == "Text of AA0."
    cut = tmp_path / "AB" / "wiki_00"
    cut.write_text(cut.read_text()[:-8])
    with pytest.raises(DataError, match=r"wiki_00: document id \(AB02\) has no </doc>"):
        read(tmp_path)


@pytest.mark.fault(11)
def test_a_utf16_dump_is_read(tmp_path):
    page = "<page><title>Страница</title><ns>0</ns><id>7</id><revision><text>Текст.</text></revision></page>"
    xml = f'<?xml version="1.0" encoding="UTF-16"?><mediawiki xml:lang="bg">{page}</mediawiki>'
    path = tmp_path / "a.xml.bz2"
    path.write_bytes(bz2.compress(xml.encode("utf-16")))
    (document,) = read(path)
    assert (document.id, document.title, document.text) == ("7", "Страница", "Текст.")
    path.rename(tmp_path / "no-suffix.bz2")
    assert read(tmp_path / "no-suffix.bz2") == [document]


def test_several_parts_of_a_dump_are_one_source(tmp_path):
    for number in (1, 2):
        page = f"<page><title>T</title><ns>0</ns><id>{number}</id><revision><text>x</text></revision></page>"
        (tmp_path / f"enwiki-pages-articles{number}.xml").write_text(f"<mediawiki>{page}</mediawiki>")
    assert [d.id for d in read(tmp_path)] == ["1", "2"]


@pytest.mark.fault(24)
def test_a_name_that_is_nothing_is_explained(tmp_path, injected):
    injected(4)
    (tmp_path / "enwiki.xml.bz2").write_text("")
    with pytest.raises(DataError, match=r"no such file or folder - the folder .* has enwiki\.xml\.bz2"):
        open_source(0, str(tmp_path / "enwki.xml.bz2"))
    with pytest.raises(DataError, match=r"there is no folder /none/at/all"):
        open_source(0, "/none/at/all/x.txt")
    with pytest.raises(DataError, match="empty file"):
        read(tmp_path / "enwiki.xml.bz2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder has no files"):
        open_source(0, str(tmp_path / "empty"))


def test_a_hub_name_is_streamed_and_an_unknown_one_is_explained(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "none":
            raise FileNotFoundError("no such dataset on the hub")
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = list(read_source(open_source(0, "org/name:20231101.en"), ReadOptions(), range_bytes=None))
    assert asked == [("org/name", "20231101.en", "train", True)]
    assert len(documents) == 500 and documents[3].title == "T3"
    with pytest.raises(DataError, match=r"opening source none: no such file, and no such dataset"):
        list(read_source(open_source(0, "none"), ReadOptions(), range_bytes=None))


def test_a_row_without_the_text_field_names_those_that_exist(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"content": "x", "url": "y"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: no text in field \(text\) - the fields are content, url"):
        read(path)
    path.write_text('{"content": "x"}\n')
    assert read(path, text_field="content")[0].text == "x"
    path.write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(DataError, match=r"line 2 \('not json'\) - not JSON"):
        read(path)
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the fields are content"):
        read(tmp_path / "a.parquet")


def test_a_folder_of_splits_asks_for_one(tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:3])}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"a folder of splits \(train\).* - give .*train"):
        open_source(0, str(tmp_path / "d"))


def test_fingerprints_tell_sources_apart(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    first = fingerprint(open_source(0, str(tmp_path / "a.txt")))
    assert fingerprint(open_source(0, str(tmp_path / "a.txt"))) == first
    (tmp_path / "a.txt").write_text("two")
    assert fingerprint(open_source(0, str(tmp_path / "a.txt"))) != first


def documents_of(source: int, sizes: list[int]):
    return iter([Document(source, str(n), "", "x" * size) for n, size in enumerate(sizes)])


def test_a_blend_keeps_the_ratio_of_characters_at_every_moment():
    streams = [documents_of(0, [100] * 1000), documents_of(1, [350] * 1000)]
    taken = [0, 0]
    for document in blend(streams, [2.0, 1.0]):
        taken[document.source] += len(document.text)
        if sum(taken) > 5000:
            assert taken[0] / sum(taken) == pytest.approx(2 / 3, abs=0.08)
    assert taken[0] == 100_000


def test_a_blend_of_other_weights_than_sources_is_refused():
    with pytest.raises(ConfigError, match="one positive number per source"):
        list(blend([documents_of(0, [1])], [1.0, 2.0]))


@pytest.mark.fault(11)
def test_the_bulgarian_sample_in_utf16_is_read(sample):
    documents = read(sample.with_name("bgwiki-2017-sample.xml.bz2"))
    assert [document.rejected for document in documents] == ["", "other namespace", "other namespace"]
    assert "категория" in (documents[0].hidden or ()) and len(documents[0].text) == 13_790
