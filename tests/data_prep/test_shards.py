import json
import os
import random

import numpy as np
import pytest

from data_prep.errors import DataError
from data_prep.files import write_json
from data_prep.shards import (
    Manifest,
    Shard,
    id_dtype,
    open_shards,
    read_manifest,
    shard_name,
    tokenizer_hash,
    write_manifest,
    write_shard,
)


@pytest.fixture
def folder(tmp_path):
    """3 shards of 200 rows of 16 tokens; row r holds r * 16 + column."""
    entries = []
    for number in range(3):
        ids = (np.arange(200 * 16).reshape(200, 16) + number * 3200).astype(np.uint16)
        name = shard_name(number, 3)
        size, digest = write_shard(tmp_path / name, {"input_ids": ids, "length": np.full(200, 16, np.uint8)})
        entries.append(Shard(name, 200, 3200, size, digest))
    write_manifest(tmp_path, manifest(entries))
    return tmp_path


def manifest(entries):
    return Manifest(
        schema_version=1,
        rows="bert-pairs",
        length=16,
        num_rows=sum(entry.rows for entry in entries),
        num_tokens=sum(entry.tokens for entry in entries),
        tokenizer={},
        sources=[],
        shards=entries,
    )


def rewrite(folder, **changes):
    """Writes the manifest with changed values and a matching fingerprint, as someone who forges it would."""
    values = json.loads((folder / "manifest.json").read_text())
    values.update(changes)
    values.pop("fingerprint")
    shards = [Shard(**entry) for entry in values.pop("shards")]
    write_manifest(folder, Manifest(shards=shards, **values))


def test_rows_come_back_in_the_order_asked_for_across_shards(folder):
    shards = open_shards(folder)
    indices = np.array([599, 0, 200, 199, 0, 401])
    rows = shards.read(indices)
    assert np.array_equal(rows["input_ids"][:, 0], indices * 16)
    assert rows["input_ids"].dtype == np.uint16
    assert shards.locate(401) == ("data-00002-of-00003.arrow", 1)


def test_a_row_that_does_not_exist_is_an_index_error(folder):
    for bad in (-1, 600):
        with pytest.raises(IndexError):
            open_shards(folder).read(np.array([bad]))
        with pytest.raises(IndexError):
            open_shards(folder).locate(bad)


def test_what_is_read_is_a_copy_that_may_be_changed(folder):
    shards = open_shards(folder)
    shards.read(np.array([0]))["input_ids"][:] = 7
    assert shards.read(np.array([0]))["input_ids"][0, 1] == 1


@pytest.mark.fault(7)
def test_every_bit_flip_is_found_before_a_row_is_read(folder, injected):
    rng = random.Random(0)
    injected(200)
    for _ in range(200):
        number = rng.randrange(3)
        path = folder / shard_name(number, 3)
        content = bytearray(path.read_bytes())
        position = rng.randrange(len(content))
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=rf"{path.name}: hash \w+, expected \w+ .* run the capgap prepare command"):
            open_shards(folder).read(np.array([number * 200]))
        path.write_bytes(content)
    open_shards(folder).verify()


@pytest.mark.fault(8)
def test_every_truncation_is_found(folder, injected):
    path = folder / shard_name(1, 3)
    content = path.read_bytes()
    cuts = [0, *range(1, len(content), len(content) // 100), len(content) - 1]
    injected(len(cuts))
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match=f"{cut} bytes, expected {len(content)}"):
            open_shards(folder)


@pytest.mark.fault(8)
def test_a_missing_shard_is_named(folder):
    (folder / shard_name(2, 3)).unlink()
    with pytest.raises(DataError, match=r"data-00002-of-00003.arrow: no such file"):
        open_shards(folder)


def test_a_folder_without_a_manifest_is_not_finished(tmp_path):
    with pytest.raises(DataError, match="not finished"):
        open_shards(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_shards(tmp_path / "none")


@pytest.mark.fault(29)
def test_a_manifest_of_another_version_or_changed_by_hand_is_refused(folder, injected):
    injected(3)
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    write_json(path, {**values, "num_tokens": 5})
    with pytest.raises(DataError, match="changed by hand"):
        read_manifest(folder)
    write_json(path, {**values, "schema_version": 99})
    with pytest.raises(DataError, match=r"schema_version \(99\)"):
        read_manifest(folder)
    path.write_text("[]")
    with pytest.raises(DataError, match="unexpected content"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../data-00000-of-00003.arrow",
        "/etc/passwd",
        "sub/data-00000-of-00003.arrow",
        "..",
        "",
        "data-00000-of-00003.arrow\n",
        "data-00000-of-00003.arrow/../../x",
        "~/data-00000-of-00003.arrow",
        None,
    ],
)
@pytest.mark.fault(29)
def test_a_manifest_cannot_name_a_file_elsewhere(folder, name):
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    entries[0]["file"] = name
    rewrite(folder, shards=entries)
    with pytest.raises(DataError, match="shard name"):
        open_shards(folder)


@pytest.mark.fault(29)
def test_a_shard_listed_twice_a_link_out_of_the_folder_and_wrong_counts_are_refused(folder, tmp_path_factory, injected):
    entries = json.loads((folder / "manifest.json").read_text())["shards"]
    injected(3)
    rewrite(folder, shards=[entries[0], entries[0], entries[2]])
    with pytest.raises(DataError, match="listed twice"):
        open_shards(folder)
    rewrite(folder, shards=entries, num_rows=7)
    with pytest.raises(DataError, match=r"num_rows \(7\)"):
        open_shards(folder)
    rewrite(folder, shards=entries, num_rows=600)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret"
    path = folder / shard_name(0, 3)
    os.replace(path, elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(DataError, match="a link out of the folder"):
        open_shards(folder)


def test_ids_take_two_bytes_up_to_65536_entries():
    assert id_dtype(30522) == id_dtype(65536) == np.uint16
    assert id_dtype(65537) == np.uint32


def test_the_tokenizer_hash_is_the_same_for_vocab_txt_tokenizer_json_and_the_object(tokenizer_folder, prepared):
    from transformers import AutoTokenizer

    expected = read_manifest(prepared).tokenizer["hash"]
    assert tokenizer_hash(tokenizer_folder) == expected
    assert tokenizer_hash(prepared / "tokenizer") == expected
    assert tokenizer_hash(AutoTokenizer.from_pretrained(str(prepared / "tokenizer"))) == expected


def test_two_swapped_words_change_the_tokenizer_hash(tokenizer_folder, tmp_path):
    words = (tokenizer_folder / "vocab.txt").read_text().split("\n")
    words[300], words[301] = words[301], words[300]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    assert tokenizer_hash(tmp_path) != tokenizer_hash(tokenizer_folder)


def test_the_folder_loads_with_datasets_and_streams(prepared):
    import datasets

    loaded = datasets.load_from_disk(str(prepared))
    shards = open_shards(prepared)
    assert len(loaded) == shards.num_rows
    row = shards.read(np.array([5]))
    assert loaded[5]["input_ids"] == row["input_ids"][0].tolist()
    files = str(prepared / "data-*.arrow")
    stream = datasets.load_dataset("arrow", data_files=files, streaming=True, split="train")
    assert next(iter(stream))["input_ids"] == loaded[0]["input_ids"]


def test_a_row_costs_at_most_2_02_bytes_per_token(tmp_path):
    rows = 20_000
    size, _ = write_shard(
        tmp_path / "a.arrow",
        {
            "input_ids": np.ones((rows, 128), np.uint16),
            "length": np.ones(rows, np.uint8),
            "segment_boundary": np.ones(rows, np.uint8),
            "segments_in_order": np.ones(rows, bool),
        },
    )
    assert size / (rows * 128) <= 2.02
