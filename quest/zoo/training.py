"""What the training scripts of the zoo share: learning rate, averaging, checkpoints, progress.

Every random number of iteration i comes from a generator that is seeded with i, so a run that was stopped and resumed
gives the same result as one that ran through.
"""

import math
import time
from pathlib import Path

import torch

from quest.runtime.files import atomic
from quest.runtime.sums import check_archive


def generator(seed, iteration):
    """The generator of all random numbers of one iteration."""
    return torch.Generator().manual_seed(seed * 1_000_003 + iteration)


def cosine(iteration, total, warmup=100):
    """Factor of the learning rate: it rises over `warmup` iterations, then falls to zero along half a cosine."""
    return min(1.0, (iteration + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * iteration / total))


def constant_then_decay(iteration, total, warmup=200, decay=0.25):
    """Factor of the learning rate: it rises, stays at 1, and falls linearly to zero over the last `decay` of the run.

    As long as it is 1 it does not depend on `total`, so a run can be resumed with another total.
    """
    return min(1.0, (iteration + 1) / warmup, (total - iteration) / (decay * total))


def autocast(half):
    """A context in which products use bfloat16 if `half`; processors without bfloat16 are slow, but still correct."""
    return torch.autocast("cpu", torch.bfloat16, enabled=half)


def descend(loss, optimizer, rate, clip=True):
    """One update at the learning rate `rate`. clip: whether the norm of all gradients is limited to 1."""
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()


class Average:
    """Exponential moving average of parameters, faster at first: decay min(limit, (1 + i) / (10 + i))."""

    def __init__(self, parameters, limit):
        self.parameters, self.limit = list(parameters), limit
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, iteration):
        torch._foreach_lerp_(self.values, self.parameters, 1 - min(self.limit, (1 + iteration) / (10 + iteration)))

    @torch.no_grad()
    def swap(self):
        """Exchange parameters and averages; a second call undoes it."""
        for p, v in zip(self.parameters, self.values, strict=True):
            kept = p.clone()
            p.copy_(v)
            v.copy_(kept)


def save_checkpoint(path, iteration, modules, optimizer, average=None):
    """Write everything that a resumed run needs, all at once or not at all."""
    state = {"iteration": iteration, "modules": [m.state_dict() for m in modules], "optimizer": optimizer.state_dict()}
    if average:
        state["average"] = average.values
    with atomic(Path(path)) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path, modules, optimizer, average=None):
    """Load a checkpoint and return its iteration; 0 without a checkpoint. Raises ValueError if it is damaged."""
    if not Path(path).exists():
        return 0
    check_archive(path)
    state = torch.load(path, weights_only=True)
    for module, values in zip(modules, state["modules"], strict=True):
        module.load_state_dict(values)
    optimizer.load_state_dict(state["optimizer"])
    if average:
        average.values = state["average"]
    return state["iteration"]


class Progress:
    """One line per `every` iterations: iteration, mean of the reported numbers, seconds per iteration, time left."""

    def __init__(self, name, start, total, every):
        self.name, self.start, self.total, self.every = name, start, total, every
        self.began, self.sums = time.monotonic(), {}

    def __call__(self, iteration, **numbers):
        for key, value in numbers.items():
            self.sums[key] = self.sums.get(key, 0.0) + float(torch.as_tensor(value).detach())
        if iteration % self.every and iteration != self.total:
            return
        done = iteration - self.start
        pace = (time.monotonic() - self.began) / done
        count = min(done, iteration % self.every or self.every)
        means = "  ".join(f"{key} {value / count:.4f}" for key, value in self.sums.items())
        left = pace * (self.total - iteration) / 60
        print(f"{self.name} {iteration}/{self.total}  {means}  {pace:.2f} s/it  ETA {left:.1f} min", flush=True)
        self.sums = {}
