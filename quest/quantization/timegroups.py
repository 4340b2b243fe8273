"""Time groups: which stretch of the diffusion trajectory the denoiser is in (the time in TAQuant)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, nn


class _Pass:
    """The forward pass in progress in one thread."""

    current: Tensor | None = None  # its group; None outside of a forward pass
    number: int | None = None  # the same as a plain number, once it was asked for
    outer: tuple | None = None  # current and outer of the forward pass around this one, where a hook made this call


class _Passes(threading.local):
    """Threads may share a denoiser; each has a pass of its own. `torch.compile` can write to that, not to a local."""

    def __init__(self):
        self.mine = _Pass()


class TimeGroups:
    """Maps a timestep to its group and holds the group of the forward pass in progress, for every thread its own.

        timestep   951 ......... 502 | 501 ......... 52 | 51 ......... 0
        group      0                 | 1                | 2                   TimeGroups([951, 501, 51])

    A group is a stretch of timesteps: from its start (its noisiest step) down to just above the next group's start, the
    last one down to 0. It covers every timestep in between, whatever the number of sampling steps.

    A quantized denoiser owns one and shares it by reference with its time-aware quantizers. It is not an nn.Module: it
    has nothing to train and no place in a state dict.
    """

    def __init__(self, starts: list[int | float]):
        """starts: the noisiest timestep of every group, any order, no repetition; some samplers visit fractions."""
        if not starts or len(set(starts)) != len(starts):
            raise ValueError(f"time groups need distinct starts, got {list(starts)}")
        dtype = torch.long if all(start == int(start) for start in starts) else torch.float64
        self.starts = torch.tensor(sorted(starts, reverse=True), dtype=dtype, device="cpu")
        self._passes = _Passes()
        self.position: int | None = None  # of `timestep` among the arguments of the denoiser
        self._on_gpu: Tensor | None = None  # the starts, where the timesteps are

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict:
        """A copy is in no forward pass."""
        return {k: v for k, v in vars(self).items() if k != "_passes"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _passes=_Passes())

    @property
    def current(self) -> Tensor:
        """The group of the forward pass in progress, [1].

        1-D, so that indexing with it is a gather; a 0-d index would be read on the host and recompile per group.
        Raises RuntimeError outside of a forward pass.
        """
        current = self._passes.mine.current
        if current is None:
            raise RuntimeError("time groups: no forward pass is in progress; call the denoiser, not a part of it")
        return current

    @property
    def number(self) -> int:
        """The current group as a plain number; one wait for the device in each forward pass."""
        mine = self._passes.mine
        if mine.number is None:
            mine.number = int(self.current)
        return mine.number

    def index(self, timestep: Tensor | float) -> Tensor:
        """Group of each timestep, [N]; -1 for one above the first start."""
        t = _tensor(timestep).reshape(-1, 1)
        starts = self._starts_on(t.device) if t.is_cuda and type(t) is Tensor else self.starts.to(t.device)
        return (starts >= t).sum(1) - 1

    def rows(self, timestep: Tensor) -> list[Tensor]:
        """Of N rows, those of each group, on the CPU.

        Raises ValueError for a timestep above all groups, and for a group without a row.
        """
        group = self.index(timestep.cpu())
        if (group < 0).any():
            raise ValueError("the calibration set holds timesteps above the first time group")
        found = [(group == g).nonzero().flatten() for g in range(len(self))]
        for g, rows in enumerate(found):
            if not len(rows):
                raise ValueError(f"time_groups: no calibration row of time group {g} ({self.starts.tolist()})")
        return found

    def _starts_on(self, gpu: torch.device) -> Tensor:
        """Copied once: a copy for every forward pass would wait for the device, and no CUDA graph can hold it."""
        if self._on_gpu is None or self._on_gpu.device != gpu:
            self._on_gpu = self.starts.to(gpu)
        return self._on_gpu

    def enter(self, timestep: Tensor | float) -> None:
        """Make the group of this timestep current in this thread, until another is or a call of the denoiser ends.

        Raises ValueError for a timestep above the calibrated range and for two groups in one batch. On a GPU both are
        asynchronous asserts, so that sampling never waits for the device.
        """
        group = self.index(timestep)
        if not len(group):  # a batch without rows, of which nothing depends on the group
            group = group.new_zeros(1)
        if group.is_cuda:
            torch._assert_async((group >= 0).all() & (group == group[0]).all())
        elif (group < 0).any():
            high = _tensor(timestep).max().item()
            raise ValueError(f"timestep {high} is above the calibrated range 0..{self.starts[0].item()}")
        elif (group != group[0]).any():
            raise ValueError(
                f"one batch holds timesteps of {len(group.unique())} time groups; a forward pass has one "
                f"(calibrated range 0..{self.starts[0].item()}, group starts {self.starts.tolist()})"
            )
        mine = self._passes.mine
        mine.current, mine.number = group[:1], None

    @contextmanager
    def inside(self, timestep: Tensor | float) -> Iterator[None]:
        """As during a forward pass at this timestep: for those who call parts of a denoiser on their own."""
        self._begin(timestep)
        try:
            yield
        finally:
            self._end()

    def _begin(self, timestep: Tensor | float) -> None:
        mine = self._passes.mine
        mine.outer = mine.current, mine.outer
        self.enter(timestep)

    def _end(self) -> None:
        mine = self._passes.mine
        mine.current, mine.outer = mine.outer or (None, None)
        mine.number = None

    def check(self, timesteps: list[int]) -> None:
        """Raise ValueError if a sampler's timesteps leave the calibrated range."""
        if max(timesteps) > self.starts[0] or min(timesteps) < 0:
            raise ValueError(
                f"the sampler visits timesteps {max(timesteps)}..{min(timesteps)}, but the time groups were calibrated "
                f"for {self.starts[0].item()}..0: use the sampler and spacing of the calibration set"
            )

    def attach(self, denoiser: nn.Module) -> None:
        """Follow the `timestep` argument of every forward pass of the denoiser; no sampler is edited."""
        self.position = list(signature(denoiser.forward).parameters).index("timestep")
        # Bound methods, not closures: a deep copy of the denoiser then takes its own copy of this object along.
        denoiser.register_forward_pre_hook(self._enter_from_call, with_kwargs=True)
        # Also after an error, so that nothing computes with the group of a call that is over.
        denoiser.register_forward_hook(self._leave_after_call, always_call=True)
        denoiser.time_groups = self

    def _enter_from_call(self, _denoiser, args, kwargs) -> None:
        self._begin(kwargs["timestep"] if "timestep" in kwargs else args[self.position])

    def _leave_after_call(self, _denoiser, _args, _output) -> None:
        self._end()


def _tensor(timestep: Tensor | float) -> Tensor:
    """A number with all its digits, which torch's default dtype may not have."""
    if isinstance(timestep, Tensor):
        return timestep
    return torch.tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else None, device="cpu")


def grouped(timesteps: list[int | float], groups: int) -> list[int | float]:
    """Starts of `groups` equal stretches of a sampler's distinct timesteps.

    Raises ValueError where the number of groups does not divide the number of timesteps.
    """
    distinct = sorted(set(timesteps), reverse=True)
    if groups < 1 or len(distinct) % groups:
        divisors = [d for d in range(1, len(distinct) + 1) if len(distinct) % d == 0]
        raise ValueError(f"time_groups: {groups} does not divide the {len(distinct)} timesteps; valid: {divisors}")
    return distinct[:: len(distinct) // groups]
