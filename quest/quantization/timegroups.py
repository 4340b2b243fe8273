"""Time groups: stretches of the diffusion trajectory, each with its own activation ranges (the "time" in TAQuant).

Activation ranges change a lot between noisy and clean timesteps. With time groups, a quantizer has a scale for each
stretch of timesteps. A forward pass looks up the group of its timestep once, and all quantizers then use that group:

    denoiser(x, timestep=120) ── TimeGroups.enter(120) ── group 1 ── every Quantizer returns scale[1], zero_point[1]
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, nn


class _Pass:
    """The forward pass that one thread is computing."""

    current: Tensor | None = None  # its group; None outside of a forward pass
    number: int | None = None  # the group as a plain number, once somebody has asked for it
    outer: tuple | None = None  # current and outer of the surrounding forward pass, if a hook of it made this call


class _Passes(threading.local):
    """The passes of all threads, because threads may share a denoiser.

    `torch.compile` can write to attributes of a `_Pass`, but not to those of a thread-local object.
    """

    def __init__(self):
        self.mine = _Pass()


class TimeGroups:
    """Maps a timestep to its group, and stores for each thread the group of its current forward pass.

        timestep   951 ......... 502 | 501 ......... 52 | 51 ......... 0
        group      0                 | 1                | 2                   TimeGroups([951, 501, 51])

    A group reaches from its start, which is its noisiest timestep, down to just above the start of the next group. The
    last group ends at 0. A group contains every timestep in between, so the number of sampling steps may change.

    A quantized denoiser has one TimeGroups object, which its quantizers share. It is not an nn.Module, because it has
    nothing to train and does not belong into a state dict.
    """

    def __init__(self, starts: list[int | float]):
        """starts: the noisiest timestep of each group, in any order; floats too, as some samplers visit fractions.

        Raises ValueError for no starts and for equal ones.
        """
        if not starts or len(set(starts)) != len(starts):
            raise ValueError(f"time groups need distinct starts, got {list(starts)}")
        dtype = torch.long if all(start == int(start) for start in starts) else torch.float64
        self.starts = torch.tensor(sorted(starts, reverse=True), dtype=dtype, device="cpu")
        self._passes = _Passes()
        self.position: int | None = None  # index of `timestep` among the arguments of the denoiser
        self._on_gpu: Tensor | None = None  # the starts on the GPU of the timesteps

    def __len__(self) -> int:
        return len(self.starts)

    def __getstate__(self) -> dict:
        """Leave out the passes: a copy is in no forward pass."""
        return {k: v for k, v in vars(self).items() if k != "_passes"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _passes=_Passes())

    @property
    def current(self) -> Tensor:
        """The group of the current forward pass, [1].

        It has one dimension, so that indexing with it is a gather. An index without dimensions would be read by the
        host, and torch.compile would compile again for each group. Raises RuntimeError outside of a forward pass.
        """
        current = self._passes.mine.current
        if current is None:
            raise RuntimeError("time groups: no forward pass is in progress; call the denoiser, not a part of it")
        return current

    @property
    def number(self) -> int:
        """The current group as a plain number. This waits for the device once per forward pass."""
        mine = self._passes.mine
        if mine.number is None:
            mine.number = int(self.current)
        return mine.number

    def index(self, timestep: Tensor | float) -> Tensor:
        """Return the group of each timestep, [N]; -1 for a timestep above the first start."""
        t = _tensor(timestep).reshape(-1, 1)
        starts = self._starts_on(t.device) if t.is_cuda and type(t) is Tensor else self.starts.to(t.device)
        return (starts >= t).sum(1) - 1

    def rows(self, timestep: Tensor) -> list[Tensor]:
        """Return the indices of the rows in each group for the timesteps of N rows, on the CPU.

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
        """Copy the starts to the GPU once. A copy in each pass would wait for the device and break CUDA graphs."""
        if self._on_gpu is None or self._on_gpu.device != gpu:
            self._on_gpu = self.starts.to(gpu)
        return self._on_gpu

    def enter(self, timestep: Tensor | float) -> None:
        """Make the group of this timestep the current one of this thread, until the denoiser's call ends.

        Raises ValueError for a timestep above the calibrated range and for two groups in one batch. On a GPU these are
        asynchronous assertions, so that sampling never waits for the device.
        """
        group = self.index(timestep)
        if not len(group):  # the batch has no rows, so any group will do
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
        """Inside this context, parts of a denoiser can be called as in a forward pass at this timestep."""
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
        """Read the `timestep` argument of every forward pass of the denoiser by hooks; samplers need no change."""
        self.position = list(signature(denoiser.forward).parameters).index("timestep")
        # Hooks are bound methods and not closures, so that a deep copy of the denoiser gets hooks of its own copy.
        denoiser.register_forward_pre_hook(self._enter_from_call, with_kwargs=True)
        # This hook also runs after an error, so that no later call uses this group.
        denoiser.register_forward_hook(self._leave_after_call, always_call=True)
        denoiser.time_groups = self

    def _enter_from_call(self, _denoiser, args, kwargs) -> None:
        self._begin(kwargs["timestep"] if "timestep" in kwargs else args[self.position])

    def _leave_after_call(self, _denoiser, _args, _output) -> None:
        self._end()


def _tensor(timestep: Tensor | float) -> Tensor:
    """Return a timestep as a tensor, floats in float64, because torch's default dtype may round them."""
    if isinstance(timestep, Tensor):
        return timestep
    return torch.tensor(timestep, dtype=torch.float64 if isinstance(timestep, float) else None, device="cpu")


def grouped(timesteps: list[int | float], groups: int) -> list[int | float]:
    """Return the starts of `groups` stretches of a sampler's timesteps with equally many timesteps each.

    For example, [901, 601, 301, 1] in two groups gives [901, 301]. Raises ValueError if the number of groups does not
    divide the number of different timesteps.
    """
    distinct = sorted(set(timesteps), reverse=True)
    if groups < 1 or len(distinct) % groups:
        divisors = [d for d in range(1, len(distinct) + 1) if len(distinct) % d == 0]
        raise ValueError(f"time_groups: {groups} does not divide the {len(distinct)} timesteps; valid: {divisors}")
    return distinct[:: len(distinct) // groups]
