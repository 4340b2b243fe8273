"""Fake quantization by the compiled core against that by torch's own operations."""

import pytest
import torch
from operands import needs_core

from quest.affine import QuantSpec, _FakeQuantize, _FusedFakeQuantize

pytestmark = needs_core

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "channels of more": lambda x: x.contiguous(memory_format=torch.channels_last)[:, 2:],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "long": lambda x: torch.cat([x] * 400),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", [QuantSpec(4), QuantSpec(8), QuantSpec(4, symmetric=True)], ids=str)
def test_values_and_gradients_are_those_of_torch(isa, threads, layout, spec):
    torch.manual_seed(0)
    x = torch.randn(3, 7, 5, 4)
    x.view(-1)[:6] = torch.tensor([0.0, -0.0, 0.05, 0.15, torch.inf, -torch.inf])  # ties, and what is clipped at once
    x = LAYOUTS[layout](x)
    zero_point = torch.tensor(0.0 if spec.symmetric else 5.0)
    grad = torch.randn(x.shape).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    results = []
    for function in (_FakeQuantize, _FusedFakeQuantize):
        given, scale = x.detach().requires_grad_(), torch.tensor(0.1, requires_grad=True)
        y = function.apply(given, scale, zero_point, spec.qmin, spec.qmax)
        y.backward(grad)
        results.append((y, given.grad, scale.grad))
    (y, grad_x, grad_scale), (own, own_x, own_scale) = results
    assert torch.equal(own, y) and own.stride() == y.stride()
    assert torch.equal(own_x, grad_x) and 0 < (own_x == 0).sum() < own_x.numel()
    torch.testing.assert_close(own_scale, grad_scale, rtol=1e-4, atol=1e-4)  # sums of 168,000 floats


def test_nan_passes(isa):
    x = torch.randn(40)
    x[[3, 39]] = torch.nan
    y = _FusedFakeQuantize.apply(x, torch.tensor(0.1), torch.tensor(8.0), 0, 15)
    assert y.isnan().nonzero().flatten().tolist() == [3, 39]


def test_only_what_asks_for_a_gradient_gets_one():
    x, scale = torch.randn(40), torch.tensor(0.1, requires_grad=True)
    _FusedFakeQuantize.apply(x, scale, torch.tensor(8.0), 0, 15).sum().backward()
    assert x.grad is None and scale.grad.shape == ()
    x, scale = torch.randn(40, requires_grad=True), torch.tensor(0.1)
    _FusedFakeQuantize.apply(x, scale, torch.tensor(8.0), 0, 15).sum().backward()
    assert x.grad is not None and scale.grad is None
