"""Writing files and folders so that a killed job never leaves half of one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it becomes `path` when the block ends without an error.

    The temporary file lies in the same folder, so that the rename is atomic, and keeps the suffix, since numpy, pandas
    and PIL choose their format by it. On an error it is removed and what stood at `path` before stays. A process killed
    outright may leave the temporary file (its name starts with a dot), but never a partial `path`.
    Raises OSError naming `path` where it could not be written: the disk is full, or a quota.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with _naming(path):
            yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        with _naming(path):
            yield temporary
        temporary.chmod(0o755)  # mkdtemp makes folders only their owner can read
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file it was where a write fails: the system's error, which tells why, knows it by number only."""
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
    """Replace what stands between two markers of a text file. Raises ValueError unless each is there once, in order."""
    whole = Path(path).read_text(encoding="utf-8")
    if whole.count(begin) != 1 or whole.count(end) != 1 or whole.index(begin) > whole.index(end):
        raise ValueError(f"{path}: needs {begin} and {end}, once each and in this order")
    before, after = whole.split(begin)[0], whole.split(end)[1]
    with atomic(path) as file:
        file.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
