"""The network of a diffusers pipeline that predicts the noise: its `unet` or, in newer pipelines, its `transformer`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle

NAMES = ("unet", "transformer")  # the components of a pipeline that can be its denoiser


def name_of(pipe) -> str:
    """The name of the component of a pipeline that is its denoiser. Raises ValueError for a pipeline without one."""
    for name in NAMES:
        if getattr(pipe, name, None) is not None:
            return name
    raise ValueError(f"a {type(pipe).__name__} has no unet and no transformer; valid: pipelines that have one of both")


def denoiser_of(pipe) -> nn.Module:
    """The denoiser of a pipeline. Raises ValueError for a pipeline without one."""
    return getattr(pipe, name_of(pipe))


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks of modules at the end of this context, also after an error. handles: of hooks just registered."""
    with ExitStack() as hooks:
        for handle in handles:
            hooks.enter_context(handle)
        yield


@contextmanager
def changed(things: Iterable, name: str, value) -> Iterator[None]:
    """Give an attribute of some modules or tensors another value inside this context."""
    before = [(thing, getattr(thing, name)) for thing in things]
    for thing, _ in before:
        setattr(thing, name, value)
    try:
        yield
    finally:
        for thing, old in before:
            setattr(thing, name, old)


@contextmanager
def overridden(name: str, methods: dict) -> Iterator[None]:
    """Let objects have methods of their own in place of their class's inside this context. methods: by object."""
    for thing, method in methods.items():
        setattr(thing, name, method)
    try:
        yield
    finally:
        for thing in methods:
            delattr(thing, name)


def sample_argument(denoiser: nn.Module) -> str:
    """The name under which a denoiser takes its noisy input: `sample` of a U-Net, `hidden_states` of a transformer."""
    return next(iter(signature(denoiser.forward).parameters))
