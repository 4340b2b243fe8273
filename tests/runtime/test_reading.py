"""What reads a file says which one it could not read and why, in one line, whatever stands in it."""

import errno
import io
import mmap
import os
import struct
import tempfile
import zipfile

import numpy as np
import pytest

from quest.config import ConfigError
from quest.runtime import files
from quest.runtime.files import LINE, array_names, one_line, read_arrays, read_json, read_rows
from quest.runtime.memory import Waiting
from quest.runtime.yaml_files import read_yaml


def test_a_message_is_one_line_of_limited_length():
    assert one_line("a\u2028b\nc\x1b[2J") == "a\\u2028b\\nc\\x1b[2J" and one_line("é 😀") == "é 😀"
    assert len(one_line("begin" + "x" * 10**6 + "end")) <= LINE + 5
    assert str(ConfigError("name: a\nb")) == "name: a\\nb"


TABLES = {
    "a,b\n1,2\n3\n": "line 3: 1 values for 2 columns",
    "a,b\n1,2,3\n": "line 2: 3 values for 2 columns",
    "b,a\n1,2\n": "columns are b, a; needed: a, b",
    "": "needed: a, b",
    'a,b\n"1"x,2\n': "line 2: ",
    b"a,b\n1,\xff\n": "not UTF-8",
}


@pytest.mark.parametrize("text", TABLES)
def test_tables_that_are_none(text, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=rf"t\.csv.*{TABLES[text]}"):
        read_rows(path, ["a", "b"])


def test_a_table(tmp_path):
    (tmp_path / "t.csv").write_text('a,b\n1,"x, ""y""\nz"\n\n2,\n', encoding="utf-8")
    assert read_rows(tmp_path / "t.csv", ["a", "b"]) == [{"a": "1", "b": 'x, "y"\nz'}, {"a": "2", "b": ""}]


def zipped(header: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    return file.getvalue()


def described(shape, kind="|u1") -> bytes:
    return f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode().ljust(117) + b"\n"


ARCHIVES = {
    "nothing": b"",
    "text": b"text",
    "more than memory": zipped(described("(1099511627776, 1024)")),
    "a shape below nothing": zipped(described("(-1, 3)")),
    "objects": zipped(described("(3,)", "|O")),
    "no header": zipped(b"{"),
}


@pytest.mark.parametrize("large", [files.LARGE, 0])  # 0: every array stays in its file
@pytest.mark.parametrize("what", ARCHIVES)
def test_archives_that_are_none(what, large, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGE", large)
    path = tmp_path / "a.npz"
    path.write_bytes(ARCHIVES[what])
    with pytest.raises(ValueError, match=r"a\.npz: not an \.npz file of arrays, or corrupted") as caught:
        read_arrays(path)
    assert len(str(caught.value).splitlines()) == 1
    np.save(tmp_path / "b.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"b\.npy: not an \.npz"):
        array_names(tmp_path / "b.npy")


def test_arrays_that_are_asked_for(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.zeros(2))
    assert array_names(tmp_path / "a.npz") == ["x", "y"] and read_arrays(tmp_path / "a.npz", ["z"]) == {}
    assert read_arrays(tmp_path / "a.npz", ["x", "z"])["x"].tolist() == [0, 1, 2]


def test_large_arrays_stay_in_their_file(tmp_path):
    path, large = tmp_path / "a.npz", np.arange(2**18, dtype=np.float64).reshape(512, 512)
    arrays = {"rows": large, "columns": large.T, "few": np.arange(3), "text": np.array("a")}
    np.savez(path, **arrays)
    found = read_arrays(path)
    assert all(np.array_equal(found[name], value) for name, value in arrays.items())

    def in_file(array):
        while isinstance(array.base, np.ndarray):
            array = array.base
        return isinstance(array.base, mmap.mmap)

    assert [name for name, value in found.items() if in_file(value)] == ["rows", "columns"]
    found["rows"][0, 0] = -1  # changes this array alone
    assert read_arrays(path, ["rows"])["rows"][0, 0] == 0
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    assert np.array_equal(read_arrays(tmp_path / "b.npz")["columns"], large.T)
    whole = path.read_bytes()
    place = whole.index(large[100].tobytes())
    (tmp_path / "c.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"c\.npz: not an \.npz file of arrays, or corrupted: Bad CRC-32"):
        read_arrays(tmp_path / "c.npz")


def test_large_arrays_are_aligned(tmp_path, monkeypatch):
    rows = np.random.default_rng(0).normal(size=(3000, 100)).astype(np.float32)
    np.savez(tmp_path / "a.npz", rows=rows)
    for no_room in (False, True):
        if no_room:
            monkeypatch.setattr(files.tempfile, "TemporaryFile", lambda: open("/dev/full", "w+b"))
        found = read_arrays(tmp_path / "a.npz")["rows"]
        assert found.flags.aligned and np.array_equal(found, rows) and found.mean() == rows.mean()


def test_fields_with_any_name(tmp_path):
    """Their arrays have a header of version 3.0."""
    rows = np.zeros(2**18, dtype=[("\u03b5", "<f4"), ("\u03c3", "<i8")])
    rows["\u03c3"] = np.arange(len(rows))
    with pytest.warns(UserWarning, match="3.0"):
        np.savez(tmp_path / "a.npz", rows=rows)
    assert np.array_equal(read_arrays(tmp_path / "a.npz")["rows"], rows)


def test_a_full_disk_is_told_with_its_folder_before_anything_is_written(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"no room for 2 MB of temporary arrays \(No space left.*set TMPDIR") as caught:
        files.merged([np.zeros(2**17), np.ones(2**17)], np.arange(2**18))
    assert tempfile.gettempdir() in str(caught.value)
    with pytest.raises(OSError, match="no room for 1 MB of temporary arrays"):
        Waiting(0)._bytes(10**6)


@pytest.mark.parametrize("large, mac", [(files.LARGE, False), (0, False), (0, True)])
def test_parts_are_merged_in_order(large, mac, monkeypatch):
    monkeypatch.setattr(files, "LARGE", large)
    if mac:
        monkeypatch.delattr(files.os, "posix_fallocate")
    parts = [np.arange(12.0).reshape(3, 4), 100 + np.arange(8.0).reshape(2, 4)]
    order = np.array([3, 0, 4, 2, 1])
    assert np.array_equal(files.merged(parts, order), np.concatenate(parts)[order])


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))])
YAML = {
    BOMB: "aliases stand for more than 100000 values",
    "a: &a [*a]": "an alias inside what it stands for",
    "a: " + "[" * 5000 + "]" * 5000: "nested too deeply",
    "a: 2026-99-99": "not YAML: month must be in",
    "a: !!timestamp x": "not YAML",
    "a: !!python/object/apply:os.getcwd []": "not YAML: could not determine a constructor",
    "a: [": "not YAML",
    "a: 1\na: 2": "line 2: key 'a' stands twice, first in line 1",
    "1: 2": "line 1: key 1 is not text",
}


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_yaml_that_is_refused(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"c\.yaml.*{YAML[text]}") as caught:
        read_yaml(path)
    assert len(str(caught.value).splitlines()) == 1


def test_aliases_that_are_few_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("a: &a {x: [1, 2]}\nb: {<<: *a, y: *a}\n", encoding="utf-8")
    assert read_yaml(tmp_path / "c.yaml")["b"] == {"x": [1, 2], "y": {"x": [1, 2]}}


def test_json_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "j.json").write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ValueError, match=r"j\.json: not JSON"):
        read_json(tmp_path / "j.json")
