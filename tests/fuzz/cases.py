"""What fuzz tests do to a content, to tensors and to bytes, and what an error must say."""

import contextlib
import copy
import json
import random
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

HOSTILE = json.loads(
    r"[null, true, false, 0, -1, 1, 4.0, 0.5, -0.0, NaN, Infinity, -Infinity, 1e308, 4294967296, 100000000000000000000,"
    r'"", " ", "4", "nan", "\u0000", "\u2028", "\ud7ff", "../..", "a\nb", [], {}, [[]], [null], {"": null}, [NaN],'
    r'{"method": 4}, ["quest"], {"bits": 4}]'
) + ["x" * 5000]
TENSORS = (
    lambda x: x[None],
    lambda x: x.flatten(),
    lambda x: x.flatten()[:1],
    lambda x: x.flatten()[:0],
    lambda x: x.double(),
    lambda x: x.half(),
    lambda x: x.to(torch.int8),
    lambda x: x * 0,
    lambda x: x - 2,
    lambda x: x * 1e38,
    lambda x: x + 0.5,
    lambda x: x.where(torch.rand(x.shape) < 0.9, torch.nan if x.is_floating_point() else 127),
)


def _place(draw: random.Random, content) -> tuple:
    """(container, key) somewhere inside of dictionaries and lists."""
    key = draw.choice(list(content)) if isinstance(content, dict) else draw.randrange(len(content))
    inside = content[key]
    deeper = isinstance(inside, dict | list) and inside and draw.random() < 0.8
    return _place(draw, inside) if deeper else (content, key)


def mutated(draw: random.Random, content):
    """A copy in which one to three values have another type, range or place, are missing, or are there twice."""
    content = copy.deepcopy(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not isinstance(content, dict | list) or not content:
            return content
        container, key = _place(draw, content)
        old, kind = container[key], draw.randrange(7)
        if isinstance(old, Tensor) and kind > 3:
            container[key] = draw.choice(TENSORS)(old)
        elif kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = copy.deepcopy(draw.choice((content, container, *_place(draw, content))))
        elif kind == 2 and isinstance(container, dict):
            container[draw.choice(("", "method", "of", "\u2028", "x y", str(key).upper(), f"{key}@1"))] = copy.deepcopy(
                old
            )
        elif kind == 2:
            container.insert(key, copy.deepcopy(old))
        elif kind == 3 and type(old) in (int, float):
            container[key] = draw.choice((-old, old + 1, old - 1, old * 10**6, float(old), str(old), old / 3))
        elif kind == 3 and isinstance(old, str) and old:
            place = draw.randrange(len(old))
            container[key] = old[:place] + draw.choice(("", " ", "A", "9", "/", "\n", "\u2028", "é")) + old[place + 1 :]
        else:
            container[key] = copy.deepcopy(draw.choice(HOSTILE))
    return content


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Bytes of which some are flipped, lost, inserted or replaced, more often near the beginning."""
    content = bytearray(content or b" ")
    at = draw.choice((draw.randrange(len(content)), draw.randrange(min(len(content), 2000))))
    kind, length = draw.randrange(5), draw.choice((1, 8, 64, 300, len(content)))
    if kind <= 1:
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del content[at : at + length]
    elif kind == 3:
        content[at:at] = draw.choice((content[:length], bytes(8), draw.randbytes(20)))
    else:
        content[at : at + 64] = draw.choice((bytes(64), draw.randbytes(64), b"\xff" * 64))
    return bytes(content)


def contents(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The header and the tensors of a checkpoint, or of another of our files."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("quest", "{}")), {k: file.get_tensor(k) for k in file.keys()}


def forged(draw: random.Random, header: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Another header, other tensors, or both."""
    kind = draw.randrange(3)
    if kind != 0:
        header = mutated(draw, header)
    if kind != 1:
        found = mutated(draw, tensors).items()
        tensors = {name: value.contiguous() for name, value in found if isinstance(value, Tensor)}
    return header, tensors


@contextlib.contextmanager
def refusals(path: Path, *names: str):
    """Passes over a ValueError of one line that names the file, or what is called by one of the names."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        if not any(name in said for name in (path.name, *names)) or len(said.splitlines()) > 1 or len(said) > 2000:
            raise
