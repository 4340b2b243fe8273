"""`python -m quest.runtime.sums FOLDER ...` writes SHA256SUMS of model folders, which loading compares.

The format is that of `sha256sum`, which checks a folder as well: `cd FOLDER && sha256sum --check SHA256SUMS`. No torch.
"""

import argparse
import zipfile
from pathlib import Path

from quest.runtime.download import sha256_of
from quest.runtime.files import atomic, read_lines, write_lines

NAME = "SHA256SUMS"
LEFT_OUT = (NAME, "README.md")


def write_sums(folder: str | Path) -> None:
    """Write the SHA-256 of every file of a folder, but for its README, into its SHA256SUMS."""
    folder = Path(folder)
    files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    with atomic(folder / NAME) as temporary:
        kept = [file for file in files if file not in LEFT_OUT and not file.startswith(".")]
        write_lines(temporary, [f"{sha256_of(folder / file)}  {file}" for file in kept])


def check_sums(folder: str | Path) -> None:
    """Raise ValueError, naming the file, where one is not what SHA256SUMS says. A folder without it is taken as it is.

    Tens of milliseconds for a shipped model, seconds for one of gigabytes.
    """
    folder = Path(folder)
    if not (folder / NAME).is_file():
        return
    for line in read_lines(folder / NAME):
        expected, _, name = line.partition("  ")
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file}: missing, but {folder / NAME} names it")
        if (found := sha256_of(file)) != expected:
            raise ValueError(f"{file}: SHA-256 is {found}, {folder / NAME} says {expected}: the file has changed")


def check_archive(path: str | Path) -> None:
    """Raise ValueError where a zip archive, as torch writes its files, has bytes that do not fit their checksum.

    torch does not look at the checksums. A file that is no archive has none, and passes.
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
