"""Adam without torch.optim's work in Python: the same bits."""

import torch

from quest.learning.adam import Adam


def test_steps_are_those_of_torch_optim():
    g = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=g) for shape in ((37, 5), ())]
    ours, theirs = [p.clone() for p in first], [p.clone().requires_grad_() for p in first]
    adam, reference = Adam(ours), torch.optim.Adam(theirs, lr=0.1, fused=True)
    for i in range(6):
        gradients = [torch.randn(p.shape, generator=g) for p in first]
        for p, gradient in zip(theirs, gradients, strict=True):
            p.grad = gradient.clone()
        reference.param_groups[0]["lr"] = 0.1 / (i + 1)
        reference.step()
        adam.step(gradients, 0.1 / (i + 1))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all((a != b).all() for a, b in zip(ours, first, strict=True))


def test_zeros_as_gradients_move_nothing():
    p = torch.tensor([1.5, -2.0])
    Adam([p]).step([torch.zeros(2)], 0.1)
    assert p.tolist() == [1.5, -2.0]
