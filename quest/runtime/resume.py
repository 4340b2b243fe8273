"""Long jobs that were killed go on where they were: each part's result is kept on disk until the whole is done.

Quantizing a large denoiser takes hours, unit by unit and stage by stage. Inside `resuming`, `part` keeps what each of
them learned; a later run of the same job takes it from there, bit for bit, and computes the rest. Outside it nothing is
kept.
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
from quest.runtime.files import atomic, dumps, loads, read_text
from quest.runtime.hashing import opened, tensor_hash

IDENTITY = "identity.json"


@dataclass
class Parts:
    """The folder of a job's parts, and how many seconds those took that were found there."""

    folder: Path
    identity: str  # hash of all that they depend on
    seconds: float = 0.0


_parts: ContextVar[Parts | None] = ContextVar("parts", default=None)


@contextmanager
def resuming(folder: Path, identity: dict) -> Iterator[Parts]:
    """While inside, every `part` is kept in `folder`, or found there; the folder goes when the block ends well.

    identity: all that the parts depend on, fit for JSON. Parts of another identity are thrown away, and it is said.
    """
    wanted = json.dumps(identity, sort_keys=True, indent=1)
    record = folder / IDENTITY
    if folder.exists():
        try:
            found = json.loads(read_text(record)) if record.exists() else {}
        except ValueError:
            found = {"readable record": False}
        other = sorted(k for k in {*found, *identity} if found.get(k) != json.loads(wanted).get(k))
        if other:
            print(f"{folder}: parts of a job with another {', '.join(other)}; thrown away", flush=True)
            shutil.rmtree(folder)
        else:
            print(f"{folder}: going on after {len(list(folder.glob('*.safetensors')))} parts", flush=True)
    if not folder.exists():
        with atomic(record) as temporary:
            temporary.write_text(wanted, encoding="utf-8")
    parts = Parts(folder, hashlib.sha256(wanted.encode()).hexdigest())
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
    """compute(), or what it left behind in an earlier run of this job. Returns its numbers.

    state: the tensors that it changes, in the end in place: they are filled with what was kept. generator: what it
    draws from, left as compute() left it. Values that are not finite are not kept. Raises ValueError for a kept part
    that cannot be read, is of another job, or is not what was written.
    """
    parts = _parts.get()
    if parts is None:
        return tuple(compute() or ())
    file = parts.folder / f"{name}.safetensors"
    if file.exists():
        try:
            kept = _kept(file, parts.identity, state() | {"generator": generator.get_state()})
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
    own = {
        "numbers": torch.tensor(numbers, dtype=torch.float64),
        "seconds": torch.tensor(time.perf_counter() - start, dtype=torch.float64),
        "generator": generator.get_state(),
    }
    own |= {k: v.detach().cpu().contiguous() for k, v in state().items()}
    if all(value.isfinite().all() for value in own.values()):
        told = {"identity": parts.identity, "hashes": {key: tensor_hash(value) for key, value in own.items()}}
        with atomic(file) as temporary:
            save_file(own, temporary, {"quest": dumps(told)})
    return numbers


def _kept(file, identity, state):
    """The tensors of a part. Raises ValueError, naming the file, unless they are those that this job wrote."""
    with opened(file) as found:
        told = loads((found.metadata() or {}).get("quest", "{}"), file)
        kept = {key: found.get_tensor(key) for key in found.keys()}
    if not isinstance(told, dict) or told.get("identity") != identity:
        raise ValueError(f"{file} is a part of another job")
    hashes = told.get("hashes")
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
    """SHA-256 over those of some files, in the order of their names."""
    return hashlib.sha256("".join(map(sha256_of, sorted(files))).encode()).hexdigest()
