"""Training a whole denoiser in less memory: its blocks keep their inputs only, and compute again on the way back.

It is gradient checkpointing (arXiv:1604.06174). Every value and gradient is computed by the same operations on the same
numbers, so that results stay the same, bit for bit; a backward pass takes one more forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from quest.diffusion.denoisers import overridden
from quest.runtime import memory

BLOCKS = (ResnetBlock2D, BasicTransformerBlock, JointTransformerBlock, Attention)


@contextmanager
def recomputing(denoiser: nn.Module, inputs: dict[str, Tensor], rows: int) -> Iterator[None]:
    """While inside, blocks are computed again, if the graph of `rows` rows takes more than half of the memory.

    inputs: keyword arguments of the denoiser for one row, whose graph is measured in a forward pass. What is learned
    requires a gradient already.
    """
    if rows * graph_bytes(denoiser, inputs) <= memory.SHARE * memory.budget(denoiser.device.type):
        yield
        return
    groups = getattr(denoiser, "time_groups", None)
    blocks: dict[str, nn.Module] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, BLOCKS) and not any(name.startswith(f"{outer}.") for outer in blocks):
            blocks[name] = module
    with overridden("forward", {m: partial(_again, m.forward, groups) for m in blocks.values()}):
        yield


def _again(forward: Callable, groups, *args, **kwargs):
    """The output of a block, which is computed again for its gradient; in the time group of this forward pass."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    start = None if groups is None else groups.starts[groups.number]

    def run(*args, **kwargs):
        if start is None:
            return forward(*args, **kwargs)
        with groups.inside(start):
            return forward(*args, **kwargs)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def graph_bytes(denoiser: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that a forward pass would keep for its gradient, beside the denoiser's own tensors; here it keeps none."""
    own = {t.untyped_storage().data_ptr() for t in (*denoiser.parameters(), *denoiser.buffers())}
    counted: dict[int, StorageWeakRef] = {}
    total = 0

    def count(tensor: Tensor) -> None:
        nonlocal total
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        # An address whose tensor is gone belongs to another one now.
        if address not in own and (address not in counted or counted[address].expired()):
            total += storage.nbytes()
            counted[address] = StorageWeakRef(storage)

    with torch.enable_grad(), saved_tensors_hooks(count, lambda _nothing: None):
        denoiser(**inputs)
    return total
