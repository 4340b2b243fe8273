"""Random codes and their exact products: what tests of every kernel on integers start from."""

import pytest
import torch
from torch import Tensor

from quest.affine import QParams, QTensor, QuantSpec, quantize
from quest.kernels.cpu import core

needs_core = pytest.mark.skipif(not core.available(), reason="no compiled core: installed without a C++ compiler")


def activation(bits: int, zero_point: float, scale: float = 0.05) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point), QuantSpec(bits))


def weight(*shape: int, bits: int, outside: bool = False) -> QTensor:
    """Random codes with a scale and zero point per output; `outside`: zero points that are no codes."""
    column = (shape[0],) + (1,) * (len(shape) - 1)
    low, high = (-40, 2**bits + 40) if outside else (0, 2**bits)
    return QTensor(
        torch.randint(0, 2**bits, shape).float(),
        torch.rand(column) * 0.01 + 1e-3,
        torch.randint(low, high, column).float(),
    )


def exact(x, qparams, w: QTensor, operation):
    """Sums of products of codes less zero point, in float64 and so exact."""
    q = quantize(x, qparams)
    return operation((q.codes - q.zero_point).double(), (w.codes - w.zero_point).double())


def poison(monkeypatch):
    """What is not written shows: new tensors of floats start as NaN."""

    def poisoned(make):
        def made(*args, **kwargs):
            new = make(*args, **kwargs)
            return new.fill_(torch.nan) if new.is_floating_point() else new

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
