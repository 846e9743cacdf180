import errno
from pathlib import Path

import pytest

from data_prep.errors import DataError
from data_prep.files import (
    TEMPORARY_MARK,
    content_hash,
    file_hash,
    free_bytes,
    read_json,
    remove_leftovers,
    rename,
    replacing_file,
    replacing_folder,
    require_free_space,
    translating_no_space,
    watching_operations,
    write_bytes,
    write_json,
)


class Crash(BaseException):
    """What a killed process looks like from inside: nothing is cleaned up."""


def test_a_written_file_has_the_content_and_the_hash_that_is_returned(tmp_path):
    digest = write_bytes(tmp_path / "a", b"x" * 3_000_000)
    assert (tmp_path / "a").read_bytes() == b"x" * 3_000_000
    assert digest == content_hash(b"x" * 3_000_000) == file_hash(tmp_path / "a")


@pytest.mark.fault(4)
def test_a_crash_at_any_operation_leaves_the_old_file_or_the_new_one(tmp_path, injected):
    path = tmp_path / "value.json"
    operations = []
    with watching_operations(lambda operation, _: operations.append(operation)):
        write_json(path, {"value": "old"})
    assert operations == ["open", "write", "fsync", "rename", "fsync_folder", "stat"]
    injected(len(operations))
    for crash_at in range(len(operations)):
        write_json(path, {"value": "old"})
        count = iter(range(100))

        def crash(operation, _, count=count, crash_at=crash_at):
            if next(count) == crash_at:
                raise Crash

        with pytest.raises(Crash), watching_operations(crash):
            write_json(path, {"value": "new"})
        assert read_json(path, "")["value"] == ("old" if crash_at <= operations.index("rename") else "new")
    remove_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.fault(6)
def test_a_full_disk_keeps_the_old_file_removes_the_temporary_and_names_the_path(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def fill(operation, _):
        if operation == "write":
            raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(DataError, match=r"writing .*/a: No space left on device \(\d+ bytes free\)"),
        watching_operations(fill),
    ):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.fault(6)
def test_a_really_full_device_is_a_one_line_error():
    no_space = pytest.raises(DataError, match="No space left")
    with open("/dev/full", "wb", buffering=0) as full, no_space, translating_no_space(Path("/dev/full")):
        full.write(b"x")


@pytest.mark.fault(33)
def test_a_rename_that_fails_once_is_tried_again(tmp_path):
    (tmp_path / "a").write_text("new")
    failures = iter([OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EBUSY, "busy")])

    def fail(operation, _):
        if operation == "rename" and (error := next(failures, None)):
            raise error

    with watching_operations(fail):
        rename(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


@pytest.mark.fault(33)
def test_a_file_that_shows_its_full_size_late_is_waited_for(tmp_path):
    path = tmp_path / "a"
    late = iter([True, True])

    def delay(operation, seen):
        if operation == "stat" and next(late, False):
            raise OSError(errno.ENOENT, "not visible yet")

    with watching_operations(delay):
        write_bytes(path, b"data")
    assert path.read_bytes() == b"data"


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with replacing_folder(folder) as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(RuntimeError), replacing_folder(folder) as fresh:
        (fresh / "a").write_text("2")
        raise RuntimeError
    assert (folder / "a").read_text() == "1"
    with replacing_folder(folder) as fresh:
        (fresh / "b").write_text("2")
    assert [p.name for p in folder.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_error_in_the_block_keeps_the_old_file(tmp_path):
    write_bytes(tmp_path / "a", b"old")
    with pytest.raises(RuntimeError), replacing_file(tmp_path / "a") as file:
        file.write(b"new")
        raise RuntimeError
    assert (tmp_path / "a").read_bytes() == b"old"
    assert not [p for p in tmp_path.iterdir() if TEMPORARY_MARK in p.name]


@pytest.mark.fault(6)
def test_too_little_room_is_said_before_work_begins(tmp_path):
    require_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(DataError, match="bytes needed"):
        require_free_space(tmp_path, free_bytes(tmp_path) * 2 + 1)


def test_damaged_json_is_a_one_line_error(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(DataError, match=r"a\.json"):
        read_json(tmp_path / "a.json", "mend it")
    with pytest.raises(DataError, match="no such file - mend it"):
        read_json(tmp_path / "b.json", "mend it")
