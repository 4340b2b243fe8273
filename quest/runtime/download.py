"""Fetching large files once: resumed where a transfer broke off, with progress, checked by SHA-256. No torch."""

import hashlib
import http.client
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

CHUNK = 1 << 20
ATTEMPTS = 5  # connections without a single new byte before a transfer is given up
TIMEOUT = 60  # seconds without an answer


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def checked(path: str | os.PathLike, sha256: str | None = None, hint: str = "") -> Path:
    """`path`, if there is a file whose SHA-256 starts with `sha256` (None: any file; file names carry 8 digits of it).

    Raises FileNotFoundError without the file, ValueError with another hash; `hint` is added: what to put there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError("; ".join(filter(None, [f"{path}: no such file", hint])))
    if sha256 is not None and not (found := sha256_of(path)).startswith(sha256):
        told = f"{path} ({path.stat().st_size} bytes): SHA-256 is {found}, expected {sha256}; truncated or another file"
        raise ValueError("; ".join(filter(None, [told, hint])))
    return path


def fetch(url: str, path: str | os.PathLike, sha256: str | None = None) -> Path:
    """`path`, fetched from `url` unless it is there already, and checked either way.

    What arrives is kept in `<path>.part` until it is complete, so that a second call goes on where the first was cut
    off. A connection that breaks is taken up again by itself. `sha256` may be a beginning of the hash, as file names
    have it; where it is None the computed one is printed, to be written down.

    Raises:
        ValueError: the file has another hash. One that was there already is left alone, a fetched one is removed.
        OSError: the transfer failed; the message says where to put a copy that was fetched elsewhere.
    """
    path = Path(path)
    if path.exists():
        return checked(path, sha256, f"remove it to fetch it again from {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    found = sha256_of(part) if sha256 and part.exists() else ""
    if not (found and found.startswith(sha256)):  # else a transfer that ended just before the file got its name
        _transfer(url, part, path, sha256)
        found = sha256_of(part)
    if sha256 is None:
        print(f"{path}: SHA-256 {found}", file=sys.stderr)
    elif not found.startswith(sha256):
        part.unlink()
        raise ValueError(f"{url}: SHA-256 is {found}, expected {sha256}; what was fetched is removed")
    os.replace(part, path)
    return path


def _transfer(url, part, path, sha256):
    """Append to `part` until it is as long as the server says the file is."""
    failures, before = 0, None
    while True:
        have = part.stat().st_size if part.exists() else 0
        failures = failures + 1 if have == before else 0
        before = have
        try:
            if _read_on(url, part, have, path.name):
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # "bytes */1000": there is nothing behind what is there
                if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                    return
                part.unlink()  # longer than the file: what is there belongs to something else
            reason = f"HTTP status {error.code} {error.reason}"
            if error.code in (401, 403, 404, 410):
                failures = ATTEMPTS
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if failures >= ATTEMPTS:
            check = f" (SHA-256 {sha256})" if sha256 else ""
            kept = f"; {part} is kept, and a second try goes on from there" if part.exists() else ""
            raise OSError(f"{url}: {reason}; fetch it elsewhere and put it at {path}{check}{kept}")
        time.sleep(min(2**failures, 10) if failures else 0)


def _read_on(url, part, have, name) -> bool:
    """One connection. True where the file is complete afterwards."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        resumed = answer.status == 206
        length = answer.headers.get("Content-Length")
        if resumed:
            # "bytes 500-999/1000"; a server may send another range than the one asked for.
            given, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if given.partition("-")[0] != str(have):
                raise OSError(f"asked for bytes from {have}, the server sends {given or 'an unnamed range'}")
            total = int(total) if total.isdigit() else have + int(length)
        else:
            have, total = 0, None if length is None else int(length)
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(total=total, initial=have, desc=name, unit="B", unit_scale=True) as bar,
        ):
            while block := answer.read(CHUNK):
                file.write(block)
                have += len(block)
                bar.update(len(block))
    return total is None or have >= total
