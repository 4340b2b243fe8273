"""`python -m quest.runtime.sums FOLDER ...` writes SHA256SUMS into model folders; loading a model compares them.

The format is that of `sha256sum`, so `cd FOLDER && sha256sum --check SHA256SUMS` checks a folder, too. No torch.
"""

import argparse
import zipfile
from pathlib import Path

from quest.runtime.download import sha256_of
from quest.runtime.files import atomic, read_lines, write_lines

NAME = "SHA256SUMS"
LEFT_OUT = (NAME, "README.md")


def write_sums(folder: str | Path) -> None:
    """Write the SHA-256 of every file of a folder, except its README, into its SHA256SUMS."""
    folder = Path(folder)
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    with atomic(folder / NAME) as temporary:
        kept = [file for file in files if file not in LEFT_OUT and not file.startswith(".")]
        write_lines(temporary, [f"{sha256_of(folder / file)}  {file}" for file in kept])


def check_sums(folder: str | Path) -> None:
    """Raise ValueError that names a file whose hash differs from SHA256SUMS. A folder without SHA256SUMS passes.

    This takes tens of milliseconds for a shipped model, and seconds for a model of several gigabytes.
    """
    folder = Path(folder)
    if not (folder / NAME).is_file():
        return
    for line in read_lines(folder / NAME):
        expected, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing, but {folder / NAME} names it")
        if (actual := sha256_of(file)) != expected:
            raise ValueError(f"{file}: SHA-256 is {actual}, {folder / NAME} says {expected}: the file has changed")


def check_archive(path: str | Path) -> None:
    """Raise ValueError if a zip archive, such as a file of torch.save, contains bytes that contradict their checksum.

    torch itself ignores the checksums. A file that is no archive has none, and passes.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{path}: a damaged archive: {error}") from None
    if damaged:
        raise ValueError(f"{path}: damaged: the checksum of {damaged} in it does not fit its bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="folders of models, each with its weights")
    for folder in parser.parse_args().folders:
        write_sums(folder)


if __name__ == "__main__":
    main()
