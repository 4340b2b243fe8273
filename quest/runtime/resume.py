"""Continue a long job that was killed: the result of each finished part stays on disk until the whole job is done.

Quantizing a large denoiser takes hours, unit by unit and stage by stage. Inside `resuming`, `part` stores what each
unit or stage learned; a later run of the same job loads it, bit for bit. Outside `resuming`, `part` only computes.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from quest.runtime.download import sha256_of
from quest.runtime.files import atomic, dumps, loads, read_text, write_text
from quest.runtime.hashing import opened, tensor_hash

IDENTITY = "identity.json"


@dataclass
class Parts:
    """The folder with the stored parts of a job, and the seconds that the loaded ones took when they were computed."""

    folder: Path
    identity: str  # hash of everything that the parts depend on
    seconds: float = 0.0


_parts: ContextVar[Parts | None] = ContextVar("parts", default=None)


@contextmanager
def resuming(folder: Path, identity: dict) -> Iterator[Parts]:
    """Inside this context `part` stores results in `folder` or loads them; without an error the folder is then deleted.

    identity: everything the parts depend on, ready for JSON. Parts of another identity are deleted with a message.
    """
    text = json.dumps(identity, sort_keys=True, indent=1)
    record = folder / IDENTITY
    if folder.exists():
        try:
            stored = json.loads(read_text(record)) if record.exists() else {}
        except (ValueError, RecursionError):
            stored = None
        stored = stored if isinstance(stored, dict) else {"readable record": False}
        changed = sorted(k for k in {*stored, *identity} if stored.get(k) != json.loads(text).get(k))
        if changed:
            print(f"{folder}: parts of a job with another {', '.join(changed)}; thrown away", flush=True)
            shutil.rmtree(folder)
        else:
            print(f"{folder}: going on after {len(list(folder.glob('*.safetensors')))} parts", flush=True)
    if not folder.exists():
        write_text(record, text)
    parts = Parts(folder, hashlib.sha256(text.encode()).hexdigest())
    token = _parts.set(parts)
    try:
        yield parts
    finally:
        _parts.reset(token)
    shutil.rmtree(folder)


def part(
    name: str,
    state: Callable[[], dict[str, Tensor]],
    compute: Callable[[], Sequence[float] | None],
    generator: torch.Generator,
) -> tuple[float, ...]:
    """Run compute(), or load its result if an earlier run of this job stored it. Returns compute()'s numbers.

    state: gives the tensors that compute() changes; loading fills them in place. generator: the source of compute()'s
    random numbers; loading restores its state. Values that are not finite are not stored. Raises ValueError for a
    stored part that cannot be read, belongs to another job, or has changed.
    """
    parts = _parts.get()
    if parts is None:
        return tuple(compute() or ())
    file = parts.folder / f"{name}.safetensors"
    if file.exists():
        try:
            kept = _read(file, parts.identity, state() | {"generator": generator.get_state()})
        except ValueError as error:
            raise ValueError(f"{error}; remove it to compute that part again") from None
        numbers, seconds = kept.pop("numbers"), kept.pop("seconds")
        generator.set_state(kept.pop("generator"))
        with torch.no_grad():
            for key, tensor in state().items():
                tensor.copy_(kept[key])
        parts.seconds += seconds.item()
        return tuple(numbers.tolist())
    start = time.perf_counter()
    numbers = tuple(compute() or ())
    record = {
        "numbers": torch.tensor(numbers, dtype=torch.float64),
        "seconds": torch.tensor(time.perf_counter() - start, dtype=torch.float64),
        "generator": generator.get_state(),
    }
    record |= {k: v.detach().cpu().contiguous() for k, v in state().items()}
    if all(value.isfinite().all() for value in record.values()):
        header = {"identity": parts.identity, "hashes": {key: tensor_hash(value) for key, value in record.items()}}
        with atomic(file) as temporary:
            save_file(record, temporary, {"quest": dumps(header)})
    return numbers


def _read(file, identity, state):
    """Read the tensors of a part. Raises ValueError that names the file unless this job wrote exactly these."""
    with opened(file) as content:
        header = loads((content.metadata() or {}).get("quest", "{}"), file)
        kept = {key: content.get_tensor(key) for key in content.keys()}
    if not isinstance(header, dict) or header.get("identity") != identity:
        raise ValueError(f"{file} is a part of another job")
    hashes = header.get("hashes")
    if not isinstance(hashes, dict) or hashes.keys() != kept.keys() or not {"numbers", "seconds"} <= kept.keys():
        raise ValueError(f"{file} is corrupted: it lacks tensors, or their hashes")
    for key, value in kept.items():
        if tensor_hash(value) != hashes[key] or not value.isfinite().all():
            raise ValueError(f"{file} is corrupted: its tensor {key} is not what was written")
    for key, value in state.items():
        if key not in kept or (kept[key].shape, kept[key].dtype) != (value.shape, value.dtype):
            raise ValueError(f"{file}: its tensor {key} has another shape or type than this job's")
    return kept


def digest(*files: Path) -> str:
    """SHA-256 of the SHA-256 hashes of some files, in the order of their paths."""
    return hashlib.sha256("".join(map(sha256_of, sorted(files))).encode()).hexdigest()
