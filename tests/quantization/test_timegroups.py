import copy

import pytest
import torch

from quest.affine import QuantSpec, fake_quantize
from quest.quantization.layers import input_quantizers
from quest.quantization.quantizer import Quantizer
from quest.quantization.ranges import minmax
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups, grouped


def test_a_group_is_a_stretch_from_its_start_down_to_just_above_the_next():
    groups = TimeGroups([51, 951, 501])  # any order
    t = torch.tensor([951, 950, 502, 501, 52, 51, 50, 0])
    assert groups.index(t).tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    assert groups.index(951.5).tolist() == [-1]


@pytest.mark.parametrize("steps, groups", [(20, 20), (40, 20), (50, 25), (200, 20), (500, 20)])
def test_groups_of_a_ddim_schedule(steps, groups):
    timesteps = list(range(1, 1000, 1000 // steps))[:steps]
    found = TimeGroups(grouped(timesteps, groups))
    index = found.index(torch.tensor(timesteps[::-1]))
    assert len(found) == groups and index.bincount().tolist() == [steps // groups] * groups
    assert (index.diff() >= 0).all()


def test_plms_repeats_a_timestep_without_an_extra_group():
    assert grouped([951, 901, 901, 851, 801], 2) == [951, 851]


@pytest.mark.parametrize("groups", [0, 3, 21])
def test_groups_that_do_not_divide_the_steps(groups):
    with pytest.raises(ValueError, match=r"time_groups: .*20 timesteps; valid: \[1, 2, 4, 5, 10, 20\]"):
        grouped(list(range(20)), groups)


def test_timesteps_outside_the_range_and_two_groups_in_one_batch_are_errors():
    groups = TimeGroups([951, 501])
    groups.enter(torch.tensor([700, 700]))
    assert groups.current.tolist() == [0]
    with pytest.raises(ValueError, match=r"952.* above the calibrated range 0\.\.951"):
        groups.enter(952)
    with pytest.raises(ValueError, match="2 time groups"):
        groups.enter(torch.tensor([700, 300]))
    with pytest.raises(ValueError, match=r"visits timesteps 999\.\.1.*951\.\.0"):
        groups.check([999, 500, 1])
    with pytest.raises(ValueError, match="distinct"):
        TimeGroups([5, 5])


def test_the_group_follows_the_timestep_of_every_call(uncond_pipe, class_pipe, text_pipe):
    for pipe, context in ((uncond_pipe, None), (class_pipe, True), (text_pipe, True)):
        pipe = swap(pipe, 8, 8, groups=TimeGroups([900, 500, 100]))
        denoiser = pipe.unet
        for q in input_quantizers(denoiser).values():
            q.scale.data.fill_(1.0), q.zero_point.fill_(0.0)
        c = denoiser.config
        x = torch.zeros(1, c.in_channels, c.sample_size, c.sample_size)
        kwargs = {"encoder_hidden_states": torch.zeros(1, 3, c.cross_attention_dim)} if context else {}
        seen = []
        for call in (
            lambda t, d=denoiser, x=x, k=kwargs: d(x, t, **k),
            lambda t, d=denoiser, x=x, k=kwargs: d(sample=x, timestep=torch.tensor([t]), **k),
        ):
            for t in (900, 500, 499, 3):
                call(t)
                seen.append(denoiser.time_groups.current.item())
        assert seen == [0, 1, 1, 2] * 2


def test_copies_keep_their_own_groups(uncond_pipe):
    a = swap(uncond_pipe, 8, 8, groups=TimeGroups([900, 500])).unet
    b = copy.deepcopy(a)
    assert b.time_groups is not a.time_groups
    assert all(q.groups is b.time_groups for q in input_quantizers(b).values())
    for q in [*input_quantizers(a).values(), *input_quantizers(b).values()]:
        q.scale.data.fill_(1.0), q.zero_point.fill_(0.0)
    b(torch.zeros(1, b.config.in_channels, 8, 8), 10)
    assert a.time_groups.current.item() == 0 and b.time_groups.current.item() == 1


def test_only_the_current_group_gets_a_gradient():
    groups = TimeGroups([800, 400, 0])
    quantizer = Quantizer(QuantSpec(4), groups=groups)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for t in (800, 400, 0):
        groups.enter(t)
        quantizer.calibrate(x, minmax)
    quantizer.scale.requires_grad_()
    groups.enter(400)
    fake_quantize(x, quantizer(x)).square().sum().backward()
    assert (quantizer.scale.grad != 0).tolist() == [False, True, False]


def test_one_compiled_graph_serves_all_groups():
    import torch._dynamo as dynamo

    dynamo.reset()
    dynamo.utils.counters.clear()
    groups = TimeGroups(list(range(0, 1000, 50)))
    quantizer = Quantizer(QuantSpec(8), groups=groups)
    quantizer.scale.data.fill_(1.0), quantizer.zero_point.fill_(0.0)
    compiled = torch.compile(lambda x: x * quantizer(x).scale, backend="eager", fullgraph=True)
    with torch.no_grad():
        for t in range(950, 0, -50):
            groups.enter(t)
            compiled(torch.ones(4, 8))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
