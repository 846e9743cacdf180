import bz2
import random

import pytest
from dumps import multistream

from data_prep.bz2_streams import decompress, find_streams, read_index
from data_prep.errors import DataError

PARTS = [bytes(random.Random(n).choices(b"abcdefgh ", k=20_000)) for n in range(4)]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "a.bz2"
    file.write_bytes(b"".join(bz2.compress(part) for part in PARTS))
    return file


def test_all_streams_are_unpacked_and_found(path):
    assert b"".join(decompress(path)) == b"".join(PARTS)
    starts = find_streams(path)
    assert len(starts) == 4
    assert b"".join(decompress(path, starts[1], starts[3])) == PARTS[1] + PARTS[2]


@pytest.mark.fault(10)
def test_a_cut_at_every_place_is_an_error_unless_whole_streams_remain(path, injected):
    content, starts = path.read_bytes(), find_streams(path)
    cuts = range(0, len(content), max(1, len(content) // 300))
    injected(len(cuts))
    for cut in cuts:
        path.write_bytes(content[:cut])
        if cut in (0, *starts):
            continue
        with pytest.raises(DataError, match=r"byte \d+"):
            list(decompress(path))


@pytest.mark.fault(10)
def test_garbage_between_or_after_streams_is_an_error_with_its_place(path, injected):
    content, starts = path.read_bytes(), find_streams(path)
    injected(len(starts))
    for place in (*starts[1:], len(content)):
        path.write_bytes(content[:place] + b"garbage!" + content[place:])
        with pytest.raises(DataError, match=rf"stream that begins at byte {place} "):
            list(decompress(path))


@pytest.mark.fault(10)
def test_a_flipped_bit_is_an_error(path, injected):
    content = path.read_bytes()
    rng = random.Random(5)
    injected(60)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            unpacked = b"".join(decompress(path))
        except DataError:
            continue
        assert unpacked == b"".join(PARTS)  # the level digit and padding bits carry nothing


@pytest.mark.fault(14)
def test_a_bomb_is_unpacked_in_small_pieces(tmp_path):
    (tmp_path / "bomb.bz2").write_bytes(bz2.compress(b"\0" * 50_000_000))
    assert max(map(len, decompress(tmp_path / "bomb.bz2"))) <= 1 << 20


def test_the_index_of_a_dump_lists_its_streams(tmp_path):
    dump = multistream(tmp_path)
    index = tmp_path / "enwiki-multistream-index.txt.bz2"
    assert read_index(index) == find_streams(dump)[1:-1]
    index.write_bytes(bz2.compress(b"500:1:A\n100:2:B\n"))
    with pytest.raises(DataError, match=r"line 2 .* not a rising"):
        read_index(index)
