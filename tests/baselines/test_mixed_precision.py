"""Mixed precision: its estimate against trying, how bits are spent, and what files and counts say of them."""

from itertools import product

import pytest
import torch

import quest
from baselines.mixed_precision import allocate, sensitivities
from quest.affine import QParams, QuantSpec, fake_quantize, quantize
from quest.kernels.cpu import core
from quest.quantization import checkpoint, cost, header, packing, ranges
from quest.quantization.layers import quant_layers
from quest.quantization.swapping import swap

QUICK = dict(rows=8, samples=4)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_bits_are_spent_as_well_as_by_trying_all_ways(seed):
    """For errors whose falls shrink, where the budget is met exactly; sizes are equal."""
    falls = random(6, 2, seed=seed).abs().sort(1, descending=True).values
    errors = torch.stack([falls.sum(1), falls[:, 1], torch.zeros(6)], 1).double() + 1
    sizes, choices = torch.full((6,), 7), [3, 4, 5]
    bits = allocate(errors, sizes, choices, 4.0)
    assert bits.sum() == 24
    found = errors.gather(1, bits[:, None] - 3).sum()
    every = (sum(errors[i, j] for i, j in enumerate(way)) for way in product(range(3), repeat=6) if sum(way) <= 6)
    assert found.item() == pytest.approx(min(every).item())
    assert found <= errors[:, 1].sum()


def test_budgets_hold_and_equal_bits_are_kept_where_nothing_is_gained():
    errors, sizes = random(40, 3).abs().sort(1, descending=True).values.double(), torch.arange(1, 41)
    for budget in (3.0, 3.3, 4.0, 4.9, 5.0):
        bits = allocate(errors, sizes, [3, 4, 5], budget)
        assert budget - 0.2 < (bits * sizes).sum() / sizes.sum() <= budget + 1e-6
    flat = torch.tensor([[9.0, 3.0, 1.0]]).expand(4, 3)
    assert allocate(flat, torch.ones(4), [3, 4, 5], 4.0).tolist() == [4] * 4
    assert allocate(flat, torch.ones(4), [3, 4, 5], 3.9).tolist() == [4, 4, 4, 3]


def test_the_estimate_is_the_change_of_the_prediction(uncond_pipe, uncond_calibration):
    """Its expectation over signs is what one layer's quantization changes, as far as that is linear."""
    student = swap(uncond_pipe, 4, 8).unet
    name = "mid_block.resnets.0.conv1"
    layers = {name: student.get_submodule(name)}
    rows = torch.arange(len(uncond_calibration))[:40]
    drawn = uncond_calibration.subset(rows)
    estimate = sensitivities(uncond_pipe.unet, layers, [6, 7], drawn, True, 0)[name][0]
    assert not any(p.requires_grad and "mid_block.resnets.0.conv1" not in n for n, p in student.named_parameters())
    weight = layers[name].weight.detach()
    exact = uncond_pipe.unet(**drawn.inputs(torch.arange(len(drawn)))).sample
    teacher, changes = swap(uncond_pipe, 32, 32).unet, []
    for bits in (6, 7):
        spec = QuantSpec(bits, axis=0)
        teacher.get_submodule(name).weight.data = fake_quantize(weight, QParams(*ranges.mse(weight, spec), spec))
        with torch.no_grad():
            changed = teacher(**drawn.inputs(torch.arange(len(drawn)))).sample
        changes.append((changed - exact).square().sum().item() / len(drawn))
    # The mean of 24 squares of a normal variable has a relative standard deviation of 0.29.
    assert estimate.tolist() == pytest.approx(changes, rel=0.8)
    assert 2 < changes[0] / changes[1] < 8 and estimate[0] > 2 * estimate[1]


def test_widths_are_clipped_packed_and_read():
    spec = QuantSpec(5, axis=0, widths="3542")
    weight = random(4, 3, 3, 3)
    scale, zero_point = ranges.of_widths(weight, spec, ranges.mse)
    for i, width in enumerate((3, 5, 4, 2)):
        alone = ranges.mse(weight[i : i + 1], QuantSpec(width, axis=0))
        assert torch.equal(scale[i : i + 1], alone[0]) and torch.equal(zero_point[i : i + 1], alone[1])
    q = quantize(weight * 3, QParams(scale, zero_point, spec))  # much is clipped
    assert q.codes.flatten(1).amax(1).tolist() == [7, 31, 15, 3] and not q.codes.flatten(1).amin(1).any()
    assert torch.equal(fake_quantize(weight * 3, QParams(scale, zero_point, spec)), q.dequantize())
    packed = packing.pack(q.codes, spec)
    assert packed.dtype == torch.uint8 and packed.tolist() and packing.fits(packed, (4, 3, 3, 3), spec)
    assert len(packed) == packing.nbytes((4, 3, 3, 3), spec) == 11 + 17 + 14 + 7  # of 27 codes a channel
    assert torch.equal(packing.unpack(packed, spec, (4, 3, 3, 3)), q.codes)
    assert packing.pack(torch.tensor([[1, 2, 7]]), QuantSpec(3, axis=0, widths="3")).tolist() == [0xD1, 0x01]
    assert (
        spec.mean_bits == 3.5 and spec.granularity == "per channel 0, 2 to 5 bits" and QuantSpec(**spec.fields) == spec
    )
    for wrong in (dict(widths="3444"), dict(widths="19"), dict(axis=1), dict(symmetric=True), dict(group=16)):
        with pytest.raises(ValueError, match="widths"):
            QuantSpec(5, **dict(axis=0, widths="3542") | wrong)


def test_layers_have_bits_of_their_own(uncond_pipe, uncond_calibration):
    recipe = dict(by="layer", budget=3.5, rows=4, samples=2)
    own = quest.quantize(uncond_pipe, "mixed-precision", "w4a8", calibration=uncond_calibration, **recipe)
    mean, mixed = cost.mixed_bits(own.unet)
    widths = {m.weight_quantizer.spec.widths for m in mixed.values()}
    assert 3.2 < mean <= 3.5 and all(len(set(one)) == 1 for one in widths) and len({one[0] for one in widths}) > 1


def test_the_budget_holds_in_the_file_and_in_the_counts(class_pipe, class_calibration, tmp_path, undeclared):
    own = quest.quantize(class_pipe, "mixed-precision", "w4a8", calibration=class_calibration, budget=3.5, **QUICK)
    mean, mixed = cost.mixed_bits(own.unet)
    assert 3.4 < mean <= 3.5 and "conv_in" not in mixed and len(mixed) == len(list(quant_layers(own.unet))) - 2
    widths = {m.weight_quantizer.spec.widths for m in mixed.values()}
    assert set("".join(widths)) <= set("2345") and any(len(set(one)) > 1 for one in widths)
    summary = own.unet.quantization["cost"]
    assert summary["mixed"] == {"layers": len(mixed), "mean_bits": mean} and set(summary["kept"]) == {"w8a8"}
    path = tmp_path / "m"
    quest.save(own, path)
    _, tensors = checkpoint.read(path)
    stored = sum(8 * len(tensors[f"{name}.codes"]) for name in mixed)
    weights = sum(m.weight_quantizer.spec.mean_bits * m.qweight.numel() for m in mixed.values())
    assert weights <= stored < 1.01 * weights  # rows end on whole bytes
    assert summary["footprint"]["weight_scale_bits"] == 3 * sum(m.weight_shape[0] for m in mixed.values())
    loaded = quest.load(class_pipe, path)
    for name, layer in quant_layers(own.unet):
        assert loaded.unet.get_submodule(name).qweight.equal(layer.qweight)
    if core.available():
        assert not loaded.unet.placement.refused  # sums of whole numbers, whatever their bits
    assert undeclared(own.unet, 4, 8, {"conv_in": 8, "conv_out": 8}) == []
    assert undeclared(own.unet, 3, 8, {"conv_in": 8, "conv_out": 8})[0].startswith("bits of each output channel")
    found = header.read(path)
    name = next(iter(mixed))
    digits = found["layers"][name][0]["widths"]
    for change in ({"widths": digits[1:]}, {"widths": digits[:-1] + "9"}, {"widths": ""}, {"bits": 8}, {"axis": None}):
        wrong = found | {
            "layers": found["layers"] | {name: [found["layers"][name][0] | change, found["layers"][name][1]]}
        }
        with pytest.raises(ValueError, match=f"layers.{name}"):
            header.check(wrong, "m")
    quest.save(own, path, floats=True)
    with pytest.raises(ValueError, match="weights"):
        checkpoint.load_weights(swap(class_pipe, 5, 8).unet, path)


def test_a_budget_above_the_bits_of_the_row_is_refused(uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match="budget: 5 is out of bounds; valid: 2 to 4; the name of the cell"):
        quest.quantize(uncond_pipe, "mixed-precision", "w4a8", calibration=uncond_calibration, budget=5)
