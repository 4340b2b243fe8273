"""Download a large file once, resume a broken transfer, show progress and check the SHA-256. Imports no torch."""

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
ATTEMPTS = 5  # connections in a row that bring no byte further than before, after which a transfer fails
TIMEOUT = 60  # seconds to wait for an answer


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked(path: str | os.PathLike, sha256: str | None = None, hint: str = "") -> Path:
    """Return `path` if it is a file whose SHA-256 starts with `sha256` (None accepts any file).

    Raises FileNotFoundError if the file is missing, and ValueError if its hash differs. `hint` ends the message.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError("; ".join(filter(None, [f"{path}: no such file", hint])))
    if sha256 is not None and not (actual := sha256_of(path)).startswith(sha256):
        size = path.stat().st_size
        text = f"{path} ({size} bytes): SHA-256 is {actual}, expected {sha256}; truncated or another file"
        raise ValueError("; ".join(filter(None, [text, hint])))
    return path


def fetch(url: str, path: str | os.PathLike, sha256: str | None = None) -> Path:
    """Download `url` to `path` unless that file exists, check its hash in both cases, and return `path`.

    Received bytes stay in `<path>.part` until the file is complete, so a second call continues where the first one
    stopped. A broken connection is retried. `sha256` may be only the beginning of the hash, as file names carry it; if
    it is None, the computed hash is printed so that it can be recorded.

    Raises:
        ValueError: the file has another hash. A file that existed before is kept; a downloaded one is removed.
        OSError: the transfer failed; the message says where to put a copy that was downloaded elsewhere.
    """
    path = Path(path)
    if path.exists():
        return checked(path, sha256, f"remove it to fetch it again from {url}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    actual = sha256_of(part) if sha256 and part.exists() else ""
    if not (actual and actual.startswith(sha256)):  # if equal, an earlier call stopped just before the rename
        _transfer(url, part, path, sha256)
        actual = sha256_of(part)
    if sha256 is None:
        print(f"{path}: SHA-256 {actual}", file=sys.stderr)
    elif not actual.startswith(sha256):
        part.unlink()
        raise ValueError(f"{url}: SHA-256 is {actual}, expected {sha256}; the downloaded file was removed")
    os.replace(part, path)
    return path


def _transfer(url, part, path, sha256):
    """Append to `part` until it has the length that the server states; raise OSError after ATTEMPTS failures."""
    failures, most = 0, -1
    while True:
        have = part.stat().st_size if part.exists() else 0
        failures, most = (0, have) if have > most else (failures + 1, most)
        try:
            if _read_on(url, part, have, path.name):
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            if error.code == 416 and have:  # "bytes */1000": the file has 1000 bytes and none after those we have
                if error.headers.get("Content-Range", "").rpartition("/")[2] == str(have):
                    return
                part.unlink()  # it is longer than the file, so it belongs to another file
            reason = f"HTTP status {error.code} {error.reason}"
            if error.code in (401, 403, 404, 410):
                failures = ATTEMPTS
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        if failures >= ATTEMPTS:
            check = f" (SHA-256 {sha256})" if sha256 else ""
            kept = f"; {part} is kept, and a second try continues from it" if part.exists() else ""
            raise OSError(f"{url}: {reason}; fetch it elsewhere and put it at {path}{check}{kept}")
        time.sleep(min(2**failures, 10) if failures else 0)


def _read_on(url, part, have, name) -> bool:
    """Append to `part` what one connection delivers. Returns True if the file is complete afterwards."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        resumed = answer.status == 206
        length = answer.headers.get("Content-Length")
        if resumed:
            # "bytes 500-999/1000"; a server may send another range than the one asked for.
            bounds, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if bounds.partition("-")[0] != str(have):
                raise OSError(f"asked for bytes from {have}, the server sends {bounds or 'an unnamed range'}")
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
