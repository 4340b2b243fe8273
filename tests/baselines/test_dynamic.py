"""Dynamic activations: what differs from rtn-mse, clip ratios, and keywords that contradict each other."""

import pytest
import torch
from torch import nn

import quest
from quest.affine import FLOAT, QuantSpec, fake_quantize
from quest.learning.clipping import RATIOS, rows_of_each_step, search_clips
from quest.quantization import checkpoint, ranges
from quest.quantization.layers import input_quantizers, quant_layers
from quest.quantization.swapping import make_dynamic, swap


def test_it_differs_from_rtn_mse_in_activations_alone(uncond_pipe, uncond_calibration):
    recipe = dict(dynamic="token", group=16, levels="symmetric")
    own, rtn = (
        quest.quantize(uncond_pipe, method, "w4a4", calibration=uncond_calibration, **recipe)
        for method, recipe in (("dynamic", recipe), ("rtn-mse", dict(samples=4)))
    )
    for name, layer in quant_layers(own.unet):
        assert layer.qweight.equal(rtn.unet.get_submodule(name).qweight)
    specs = {name: q.spec for name, q in input_quantizers(own.unet).items()}
    assert specs["conv_in.input_quantizer"] == QuantSpec(8, True, 1, rows="token", group=16)  # the ends have 8 bits
    others = [q for n, q in specs.items() if not n.startswith(("conv_in", "conv_out")) and not n.endswith(".p")]
    assert {(q.bits, q.symmetric, q.rows, q.group) for q in others} == {(4, True, "token", 16)}
    assert own.unet.quantization["cost"]["activations"] == "dynamic per token in groups of 16"


@torch.no_grad()
def test_images_do_not_depend_on_the_batch(uncond_pipe, uncond_calibration):
    """Each sample's scales are its own, so that predictions for a batch are those for its samples."""
    own = quest.quantize(uncond_pipe, "dynamic", "w8a8", calibration=uncond_calibration, dynamic="tensor")
    rows = torch.tensor([0, 1, 2])  # of one timestep
    whole = own.unet(**uncond_calibration.inputs(rows)).sample
    single = own.unet(**uncond_calibration.inputs(rows[1:2])).sample
    # Sums of floats may differ in the last bit between batches, which can move a value to another code.
    assert (whole[1:2] - single).norm() < 0.02 * single.norm()


def test_searched_clip_ratios_have_the_least_error_of_the_output(uncond_pipe, uncond_calibration):
    student = swap(uncond_pipe, 4, 4).unet
    for _, layer in quant_layers(student):
        layer.choose_weight_range(ranges.mse)
    make_dynamic(student, "token")
    search_clips(student, uncond_calibration, rows=2, seed=0)
    found = {name: q.scale.item() for name, q in input_quantizers(student).items()}
    assert set(found.values()) <= {torch.tensor(ratio).item() for ratio in RATIOS} and len(set(found.values())) > 2
    # The same for one layer, by hand.
    name = "down_blocks.0.resnets.0.conv2"
    layer, inputs = student.get_submodule(name), []
    for q in input_quantizers(student).values():
        q.kept, q.spec = q.spec, QuantSpec(FLOAT)
    handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for rows in rows_of_each_step(uncond_calibration, 2, 0):
        student(**uncond_calibration.inputs(rows))
    handle.remove()
    weight, errors = layer.qweight.dequantize(), []
    for ratio in RATIOS:
        layer.input_quantizer.scale.data.fill_(ratio)
        parameters = layer.input_quantizer.qparams._replace(spec=layer.input_quantizer.kept)
        off = [nn.functional.conv2d(fake_quantize(x, parameters) - x, weight, padding=1) for x in inputs]
        errors.append(sum(y.double().square().sum() for y in off).item())
    assert found[f"{name}.input_quantizer"] == pytest.approx(RATIOS[errors.index(min(errors))])


@pytest.mark.parametrize(
    "method, recipe, said",
    [
        ("dynamic", dict(dynamic="pixel"), "dynamic: 'pixel' is not one of tensor, token"),
        ("dynamic", dict(group=48), "group: 48 is not one of 64, 32, 16"),
        ("smoothquant", dict(group=48), "group: 48 is not one of 64, 32, 16"),
        ("hadamard", dict(clip="searched"), "clip: 'searched' does not go with dynamic=None; clip ratios"),
        (
            "smoothquant",
            dict(dynamic="token", per_step=True),
            "per_step: True is not one of False with dynamic='token'; dynamic scales",
        ),
    ],
)
def test_keywords_without_meaning_are_refused(method, recipe, said, uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match=said):
        quest.quantize(uncond_pipe, method, "w4a4", calibration=uncond_calibration, **recipe)


def test_without_dynamic_activations_there_is_nothing_to_search(uncond_pipe, uncond_calibration):
    student = swap(uncond_pipe, 4, FLOAT).unet
    for _, layer in quant_layers(student):
        layer.choose_weight_range(ranges.mse)
    make_dynamic(student, "token")
    search_clips(student, uncond_calibration, rows=2, seed=0)
    assert not any(q.spec.dynamic for q in input_quantizers(student).values())


def test_static_groups_have_ranges_of_their_own(uncond_pipe, uncond_calibration, tmp_path):
    """Groups of 16 channels of each layer's input, at every step; products keep one scale for a tensor."""
    calls = uncond_calibration.calls()
    calibration = uncond_calibration.subset(calls[[0, -1]].flatten())  # two steps
    own = quest.quantize(uncond_pipe, "dilate", "w8a4", calibration=calibration, group=16, per_step=True, samples=2)
    steps, each = len(calibration.timesteps), 0
    for name, q in input_quantizers(own.unet).items():
        if ".processor." in name:
            assert q.spec.group is None and q.scale.shape == (steps,)
            continue
        layer = own.unet.get_submodule(name.removesuffix(".input_quantizer"))
        assert (q.spec.group, q.spec.axis, q.spec.rows) == (16, layer.channels, None)
        assert q.scale.numel() == steps * -(-layer.weight_shape[1] // 16)
        each += q.scale.numel()
    footprint = own.unet.quantization["cost"]["footprint"]
    assert footprint["static_scale_bits"] == each * (16 + 8) and footprint["scale_bits"] == 0
    quest.save(own, tmp_path / "m")
    loaded = quest.load(uncond_pipe, tmp_path / "m")
    if loaded.unet.placement.kernel == "integer":
        reasons = {why for n, why in loaded.unet.placement.refused.items() if not n.endswith(".processor")}
        assert reasons == {"input: static scales in groups of 16"}
    for name, q in input_quantizers(own.unet).items():
        other = loaded.unet.get_submodule(name)
        assert (other.spec, other.size) == (q.spec, q.size) and torch.equal(other.scale, q.scale)
    header, tensors = checkpoint.read(tmp_path / "m")
    name = "mid_block.resnets.0.conv1.input_quantizer"
    for leaf in ("scale", "zero_point"):
        tensors[f"{name}.{leaf}"] = tensors[f"{name}.{leaf}"][:, :, 1:]
    with pytest.raises(ValueError, match=rf"tensor {name}\..*of no quantizer in the header, or not of its groups"):
        checkpoint.check_tensors(header, tensors, "m")
