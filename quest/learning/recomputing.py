"""Training a whole denoiser in less memory: its blocks keep their inputs only, and compute again on the way back.

It is gradient checkpointing (arXiv:1604.06174). Every value and gradient is computed by the same operations on the same
numbers, so that results stay the same, bit for bit; a backward pass takes one more forward pass. Where a mini-batch
does not fit even so, its loops sum gradients over several passes, which changes the rounding of sums only.
"""

from collections.abc import Callable, Iterable, Iterator
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

from quest.diffusion.denoisers import hooked, overridden
from quest.runtime import memory

BLOCKS = (ResnetBlock2D, BasicTransformerBlock, JointTransformerBlock, Attention)


@contextmanager
def recomputing(denoiser: nn.Module, inputs: dict[str, Tensor], rows: int) -> Iterator[int]:
    """While inside, blocks are computed again, if the graph of `rows` rows takes more than half of the memory.

    inputs: keyword arguments of the denoiser for one row, whose graph is measured in a forward pass. What is learned
    requires a gradient already. Gives the number of rows for one pass, at least 1: half of the memory that is left
    beside gradients and Adam's two moments is for their graph.
    """
    blocks = outermost(denoiser)
    kept, kept_again = graph_bytes(denoiser, inputs, blocks)
    if rows * kept <= memory.SHARE * memory.budget(denoiser.device.type):
        yield rows
        return
    state = 3 * sum(p.nbytes for p in denoiser.parameters() if p.requires_grad)
    room = memory.SHARE * (memory.left(denoiser.device.type) - state)
    groups = getattr(denoiser, "time_groups", None)
    with overridden("forward", {m: partial(_again, m.forward, groups) for m in blocks}):
        yield min(rows, max(1, int(room // max(1, kept_again))))


def outermost(denoiser: nn.Module) -> list[nn.Module]:
    """The BLOCKS of a denoiser that lie in no other one."""
    blocks: dict[str, nn.Module] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, BLOCKS) and not any(name.startswith(f"{outer}.") for outer in blocks):
            blocks[name] = module
    return list(blocks.values())


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


def graph_bytes(denoiser: nn.Module, inputs: dict[str, Tensor], blocks: Iterable[nn.Module] = ()) -> tuple[int, int]:
    """Bytes that a forward pass would keep for its gradient, beside the denoiser's own tensors; here it keeps none.

    The second number is for the case that these blocks are computed again: their inputs, and the graph of the largest.
    """
    own = {t.untyped_storage().data_ptr() for t in (*denoiser.parameters(), *denoiser.buffers())}
    counted: dict[int, StorageWeakRef] = {}
    total, starts = 0, []
    of_inputs, of_blocks = [], [0]

    def count(tensor: Tensor) -> None:
        nonlocal total
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        # An address whose tensor is gone belongs to another one now.
        if address not in own and (address not in counted or counted[address].expired()):
            total += storage.nbytes()
            counted[address] = StorageWeakRef(storage)

    def enter(_block: nn.Module, args: tuple, kwargs: dict) -> None:
        starts.append(total)
        of_inputs.append(sum(t.nbytes for t in (*args, *kwargs.values()) if isinstance(t, Tensor)))

    def leave(*_: object) -> None:
        of_blocks.append(total - starts.pop())

    handles = [b.register_forward_pre_hook(enter, with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(leave) for b in blocks]
    with hooked(handles), torch.enable_grad(), saved_tensors_hooks(count, lambda _nothing: None):
        denoiser(**inputs)
    return total, total - sum(of_blocks) + sum(of_inputs) + max(of_blocks)
