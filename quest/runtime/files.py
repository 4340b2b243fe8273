"""Read and write files: in UTF-8 in every locale, as JSON that every parser accepts, and never half a file."""

import csv
import io
import json
import math
import os
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LINE = 1000  # longest message of `one_line`, in characters
LARGE = 2**20  # bytes from which an array lies in its file, or in a temporary one
NUMBERS = ("value", "low", "high", "deviation")  # under these keys, and in lists, null stands for NaN


def one_line(message: object) -> str:
    """Shorten a message to one line of about LINE characters, with unprintable characters escaped."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
    return line if len(line) <= LINE else f"{line[: LINE // 2]} ... {line[-LINE // 2 :]}"


def dumps(content, **settings) -> str:
    """Format `content` as JSON. NaN and infinity do not exist there; they become null, which `loads` reads as NaN."""
    return json.dumps(_without_nan(content), allow_nan=False, **settings)


def _without_nan(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, list | tuple) else value


def loads(text: str, name: str | os.PathLike):
    """Parse what `dumps` wrote. Raises ValueError that names the file if the text is not JSON (a bare NaN is not)."""

    def number(digits):  # json calls this for floats, and for NaN and Infinity, which standard JSON forbids
        if not math.isfinite(float(digits)):
            raise ValueError(f"it contains {digits}, which is not a JSON number")
        return float(digits)

    try:
        return _with_nan(json.loads(text, parse_constant=number, parse_float=number))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON: {one_line(error)}") from None


def _with_nan(value, key=None):
    if value is None and key in NUMBERS:
        return math.nan
    if isinstance(value, dict):
        return {name: _with_nan(one, name) for name, one in value.items()}
    return [_with_nan(one, NUMBERS[0]) for one in value] if isinstance(value, list) else value


def read_text(path: str | os.PathLike) -> str:
    """The text of a file with unchanged line ends. Raises ValueError that names the file if it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")  # "-sig" skips the byte order mark that some editors write
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from None


def read_json(path: str | os.PathLike):
    """The content of a JSON file; see `loads`."""
    return loads(read_text(path), path)


def read_lines(path: str | os.PathLike) -> list[str]:
    """The lines of a file. Only a line feed ends a line, because captions may contain other Unicode line ends."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def write_lines(path: str | os.PathLike, lines: Sequence[str]) -> None:
    """Write lines for `read_lines`. Raises ValueError if a line contains a line feed."""
    if any("\n" in line for line in lines):
        raise ValueError(f"{path}: a line holds a line feed and would be read as two lines")
    Path(path).write_bytes("".join(f"{line}\n" for line in lines).encode("utf-8"))


def read_rows(path: str | os.PathLike, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with exactly these columns; all values are strings.

    Raises ValueError that names file and line for other columns, or for a row with more or fewer values.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    rows: list[dict[str, str]] = []
    try:
        if (header := next(reader, [])) != list(columns):
            raise ValueError(f"{path}: columns are {one_line(', '.join(header))}; needed: {', '.join(columns)}")
        for row in reader:
            if len(row) not in (0, len(columns)):
                raise ValueError(f"{path}, line {reader.line_num}: {len(row)} values for {len(columns)} columns")
            rows += [dict(zip(columns, row, strict=True))] if row else []
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def write_rows(path: str | os.PathLike, rows: Iterable[dict], columns: Iterable[str]) -> None:
    """Write rows as a CSV file, all at once or not at all."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def array_names(path: str | os.PathLike) -> list[str]:
    """Names of the arrays in an .npz file. Raises ValueError that names any other file."""
    return _npz(path, lambda file: list(file.files))


def read_arrays(path: str | os.PathLike, names: Iterable[str] | None = None) -> dict:
    """All arrays of an .npz file, or those of `names` that it has. Raises ValueError that names any other file.

    Large arrays lie in the file, or in a temporary copy, which the system maps into memory, so that its pages can be
    dropped. The file may be replaced meanwhile, but not written.
    """
    return _npz(path, lambda file: {n: _array(file, n, path) for n in file.files if names is None or n in names})


def _array(file, name: str, path: str | os.PathLike):
    """An array of an open .npz file, in the file where it is large and not compressed."""
    import numpy as np
    from numpy.lib import format as npy

    info = next(info for info in file.zip.infolist() if info.filename in (name, f"{name}.npy"))
    if info.file_size < LARGE or info.compress_type != zipfile.ZIP_STORED:
        return file[name]
    with file.zip.open(info) as stream:
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(stream))
        if read_header is None:  # names of fields that are not Latin 1 have version 3.0
            return file[name]
        shape, fortran, dtype = read_header(stream)
        start = stream.tell()
        while stream.read(LARGE):  # raises where the content has another checksum
            pass
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != info.file_size - start:
        return file[name]  # numpy says what is wrong
    order = "F" if fortran else "C"
    with open(path, "rb") as whole:
        whole.seek(info.header_offset + 26)
        place = info.header_offset + 30 + sum(struct.unpack("<HH", whole.read(4)))  # past the name and what follows it
    if (place + start) % dtype.alignment == 0:
        return np.asarray(np.memmap(path, dtype, "c", place + start, shape, order))
    # numpy adds up an array that is not aligned in other parts, so sums would have other last bits: it gets a copy.
    try:
        with file.zip.open(info) as stream, scratch(info.file_size) as copy:
            shutil.copyfileobj(stream, copy, LARGE)
            return np.asarray(np.memmap(copy, dtype, "c", start, shape, order))
    except OSError:  # no room for temporary files
        return file[name]


@contextmanager
def scratch(size: int) -> Iterator:
    """Open a file of so many bytes that has no name, so that it is gone with what is mapped from it.

    Raises OSError where there is no room for it, now and not by a signal when it is written. It names the folder.
    """
    with tempfile.TemporaryFile() as file:
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, max(1, size))
            else:  # macOS lacks it
                file.truncate(max(1, size))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{tempfile.gettempdir()}: no room for {size / 1e6:.0f} MB of temporary arrays ({error.strerror}); set "
                "TMPDIR to a folder on a disk that has it (a RAM disk takes memory)",
            ) from None
        yield file


def merged(parts: Sequence, order: Sequence[int]):
    """np.concatenate(parts)[order] for a permutation `order`; a large result lies in a temporary file."""
    import numpy as np

    shape, dtype = (len(order), *parts[0].shape[1:]), np.result_type(*parts)
    if (size := math.prod(shape) * dtype.itemsize) < LARGE:
        return np.concatenate(parts)[order]
    with scratch(size) as file:
        result = np.asarray(np.memmap(file, dtype, "r+", shape=shape))
    places = np.split(np.argsort(order), np.cumsum([len(part) for part in parts])[:-1])
    for part, own in zip(parts, places, strict=True):
        result[own] = part
    return result


def _npz(path, read):
    """Call `read` with an open .npz file. A damaged file can raise almost any error, so all of them are converted."""
    import numpy as np

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path):  # numpy would also load other kinds of files
            pass
        with np.load(path, allow_pickle=False) as file:
            return read(file)
    except Exception as error:
        reason = "arrays larger than memory" if isinstance(error, MemoryError) else one_line(error)
        raise ValueError(f"{path}: not an .npz file of arrays, or corrupted: {reason}") from error


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends without an error.

    The temporary file lies in the same folder, so that the rename is atomic, and keeps the suffix, since numpy, pandas
    and PIL choose their format by it. After an error it is removed and the previous `path` stays. A killed process may
    leave the temporary file (its name starts with a dot), but never a partial `path`.
    Raises OSError that names `path` if it cannot be written, for example on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.urandom(8).hex()}{path.suffix}")
    temporary.touch(exist_ok=False)
    mode = stat.S_IMODE(temporary.stat().st_mode)  # an ordinary file's; to ask for the umask, one would have to set it
    try:
        with _naming(path):
            yield temporary
        temporary.chmod(mode)  # safetensors puts a file there that only its owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text in UTF-8, all at once or not at all, see `atomic`."""
    with atomic(path) as file:
        file.write_text(text, encoding="utf-8")


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends without an error.

    An existing folder at `path` is renamed aside, the new one is renamed to `path`, and then the old one is removed.
    A process killed between the two renames leaves no folder at `path`; `recovered` then restores the old one.
    """
    path = recovered(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    aside = _aside(path)
    try:
        with _naming(path):
            yield temporary
        temporary.chmod(0o755)  # mkdtemp creates folders that only their owner can read
        if path.exists():
            path.rename(aside)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recovered(path)


def recovered(path: str | os.PathLike) -> Path:
    """Repair an interrupted `atomic_folder`: restore the old folder, or delete it if a new one exists. Returns path."""
    path = Path(path)
    aside = _aside(path)
    if aside.exists():
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)
    return path


def _aside(path):
    return path.with_name(f".{path.name}.old")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add `path` to the error of a failed write, because the system's error knows the file by its number only."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"{path} was not written: {error.strerror or error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError" or "I/O error" not in str(error):
            raise
        raise OSError(f"{path} was not written: {str(error).partition('I/O error: ')[2]}") from error


def between(path: str | os.PathLike, begin: str, end: str, text: str) -> None:
    """Replace the text between two markers of a file. Raises ValueError unless each marker occurs once, in order."""
    whole = read_text(path)
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise ValueError(f"{path}: needs {begin} and {end}, once each and in this order")
    before, after = whole.split(begin)[0], whole.split(end)[1]
    write_text(path, f"{before}{begin}\n\n{text}\n\n{end}{after}")
