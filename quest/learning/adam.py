"""Adam (arXiv:1412.6980) for loops of many short iterations, where torch.optim's Python takes a tenth of the time."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8  # torch.optim's


def half_cosine(iteration: int, iterations: int) -> float:
    """The factor of a learning rate that falls from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


@dataclass(frozen=True)
class Descent:
    """How something is learned: that many iterations, each on a mini-batch drawn anew."""

    iterations: int
    batch: int  # rows of a mini-batch
    lr: float
    generator: torch.Generator

    def rows(self, n: int) -> Tensor:
        """The next mini-batch of n rows."""
        return torch.randperm(n, generator=self.generator, device="cpu")[: self.batch]

    def falling(self, iteration: int) -> float:
        """The learning rate of this iteration where it falls to zero as a cosine."""
        return self.lr * half_cosine(iteration, self.iterations)


class Adam:
    """The same steps as torch.optim.Adam(parameters, fused=True), bit for bit, with gradients as arguments."""

    def __init__(self, parameters: list[Tensor]):
        self.parameters = [p.detach() for p in parameters]  # which share their memory
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.counts = [torch.zeros((), dtype=torch.float32, device=p.device) for p in self.parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], lr: float) -> None:
        """Move the parameters in place. A gradient of zeros from the first step on leaves its parameter as it is."""
        torch._foreach_add_(self.counts, 1)
        torch._fused_adam_(
            self.parameters,
            gradients,
            self.means,
            self.squares,
            [],
            self.counts,
            lr=lr,
            beta1=BETAS[0],
            beta2=BETAS[1],
            weight_decay=0.0,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )
