import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import quest
from quest.affine import QuantSpec, fake_quantize
from quest.kernels.cpu import integer
from quest.quantization.layers import input_quantizers
from quest.quantization.placement import place
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
        denoiser.conv_out.register_forward_hook(lambda *_, d=denoiser, s=seen: s.append(d.time_groups.number))
        for call in (
            lambda t, d=denoiser, x=x, k=kwargs: d(x, t, **k),
            lambda t, d=denoiser, x=x, k=kwargs: d(sample=x, timestep=torch.tensor([t]), **k),
        ):
            for t in (900, 500, 499, 3):
                call(t)
        assert seen == [0, 1, 1, 2] * 2


def test_copies_keep_their_own_groups(uncond_pipe):
    a = swap(uncond_pipe, 8, 8, groups=TimeGroups([900, 500])).unet
    b = copy.deepcopy(a)
    assert b.time_groups is not a.time_groups
    assert all(q.groups is b.time_groups for q in input_quantizers(b).values())
    for q in [*input_quantizers(a).values(), *input_quantizers(b).values()]:
        q.scale.data.fill_(1.0), q.zero_point.fill_(0.0)
    a.time_groups.enter(900)
    b(torch.zeros(1, b.config.in_channels, 8, 8), 10)
    assert a.time_groups.current.item() == 0
    with pytest.raises(RuntimeError, match="no forward pass is in progress"):
        _ = b.time_groups.current


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


KERNELS = ["reference"] + ["integer"] * (integer.unavailable(torch.device("cpu")) is None)


@pytest.fixture(scope="module")
def grouped_denoiser(text_pipe, text_calibration):
    recipe = dict(time_groups=3, tla_iterations=0, cma_iterations=0, samples=8)
    return quest.quantize(text_pipe, "quest-suite", "w4a8", calibration=text_calibration, **recipe).unet


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_share_a_denoiser(kernel, grouped_denoiser, text_calibration):
    """Each of 8 threads gets at each timestep what it gets alone, whatever the others are at."""
    denoiser = copy.deepcopy(grouped_denoiser)
    place(denoiser, kernel)
    times = text_calibration.timesteps
    inputs = {t: text_calibration.inputs((text_calibration.timestep == t).nonzero().flatten()[:2]) for t in times}
    alone = {t: denoiser(**inputs[t]).sample for t in times}
    assert len({denoiser.time_groups.index(t).item() for t in times}) == 3
    wrong, together = [], threading.Barrier(8)

    def sample(first: int) -> None:
        with torch.no_grad():
            for turn in range(12):
                together.wait()  # all of them in a pass at the same time
                t = times[(first + turn) % len(times)]
                if not torch.equal(denoiser(**inputs[t]).sample, alone[t]):
                    wrong.append((first, t))

    threads = [threading.Thread(target=sample, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_call_within_a_call(kernel, grouped_denoiser, text_calibration):
    """A hook that calls the same denoiser at another timestep changes nothing in the call around it."""
    denoiser = copy.deepcopy(grouped_denoiser)
    place(denoiser, kernel)
    first, *_, last = times = text_calibration.timesteps
    inputs = {t: text_calibration.inputs((text_calibration.timestep == t).nonzero().flatten()[:2]) for t in times}
    expected = denoiser(**inputs[first]).sample
    inner = []

    def call(*_) -> None:
        handle.remove()
        inner.append(denoiser(**inputs[last]).sample)

    handle = denoiser.mid_block.register_forward_hook(call)
    assert torch.equal(denoiser(**inputs[first]).sample, expected)
    assert torch.equal(inner[0], denoiser(**inputs[last]).sample)


@torch.no_grad()
def test_an_error_leaves_no_group_behind(grouped_denoiser, text_calibration):
    denoiser = copy.deepcopy(grouped_denoiser)
    inputs = text_calibration.inputs(torch.arange(2))
    expected = denoiser(**inputs).sample

    def fail(*_):
        raise KeyError("from a hook")

    handle = denoiser.mid_block.register_forward_hook(fail)
    with pytest.raises(KeyError):
        denoiser(**inputs)
    handle.remove()
    with pytest.raises(ValueError, match="above the calibrated range"):
        denoiser(**inputs | {"timestep": 5000})
    with pytest.raises(RuntimeError, match="no forward pass is in progress"):
        denoiser.mid_block.resnets[0].conv1(torch.zeros(1, 64, 4, 4))
    assert torch.equal(denoiser(**inputs).sample, expected)


def test_a_pickled_copy_is_in_no_forward_pass(grouped_denoiser):
    groups = grouped_denoiser.time_groups
    with groups.inside(0):
        copied = pickle.loads(pickle.dumps(groups))
    assert copied.starts.tolist() == groups.starts.tolist() and copied.position == groups.position
    with pytest.raises(RuntimeError, match="no forward pass is in progress"):
        _ = copied.current


@torch.no_grad()
def test_a_compiled_denoiser_in_threads(grouped_denoiser, text_calibration):
    denoiser = copy.deepcopy(grouped_denoiser)
    torch._dynamo.reset()
    compiled = torch.compile(denoiser, backend="eager")
    times = text_calibration.timesteps
    inputs = {t: text_calibration.inputs((text_calibration.timestep == t).nonzero().flatten()[:2]) for t in times}
    alone = {t: denoiser(**inputs[t]).sample for t in times}
    with ThreadPoolExecutor(4) as pool:

        def same(t: int) -> bool:
            with torch.no_grad():
                return torch.equal(compiled(**inputs[t]).sample, alone[t])

        assert all(same(t) for t in times) and all(pool.map(same, times * 2))
    with pytest.raises(RuntimeError, match="no forward pass is in progress"):
        _ = denoiser.time_groups.current
