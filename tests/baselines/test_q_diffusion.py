"""Q-Diffusion: its calibration rows, split shortcuts, activation ranges, and where it starts from."""

import copy

import pytest
import torch
from torch import nn

import quest
from baselines import adaround, q_diffusion
from quest.affine import QuantSpec
from quest.quantization import ranges
from quest.quantization.layers import QuantConv2d, input_quantizers, quant_layers, quantized
from quest.quantization.splitting import SplitConv2d, concatenation_splits, split, split_layers
from quest.quantization.swapping import released_axes, swap

FEW = dict(weight_iterations=3, activation_iterations=3, batch=4, samples=8)


def test_rows_are_uniform_over_the_sampler_s_calls_and_pair_both_halves(class_calibration):
    calls = int(class_calibration.call.max()) + 1
    drawn = adaround.uniform(class_calibration, rows=calls * 2 * 3, seed=0)
    assert len(drawn) == calls * 2 * 3 and drawn.call.bincount().tolist() == [6] * calls
    without, given = drawn.sample[::2], drawn.sample[1::2]
    assert torch.equal(without, given) and torch.equal(drawn.timestep[::2], drawn.timestep[1::2])
    context = drawn.conditioning["encoder_hidden_states"]
    assert not torch.equal(context[::2], context[1::2])
    assert len(drawn.trajectory.unique()) == 3
    other = adaround.uniform(class_calibration, rows=calls * 2 * 3, seed=1)
    assert not torch.equal(drawn.trajectory, other.trajectory)


def test_every_kth_call_is_kept(uncond_calibration, monkeypatch):
    monkeypatch.setattr(adaround, "STEPS", 3)
    drawn = adaround.uniform(uncond_calibration, rows=6, seed=0)
    assert drawn.call.tolist() == [0, 0, 2, 2, 4, 4]


@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_splits_lie_where_the_decoder_concatenates(kind, request, monkeypatch):
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    joined, cat = [], torch.cat

    def watched(tensors, dim=0, **kwargs):
        if dim == 1 and tensors[0].ndim == 4:
            joined.append(tensors[0].shape[1])
        return cat(tensors, dim, **kwargs)

    monkeypatch.setattr(torch, "cat", watched)
    found = concatenation_splits(pipe.unet, calibration.inputs(torch.arange(1)))
    for kind in ("conv_shortcut", "conv1"):
        of_kind = {name: channels for name, channels in found.items() if name.endswith(kind)}
        assert list(of_kind.values()) == joined
        decoder = [n for n, m in pipe.unet.named_modules() if n.endswith(kind) and n.startswith("up_blocks")]
        assert list(of_kind) == [n for n in decoder if ".upsamplers." not in n]


def test_a_denoiser_that_concatenates_nothing_is_not_split(uncond_pipe, uncond_calibration):
    plain = nn.Sequential(copy.deepcopy(uncond_pipe.unet.conv_in))
    assert concatenation_splits(plain, {"input": uncond_calibration.sample[:1]}) == {}


@pytest.mark.parametrize(
    "recipe, kinds",
    [({}, {"conv_shortcut"}), ({"split": False}, set()), ({"split_conv1": True}, {"conv_shortcut", "conv1"})],
)
def test_what_is_split_on_both_kernels(uncond_pipe, uncond_model, uncond_calibration, tmp_path, recipe, kinds):
    """Shortcuts by default; the first convolutions of the decoder's blocks by a switch."""
    from quest.diffusion.sampling import arguments

    path = tmp_path / "model.safetensors"
    q = quest.quantize(uncond_pipe, "q-diffusion", "w4a4", calibration=uncond_calibration, rows=24, **recipe, **FEW)
    assert {name.rpartition(".")[2] for name in split_layers(q.unet)} == kinds
    quest.save(q, path)
    images = []
    for kernel in ("reference", "auto"):
        loaded = quest.load(uncond_pipe, path, kernel=kernel)
        assert split_layers(loaded.unet) == split_layers(q.unet)
        call = arguments(loaded, uncond_model, "evaluation", [0])
        images.append(loaded(**call, output_type="latent").images)
    assert torch.nn.functional.mse_loss(*images) < 0.02 * images[0].square().mean()


def test_a_split_convolution_is_the_sum_of_two():
    g = torch.Generator().manual_seed(0)
    conv, x = nn.Conv2d(7, 5, 3, padding=1), torch.randn(2, 7, 6, 6, generator=g)
    torch.testing.assert_close(split(conv, 4)(x), conv(x), rtol=1e-5, atol=1e-5)
    whole = quantized(copy.deepcopy(conv).requires_grad_(False), QuantSpec(4, axis=0), QuantSpec(4), None)
    whole.choose_weight_range(ranges.mse)
    whole.input_quantizer.calibrate(x, ranges.minmax)
    parts = split(whole, 4)
    assert isinstance(parts.hidden, QuantConv2d) and parts.skip.bias is None
    for part in (parts.hidden, parts.skip):  # with one scale for both halves nothing is split
        for name in ("weight_quantizer", "input_quantizer"):
            getattr(part, name).scale.data = getattr(whole, name).scale.data.clone()
            getattr(part, name).zero_point = getattr(whole, name).zero_point.clone()
    torch.testing.assert_close(parts(x), whole(x), rtol=1e-5, atol=1e-5)
    # A skip of twenty times the range leaves the hidden half two or three codes, unless it has its own.
    x[:, 4:] *= 20
    whole.input_quantizer.calibrate(x, ranges.minmax)
    parts.hidden.input_quantizer.calibrate(x[:, :4], ranges.minmax)
    hidden = x * (torch.arange(7) < 4)[:, None, None]
    errors = [(m(hidden) - conv(hidden)).square().mean() for m in (parts, whole)]
    assert errors[0] < 0.5 * errors[1]


def test_split_layers_quantize_save_load_and_start_others(uncond_pipe, uncond_model, uncond_calibration, tmp_path):
    from quest.diffusion.sampling import arguments

    path = tmp_path / "model.safetensors"
    q = quest.quantize(uncond_pipe, "q-diffusion", "w4a8", calibration=uncond_calibration, split=True, rows=24, **FEW)
    parts = split_layers(q.unet)
    assert parts and all(isinstance(q.unet.get_submodule(n), SplitConv2d) for n in parts)
    names = {f"{n}.{half}" for n in parts for half in ("hidden", "skip")}
    layers = dict(quant_layers(q.unet))
    assert names <= set(layers) and all(layers[n].weight_quantizer.spec.bits == 4 for n in names)
    assert all(layers[n].input_quantizer.scale.isfinite().all() for n in names)
    quest.save(q, path, floats=True)
    loaded = quest.load(uncond_pipe, path, kernel="reference")
    images = [p(**arguments(p, uncond_model, "evaluation", [0]), output_type="latent").images for p in (q, loaded)]
    assert torch.equal(*images)
    other = quest.quantize(
        uncond_pipe, "q-diffusion", "w4a4", calibration=uncond_calibration, init=str(path), split=True, rows=24, **FEW
    )
    assert all(torch.equal(m.float_weight, layers[n].float_weight) for n, m in quant_layers(other.unet))
    recipe = dict(init=str(path), split=False) | FEW
    with pytest.raises(ValueError, match="split: False, but .* has 4 split layers"):
        quest.quantize(uncond_pipe, "q-diffusion", "w4a4", calibration=uncond_calibration, **recipe)


def test_adaround_is_a_file_that_methods_of_any_activation_bits_start_from(class_pipe, class_calibration, tmp_path):
    path = tmp_path / "model.safetensors"
    arguments = dict(calibration=class_calibration, rows=24)
    start = quest.quantize(class_pipe, "adaround", "w3a32", weight_iterations=6, batch=8, split=False, **arguments)
    quest.save(start, path, floats=True)
    assert all(q.spec.bits == 32 for q in input_quantizers(start.unet).values())
    rounded = {n: m.float_weight for n, m in quant_layers(start.unet)}
    original = dict(class_pipe.unet.named_modules())
    moved = [n for n, w in rounded.items() if not torch.equal(w, original[n].weight)]
    assert len(moved) > 5 and not {"conv_in", "conv_out"} & set(moved)  # 8 bits: nearest in `short`
    loaded = quest.load(class_pipe, path, kernel="reference")
    inputs = class_calibration.inputs(torch.arange(3))
    assert torch.equal(loaded.unet(**inputs).sample, start.unet(**inputs).sample)

    few = FEW | dict(weight_iterations=6, batch=8, split=False)
    here = quest.quantize(class_pipe, "q-diffusion", "w3a8", **arguments, **few)
    there = quest.quantize(class_pipe, "q-diffusion", "w3a8", **arguments, **few, init=str(path))
    states = [q.unet.state_dict() for q in (here, there)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert all(torch.equal(m.float_weight, rounded[n]) for n, m in quant_layers(here.unet))

    with pytest.raises(ValueError, match="w3a32, not w3a8"):
        quest.quantize(class_pipe, "adaround", "w3a8", **arguments)


@pytest.mark.parametrize("kind", q_diffusion.RANGES)
def test_activation_ranges(kind, uncond_pipe, uncond_calibration):
    """Seen at the first convolution, whose input no quantizer has touched, and at the attention's probabilities."""
    denoiser = swap(uncond_pipe, 8, 8, keep={}).unet
    for _, layer in quant_layers(denoiser):
        layer.choose_weight_range(ranges.mse)
    drawn = uncond_calibration
    arguments = dict(samples=8, stored_order=True, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q_diffusion, "BATCH", 8)
        q_diffusion.activation_ranges_of(denoiser, drawn, kind, **arguments)
    batches = drawn.sample[drawn.call.argsort(stable=True)].split(8)
    low, high = (torch.stack([getattr(b, f)() for b in batches]) for f in ("amin", "amax"))
    for i in range(1, len(batches)):
        low[i], high[i] = (0.95 * v[i - 1] + 0.05 * v[i] for v in (low, high))
    scale, zero_point, spec = denoiser.conv_in.input_quantizer.qparams
    expected = {
        "mse": ranges.mse(batches[0], QuantSpec(8))[0],
        "mse-zero-point": ranges.mse_zero_point(batches[0], QuantSpec(8))[0],
        "ema": (high[-1] - low[-1]) / 255,
        "ema-symmetric": torch.maximum(-low[-1], high[-1]) / 127,
    }[kind]
    assert scale == pytest.approx(expected.item(), rel=1e-4)
    assert spec.symmetric == (kind == "ema-symmetric") and (zero_point == 0) == spec.symmetric
    probabilities = [q for n, q in input_quantizers(denoiser).items() if n.endswith("processor.p")]
    assert probabilities and not any(q.spec.symmetric or q.zero_point.any() for q in probabilities)
    assert all(q.scale.isfinite().all() and q.choose is None for q in input_quantizers(denoiser).values())


@pytest.mark.parametrize("method", ["q-diffusion", "ptq4dm"])
def test_quest_s_granularity_and_time_groups(method, uncond_pipe, uncond_calibration, tmp_path):
    """Scales where QuEST has them, and every one of them is learned."""
    few = dict(
        calibration=uncond_calibration, weight_iterations=0, activation_iterations=2, rows=24, batch=4, samples=4
    )
    few |= dict(calibration=uncond_calibration, granularity="released", time_groups=2)
    q = quest.quantize(uncond_pipe, method, "w4a4", **few)
    axes, found = released_axes(q.unet), input_quantizers(q.unet)
    assert {n: quantizer.spec.axis for n, quantizer in found.items()} == axes
    assert {len(quantizer.scale) for quantizer in found.values()} == {2}
    assert found["conv_in.input_quantizer"].scale.shape == (2, 1, 4, 1, 1)
    assert q.unet.stages[-1]["parameters"] == sum(quantizer.scale.numel() for quantizer in found.values())
    quest.save(q, tmp_path / "model.safetensors")
    loaded = quest.load(uncond_pipe, tmp_path / "model.safetensors", kernel="reference")
    inputs = uncond_calibration.inputs(torch.arange(2))
    assert torch.equal(loaded.unet(**inputs).sample, q.unet(**inputs).sample)


def test_a_single_time_group_is_none_at_all(uncond_pipe, uncond_calibration):
    recipe = FEW | dict(calibration=uncond_calibration, weight_iterations=0, activation_iterations=0, rows=12)
    plain, told = (
        quest.quantize(uncond_pipe, "q-diffusion", "w4a4", **recipe, **more)
        for more in ({}, {"time_groups": 1, "granularity": "tensor"})
    )
    states = [q.unet.state_dict() for q in (plain, told)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items()) and not hasattr(told.unet, "time_groups")
    with pytest.raises(
        ValueError, match="activation_ranges: 'ema' is not one of .* with time_groups=2; running ranges"
    ):
        quest.quantize(uncond_pipe, "q-diffusion", "w4a4", **recipe, time_groups=2, activation_ranges="ema")
    with pytest.raises(ValueError, match="time_groups: 4 does not divide the 6 timesteps"):
        quest.quantize(uncond_pipe, "q-diffusion", "w4a4", **recipe, time_groups=4)
    with pytest.raises(ValueError, match="granularity: 'row' is not one of tensor, released"):
        quest.quantize(uncond_pipe, "q-diffusion", "w4a4", **recipe, granularity="row")


@pytest.mark.parametrize(
    "method, recipe, said",
    [
        ("q-diffusion", dict(weight_axis=None), "weight_axis: None is not one of 0 with init='start'; weights of a"),
        ("ptqd-as-released", {}, "init: 'start' does not go with weight_axis=None; weights of a checkpoint come with"),
    ],
)
def test_weights_of_a_checkpoint_keep_the_scales_that_they_have(method, recipe, said, uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match=said):
        quest.quantize(uncond_pipe, method, "w4a4", calibration=uncond_calibration, init="start", **recipe)


def test_the_two_presets():
    full, short = (adaround.PRESETS[p] for p in ("full", "short"))
    assert (full.weight_iterations, full.activation_iterations, full.batch) == (20000, 5000, 32)
    assert (short.weight_iterations, short.activation_iterations, short.batch) == (1000, 250, 16)
    assert adaround.TRAVEL / full.weight_iterations == 1e-3 and full.activation_lr == 4e-4
    travelled = [p.activation_lr * p.activation_iterations for p in (full, short)]
    assert travelled == pytest.approx([2.0, 2.0])
    assert full.nearest_from > 8 >= short.nearest_from


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(preset="quick"), "preset: 'quick' is not one of full, short"),
        (
            dict(activation_ranges="max"),
            "activation_ranges: 'max' is not one of mse-zero-point, mse, ema, ema-symmetric",
        ),
    ],
)
def test_wrong_names(wrong, said, uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match=said):
        quest.quantize(uncond_pipe, "q-diffusion", "w4a8", calibration=uncond_calibration, **wrong)


def test_the_rate_of_the_rounding_is_the_published_travel_unless_a_recipe_sets_it(uncond_pipe, uncond_calibration):
    def codes(**recipe):
        student = adaround.quantize(
            uncond_pipe, uncond_calibration, 4, 32, rows=8, batch=4, weight_iterations=2, **recipe
        )
        return [layer.float_weight for _, layer in quant_layers(student.unet)]

    by_default, same, slow = codes(), codes(weight_lr=10.0), codes(weight_lr=1e-3)
    assert all(map(torch.equal, by_default, same))
    assert not all(map(torch.equal, by_default, slow))
