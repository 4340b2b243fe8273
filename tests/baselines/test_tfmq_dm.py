"""TFMQ-DM: the temporal information block is what the denoiser computes, learned apart, ranged step by step."""

import copy
from dataclasses import replace

import pytest
import torch

import quest
from baselines import tfmq_dm
from baselines.tfmq_dm import TemporalInformationBlock
from quest.quantization.layers import input_quantizers, quant_layers

FAST = dict(samples=8, batch=4, rows=12)


def projections(denoiser, inputs):
    """What every time embedding projection answers in a whole forward pass, by name."""
    found = {}
    handles = [
        m.register_forward_hook(lambda _m, _a, out, n=n: found.__setitem__(n, out))
        for n, m in denoiser.named_modules()
        if n.endswith("time_emb_proj")
    ]
    with torch.no_grad():
        denoiser(**inputs)
    for h in handles:
        h.remove()
    return found


@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_the_block_is_what_the_denoiser_computes(kind, request):
    denoiser, calibration = request.getfixturevalue(f"{kind}_pipe").unet, request.getfixturevalue(f"{kind}_calibration")
    inputs = calibration.inputs(torch.tensor([0, 20]))
    found = projections(denoiser, inputs)
    block = TemporalInformationBlock(denoiser)
    order = [n for n, _ in denoiser.named_modules() if n in found]
    with torch.no_grad():
        assert torch.equal(block(inputs["timestep"]), torch.cat([found[n] for n in order], 1))
    assert not block.layers  # a float denoiser has nothing to round


@pytest.fixture(scope="module")
def runs(class_pipe, class_calibration):
    """Nearest rounding, then with AdaRound in the block and elsewhere."""
    return [
        quest.quantize(class_pipe, tfmq_dm.quantize, "w4a8", calibration=class_calibration, weight_iterations=n, **FAST)
        for n in (0, 60)
    ]


def block_error(pipe, exact, timesteps):
    """Of the block with float activations."""
    from quest.learning.reconstruction import float_activations

    t = torch.tensor(timesteps)
    with torch.no_grad(), float_activations(input_quantizers(pipe.unet).values()):
        return (TemporalInformationBlock(pipe.unet)(t) - TemporalInformationBlock(exact.unet)(t)).square().sum(1).mean()


def test_the_block_is_reconstructed_for_the_sampler_s_timesteps(runs, class_pipe, class_calibration):
    nearest, learned = (block_error(run, class_pipe, class_calibration.timesteps) for run in runs)
    assert learned < 0.7 * nearest, (nearest, learned)


def test_ranges_of_the_block_follow_the_timestep_and_no_others(runs, class_pipe, class_calibration):
    denoiser = runs[1].unet
    temporal = {f"{n}.input_quantizer" for n in TemporalInformationBlock(denoiser).layers}
    assert len(temporal) > 4
    for name, q in input_quantizers(denoiser).items():
        assert len(q.scale) == (6 if name in temporal else 1), name
    # Finite set calibration: the whole range at each timestep, nothing clipped and nothing wasted.
    quantizer = denoiser.time_embedding.linear_1.input_quantizer
    for group, t in enumerate(class_calibration.timesteps):
        x = class_pipe.unet.time_proj(torch.tensor([t]))
        assert quantizer.scale[group].item() == pytest.approx((x.max() - x.min().clamp(max=0)).item() / 255, rel=1e-5)


def test_all_ranges_follow_the_timestep_as_released(class_pipe, class_calibration):
    q = tfmq_dm.quantize(class_pipe, class_calibration, 4, 8, fsc_scope="all", weight_iterations=0, **FAST)
    assert all(len(quantizer.scale) == 6 for quantizer in input_quantizers(q.unet).values())
    scale = q.unet.conv_in.input_quantizer.scale
    assert len(scale.unique()) > 1


def test_started_from_adaround_only_the_block_is_learned(runs, class_pipe, class_calibration, tmp_path):
    start = tmp_path / "start.safetensors"
    scaled = copy.deepcopy(runs[1])
    for _, layer in quant_layers(scaled.unet):  # as smoothquant does; the factors of the block go with its weights
        layer.thaw()
        layer.scale_input(torch.full((layer.weight_shape[1],), 4.0))
        layer.choose_weight_range()
    quest.save(scaled, start, floats=True)
    q = tfmq_dm.quantize(class_pipe, class_calibration, 4, 8, init=str(start), weight_iterations=0, **FAST)
    block = TemporalInformationBlock(q.unet).layers
    other = dict(quant_layers(scaled.unet))
    for name, layer in quant_layers(q.unet):
        weight = class_pipe.unet.get_submodule(name).weight if name in block else other[name].float_weight
        assert torch.equal(layer.float_weight, weight), name
        assert (layer.prologue is None) == (name in block), name


def test_the_block_is_rounded_and_ranged_at_fractions_that_a_sampler_visits(
    class_pipe, class_calibration, first_calls, monkeypatch
):
    calibration = first_calls(class_calibration)
    calibration = replace(calibration, timestep=calibration.timestep + 0.61)
    met, forward = [], TemporalInformationBlock.forward
    monkeypatch.setattr(TemporalInformationBlock, "forward", lambda block, t: met.append(t) or forward(block, t))
    q = tfmq_dm.quantize(class_pipe, calibration, 4, 8, weight_iterations=2, **FAST)
    assert [t.tolist() for t in met[-2:]] == [[t] for t in calibration.timesteps]
    assert {t.dtype for t in met} == {torch.float32} and set(torch.cat(met).tolist()) == set(calibration.timesteps)
    assert "temporal information block" in [stage["stage"] for stage in q.unet.stages]


def test_unknown_scope(class_pipe, class_calibration):
    with pytest.raises(ValueError, match="fsc_scope.*tib, all"):
        quest.quantize(class_pipe, "tfmq-dm", "w4a8", calibration=class_calibration, fsc_scope="some")
