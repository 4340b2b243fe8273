"""One stage of QuEST's training loop: which rows come when, and how scales move."""

import pytest
import torch

from baselines.quest import SCHEDULES
from quest.affine import QuantSpec
from quest.diffusion.calibration_set import CalibrationSet
from quest.learning.alignment import ScaleAdam, Stage, scheduled, teacher_outputs
from quest.quantization.quantizer import Quantizer
from quest.quantization.timegroups import TimeGroups


def test_idle_groups_do_not_move():
    groups = TimeGroups([800, 400, 0])
    quantizer = Quantizer(QuantSpec(4), groups=groups)
    quantizer.scale.data[:] = torch.tensor([1.0, 2.0, 3.0])
    quantizer.scale.requires_grad_()
    adam = ScaleAdam([quantizer.scale])

    def step(group, gradient):
        quantizer.scale.grad = torch.zeros(3)
        quantizer.scale.grad[group] = gradient
        adam.step(group, 0.1)

    step(0, 1.0)
    moved = quantizer.scale.detach().clone()
    assert torch.allclose(moved, torch.tensor([2.718281828**-0.1, 2.0, 3.0]))  # the first Adam step is lr, relative
    for _ in range(5):
        step(1, -1.0)
    assert torch.equal(quantizer.scale[[0, 2]].detach(), moved[[0, 2]]) and quantizer.scale[1] > 2.0


def test_scales_move_as_by_one_adam_for_each_group_and_quantizer():
    groups = TimeGroups([800, 400])
    quantizers = [Quantizer(QuantSpec(4), groups=groups), Quantizer(QuantSpec(4, axis=1), (1, 3, 1), groups=groups)]
    g = torch.Generator().manual_seed(0)
    for q in quantizers:
        q.scale.data = torch.rand(q.scale.shape, generator=g) + 0.1
    logarithms = [[q.scale[i].log().requires_grad_() for q in quantizers] for i in range(2)]
    expected = [torch.optim.Adam(logs, lr=0.1, eps=1e-12) for logs in logarithms]
    adam = ScaleAdam([q.scale for q in quantizers])
    for group in (0, 1, 1, 0, 1):
        for q, log in zip(quantizers, logarithms[group], strict=True):
            q.scale.grad = torch.zeros_like(q.scale)
            q.scale.grad[group] = torch.randn(q.scale.shape[1:], generator=g)
            log.grad = q.scale.grad[group] * q.scale.detach()[group]
        adam.step(group, 0.1)
        expected[group].step()
    for i in range(2):
        for q, log in zip(quantizers, logarithms[i], strict=True):
            torch.testing.assert_close(q.scale[i].detach(), log.detach().exp(), rtol=1e-5, atol=0)


def test_scales_stay_positive_under_large_steps():
    quantizer = Quantizer(QuantSpec(4))
    quantizer.scale.data.fill_(0.01)
    adam = ScaleAdam([quantizer.scale])
    for _ in range(100):
        quantizer.scale.grad = torch.ones(1)
        adam.step(0, 0.5)
    assert (quantizer.scale > 0).all()


class Rows:
    """A calibration set as far as a schedule looks: 100 rows of each of 20 timesteps, noisiest last."""

    timestep = torch.arange(1, 1000, 50).repeat_interleave(100)


def stage_of(schedule, which, iterations, batch, groups=1):
    return Stage("s", {}, [], (), 1.0, iterations, batch, SCHEDULES[schedule][which], 1e-5, 1e-4, groups)


def turns(schedule, which, iterations, batch):
    groups = TimeGroups(Rows.timestep.unique().tolist())
    stage = stage_of(schedule, which, iterations, batch)
    found = list(scheduled(groups, Rows, stage, torch.Generator().manual_seed(0)))
    assert len(found) == iterations
    index = [groups.index(Rows.timestep[rows]).unique().item() for rows, _ in found]  # one group in a batch
    return index, [rows for rows, _ in found], [new for _, new in found]


def test_interleaved_timesteps():
    index, rows, new = turns("interleaved", 0, 50, 16)
    assert sorted(index[:20]) == sorted(index[20:40]) == list(range(20)) and index[:20] != index[20:40]
    assert {len(r) for r in rows} == {16} and not any(new)


def test_groups_that_share_an_iteration():
    groups, stage = TimeGroups(Rows.timestep.unique().tolist()), stage_of("interleaved", 0, 10, 16, groups=4)
    found = [rows for rows, _ in scheduled(groups, Rows, stage, torch.Generator().manual_seed(0))]
    assert len(found) == 40 and {len(rows) for rows in found} == {4}
    index = [groups.index(Rows.timestep[rows]).unique().item() for rows in found]
    assert sorted(index[:20]) == sorted(index[20:]) == list(range(20))


def test_sequential_timesteps():
    index, _, new = turns("sequential", 1, 45, 16)
    assert index == sorted(index) and set(index) == set(range(20)) and sum(new) == 20
    assert all(new[i] == (i == 0 or index[i] != index[i - 1]) for i in range(45))


def test_the_released_schedule():
    """Temporal: 800 iterations on 8 rows of each step in turn. Critical: 20 rounds of 16 iterations on 64 new rows."""
    index, rows, new = turns("released", 0, 16_000, 2)
    assert index == sorted(index) and sum(new) == 20
    assert len(torch.cat(rows[:800]).unique()) == 8 and len(torch.cat(rows[:4]).unique()) == 8
    index, rows, new = turns("released", 1, 6_400, 4)
    assert sum(new) == 400 and [index[i] for i in range(6400) if new[i]] == list(range(20)) * 20
    assert len(torch.cat(rows[:16]).unique()) == 64
    assert not torch.equal(torch.cat(rows[:16]).sort()[0], torch.cat(rows[320:336]).sort()[0])


def test_plain_scales_move_as_by_adam_and_stay_above_zero():
    quantizer = Quantizer(QuantSpec(4))
    quantizer.scale.data.fill_(0.5)
    expected = quantizer.scale.detach().clone().requires_grad_()
    adam, reference = ScaleAdam([quantizer.scale], log=False), torch.optim.Adam([expected], lr=0.01)
    for gradient in (1.0, -3.0, 2.0):
        quantizer.scale.grad = expected.grad = torch.tensor([gradient])
        adam.step(0, 0.01)
        reference.step()
    torch.testing.assert_close(quantizer.scale.detach(), expected.detach())
    adam.restart(0)
    before = quantizer.scale.item()
    adam.step(0, 0.01)
    assert quantizer.scale.item() == pytest.approx(before - 0.01)  # as the first step of a new Adam
    for _ in range(100):
        adam.step(0, 0.01)
    assert quantizer.scale > 0


def test_the_teacher_s_outputs_are_looked_up_or_computed_anew(class_pipe, class_calibration):
    names, calls = ["conv_in", "mid_block.resnets.0.time_emb_proj"], []
    count = class_pipe.unet.register_forward_pre_hook(lambda *_: calls.append(0))
    n, rows = len(class_calibration), torch.tensor([5, 0, 3])
    try:
        kept = teacher_outputs(class_pipe.unet, names, class_calibration, batch=4)
        assert len(calls) == 1 + -(-n // 4)
        looked_up = kept(rows)
        assert len(calls) == 1 + -(-n // 4)
        needed = n * sum(v[0].nbytes for v in looked_up.values())
        calls.clear()
        anew = teacher_outputs(class_pipe.unet, names, class_calibration, budget=needed - 1)
        computed = anew(rows)
        assert len(calls) == 2  # one row, whose outputs have the size of the others', and the three rows
        assert teacher_outputs(class_pipe.unet, [], class_calibration)(rows) == {} and len(calls) == 2
    finally:
        count.remove()
    assert list(looked_up) == list(computed) == names
    for name in names:
        assert computed[name].dtype == torch.half
        torch.testing.assert_close(looked_up[name], computed[name], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("budget", [0, 3 * 2 * 2, 3 * 2 * 4])
def test_outputs_beyond_half_precision_stay_finite(budget):
    """Where they are computed anew, also because single precision exceeds the budget, and where they are looked up."""
    sample = torch.tensor([[1.0001, 3.3], [7e4, 1.0001], [-1.5, -1e9]])
    calls = []
    denoiser = torch.nn.Sequential(torch.nn.Identity())
    denoiser.forward = lambda sample, timestep: calls.append(0) or denoiser[0](sample)
    n = torch.zeros(3, dtype=torch.long)
    targets = teacher_outputs(denoiser, ["0"], CalibrationSet(sample, n, sample, n, n), budget, batch=1)
    calls.clear()
    expected = torch.where(sample.abs() > 65504, sample, sample.half())  # what fits is rounded as before
    assert torch.equal(targets(torch.arange(3))["0"].float(), expected)
    assert targets(n[:1])["0"].float().tolist() == [sample[0].half().tolist()]
    assert len(calls) == (0 if budget == 24 else 2)
