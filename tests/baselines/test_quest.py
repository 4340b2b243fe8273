"""QuEST's two stages on a tiny model: what moves, what does not, and that it helps."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel

import quest
from baselines import quest as finetune
from baselines.quest import start_from
from baselines.selection import SELECTIONS, TEMPORAL, globs_of, matches, qkv, selected, shares, tuned_layers
from quest.config import old_names
from quest.diffusion.sampling import arguments
from quest.metrics.noise_prediction import eps_error
from quest.quantization import checkpoint
from quest.quantization.layers import input_quantizers, quant_layers
from quest.quantization.splitting import concatenation_splits
from quest.quantization.swapping import released_axes, swap

FAST = dict(time_groups=3, batch=4, samples=8)


def run(pipe, calibration, tla, cma, **recipe):
    iterations = dict(tla_iterations=tla, cma_iterations=cma)
    return quest.quantize(pipe, "quest-suite", "w4a4", calibration=calibration, **iterations, **(FAST | recipe))


def moved(a, b):
    """Names of tensors that differ between two pipelines' denoisers."""
    b = checkpoint.state(b.unet, floats=True)
    return {k for k, v in checkpoint.state(a.unet, floats=True).items() if not torch.equal(v, b[k])}


@pytest.mark.parametrize("kind, selection", [("uncond", "lsun"), ("class", "imagenet"), ("text", "sd")])
def test_each_stage_moves_its_own_parameters_and_nothing_else(kind, selection, request):
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    start, first, both = (run(pipe, calibration, tla, cma) for tla, cma in ((0, 0), (3, 0), (3, 3)))
    layers = [n for n, _ in quant_layers(start.unet)]
    temporal = {n for n in layers if matches(n, TEMPORAL)}
    critical = {n for n in layers if matches(n, SELECTIONS[selection])}
    assert temporal and critical and not temporal & critical

    changed = moved(start, first)
    allowed = {f"{n}.{p}" for n in temporal for p in ("weight", "bias", "input_quantizer.scale")}
    assert changed <= allowed and {f"{n}.weight" for n in temporal} <= changed
    assert {f"{n}.input_quantizer.scale" for n in temporal} <= changed

    changed = moved(first, both)
    scales = {k for k in start.unet.state_dict() if k.endswith("scale") and "weight_quantizer" not in k}
    scales -= {f"{n}.input_quantizer.scale" for n in temporal}
    allowed = {f"{n}.{p}" for n in critical for p in ("weight", "bias")} | scales
    assert changed <= allowed and {f"{n}.weight" for n in critical} <= changed
    # A group out of three is visited in each of the three iterations: every remaining scale has moved.
    assert scales <= changed


def test_finetuning_lowers_the_error_of_the_noise_prediction(class_pipe, class_model, class_calibration):
    from quest.diffusion.calibration_set import collect

    held_out = collect(class_pipe, class_model, "validation", 4)
    recipe = dict(FAST, batch=8)
    before = quest.quantize(
        class_pipe, "quest-suite", "w4a4", calibration=class_calibration, tla_iterations=0, cma_iterations=0, **recipe
    )
    after = quest.quantize(
        class_pipe, "quest-suite", "w4a4", calibration=class_calibration, tla_iterations=15, cma_iterations=45, **recipe
    )
    a, b = (eps_error(q, held_out)[0].mean() for q in (before, after))
    assert b < 0.9 * a, (a, b)


def test_weight_scales_and_zero_points_stay(uncond_pipe, uncond_calibration):
    a = quest.quantize(
        uncond_pipe, "quest-suite", "w4a4", calibration=uncond_calibration, tla_iterations=0, cma_iterations=0, **FAST
    )
    b = quest.quantize(
        uncond_pipe, "quest-suite", "w4a4", calibration=uncond_calibration, tla_iterations=3, cma_iterations=3, **FAST
    )
    assert not {k for k in moved(a, b) if "zero_point" in k or "weight_quantizer" in k}


def test_divergence_names_stage_and_iteration(uncond_pipe, uncond_calibration):
    with pytest.raises(FloatingPointError, match="temporal layer alignment, iteration 1: the loss is (nan|inf)"):
        quest.quantize(
            uncond_pipe,
            "quest-suite",
            "w4a4",
            calibration=uncond_calibration,
            tla_iterations=3,
            lr_weight=1e30,
            **FAST,
        )


@pytest.mark.parametrize(
    "recipe, said",
    [
        (dict(selection="ldm"), "selection.*lsun, imagenet, sd"),
        (dict(time_groups=4), "time_groups.*valid: "),
        (dict(keep={"*": 32}), "keep: all activations stay in float, and QuEST tunes their scales; valid: "),
        (dict(groups_per_step=3, batch=16), "batch: 16 is no multiple of 3 with groups_per_step=3; time groups share"),
        (
            dict(groups_per_step=2, schedule="sequential"),
            "schedule: 'sequential' is not one of interleaved with groups_per_step=2",
        ),
        (
            dict(dynamic="token", granularity="released"),
            "granularity: 'released' is not one of tensor with dynamic='token'; only static ranges",
        ),
    ],
)
def test_bad_recipes(recipe, said, uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match=said):
        quest.quantize(uncond_pipe, "quest-suite", "w4a4", calibration=uncond_calibration, **recipe)


def test_a_stage_whose_inputs_all_stay_in_float_tunes_weights_alone(uncond_pipe, uncond_calibration):
    keep = {"*.time_emb_proj": [4, 32]}
    start, end = (run(uncond_pipe, uncond_calibration, tla, 0, keep=keep) for tla in (0, 2))
    changed, layers = moved(start, end), dict(quant_layers(end.unet))
    temporal = {n for n in layers if matches(n, TEMPORAL)}
    assert {f"{n}.weight" for n in temporal} <= changed <= {f"{n}.{p}" for n in temporal for p in ("weight", "bias")}
    learned = sum(p.numel() for n in temporal for p in (layers[n].float_weight, layers[n].bias))
    assert [stage["parameters"] for stage in end.unet.stages] == [learned]


def test_the_old_name_quantizes_the_same(uncond_pipe, uncond_calibration, capsys):
    """And the checkpoint has the present name; one line says so, once."""
    old_names._notice.cache_clear()
    recipe = dict(tla_iterations=1, cma_iterations=1) | FAST
    new, old, again = (
        quest.quantize(uncond_pipe, name, "w4a4", calibration=uncond_calibration, **recipe)
        for name in ("quest-suite", "quest", "quest")
    )
    assert old.unet.quantization["method"] == "quest-suite"
    exact = new.unet.state_dict()
    assert all(torch.equal(value, exact[name]) for name, value in old.unet.state_dict().items())
    assert capsys.readouterr().err.count("quest: the method is called quest-suite now; write the new name\n") == 1


def recipe_of(pipe, calibration, bits, monkeypatch, method="quest-suite", **recipe):
    """The stages and switches that `quantize` hands to `align`, without finetuning; and the pipeline."""
    seen = []
    monkeypatch.setattr(finetune, "align", lambda _d, stage, *_a, **switches: seen.append((stage, switches)))
    monkeypatch.setattr(finetune, "teacher_outputs", lambda _t, names, _c: seen.append(names))
    q = quest.quantize(pipe, method, bits, calibration=calibration, **(dict(samples=8) | recipe))
    return q, seen[0], [stage for stage, _ in seen[1:]], seen[1][1]


def test_the_control_tunes_as_many_weights_of_other_layers(class_pipe, class_calibration, monkeypatch):
    def first_and_second(**recipe):
        _, _, (tla, cma), _ = recipe_of(class_pipe, class_calibration, "w4a8", monkeypatch, time_groups=2, **recipe)
        return tla, cma

    (temporal, critical), (control, unchanged) = first_and_second(), first_and_second(control=True)
    sizes = [sum(layer.weight.numel() for layer in stage.layers.values()) for stage in (temporal, control)]
    assert 0.8 * sizes[0] < sizes[1] <= sizes[0]
    assert not control.layers.keys() & {*temporal.layers, *critical.layers, "conv_in", "conv_out"}
    assert list(control.local) == list(control.layers) and unchanged.layers.keys() == critical.layers.keys()
    assert {q.name for q in control.scales} == set(control.layers)
    assert {q.name for q in temporal.scales} <= {q.name for q in unchanged.scales}  # tuned with all the rest instead
    assert first_and_second(control=True)[0].layers.keys() == control.layers.keys()
    assert first_and_second(control=True, seed=1)[0].layers.keys() != control.layers.keys()


def test_the_control_draws_layers_that_the_teacher_has(class_pipe, class_calibration):
    """None of the halves of a split shortcut, which are as small as what is drawn."""
    splits = concatenation_splits(class_pipe.unet, class_calibration.inputs(torch.arange(2)))
    denoiser, drawn = swap(class_pipe, 4, 8, splits=splits).unet, set()
    for seed in range(20):
        (layers, _), _ = selected(denoiser, "imagenet", "scales", seed)
        drawn |= layers.keys()
    assert splits and drawn <= {name for name, _ in class_pipe.unet.named_modules()}


def test_defaults_presets_and_orders(class_pipe, class_calibration, monkeypatch):
    def stages(**recipe):
        return recipe_of(class_pipe, class_calibration, "w4a8", monkeypatch, time_groups=2, **recipe)

    _, names, (tla, cma), switches = stages()
    assert names == [*tla.layers, *cma.layers] and switches["log_scales"] and switches["cosine"]
    assert (tla.iterations, cma.iterations, tla.batch, cma.batch) == (100, 200, 16, 16)
    assert tla.lr_weight == cma.lr_weight == pytest.approx(1e-3) and tla.lr_scale == pytest.approx(1e-2)
    assert (tla.global_weight, cma.global_weight) == (len(tla.layers), len(cma.layers))
    assert tla.visit is None and cma.visit is None

    _, _, (first, second), _ = stages(order="cma-tla", preset="full", local_tla=False, lr_temporal_scale=1e-5)
    assert (first.name, first.iterations, second.iterations) == ("critical module alignment", 6400, 24000)
    assert (first.lr_scale, second.lr_scale, second.lr_weight) == (1e-4, 1e-5, 1e-5)
    assert first.local == tuple(first.layers) and second.local == ()

    _, names, (both,), _ = stages(order="joint", preset="tenth", global_weight=1.0, local_cma=False, batch=3)
    assert both.name == "joint alignment" and both.global_weight == 2 and both.iterations == 2400 + 640
    assert set(both.layers) == {*tla.layers, *cma.layers} and both.local == tuple(tla.layers) == tuple(names)
    assert len(both.scales) == len(tla.scales) + len(cma.scales) and both.batch == 3

    _, _, (only,), _ = stages(cma_iterations=0)
    assert only.name == "temporal layer alignment"


@pytest.mark.parametrize("choice, tuned, moved", [("scales", 0, 2), ("tuned", 2, 0), ("frozen", 0, 0)])
def test_the_time_embedding_itself(choice, tuned, moved, uncond_pipe, uncond_calibration, monkeypatch):
    q, _, (tla, cma), _ = recipe_of(
        uncond_pipe, uncond_calibration, "w4a8", monkeypatch, time_groups=1, time_embedding=choice
    )
    own = [q.unet.time_embedding.linear_1, q.unet.time_embedding.linear_2]
    assert sum(layer is m for layer in tla.layers.values() for m in own) == tuned
    assert sum(s is m.input_quantizer for s in cma.scales for m in own) == moved
    assert sum(s is m.input_quantizer for s in tla.scales for m in own) == tuned


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
@pytest.mark.parametrize("bits", ["w4a8", "w4a4"])
def test_the_released_recipe(kind, bits, request, monkeypatch):
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    q, _, (tla, cma), switches = recipe_of(pipe, calibration, bits, monkeypatch, method="quest-official", time_groups=3)
    layers = dict(quant_layers(q.unet))
    for name in ("conv_in", "conv_out"):
        assert (layers[name].weight_quantizer.spec.bits, layers[name].input_quantizer.spec.bits) == (4, 8)
    for name, quantizer in input_quantizers(q.unet).items():
        assert quantizer.spec.symmetric == (kind != "text" and not name.endswith("processor.p")), name
        assert (quantizer.spec.axis is None) == (bits == "w4a8")
    # A local loss for the temporal stage, and for the critical one of Stable Diffusion.
    assert tla.local == tuple(tla.layers) and cma.local == (tuple(cma.layers) if kind == "text" else ())
    # The global loss is summed over the layers of CompVis, where an unconditional attention has one for q, k and v.
    assert tla.global_weight == len(tla.layers)
    assert cma.global_weight == (len(cma.layers) // 3 if kind == "uncond" else len(cma.layers))
    assert (tla.visit, cma.visit) == ((None, 8), (16, 64)) and (tla.batch, cma.batch) == (2, 4)
    assert tla.lr_scale == pytest.approx(1e-4) and cma.lr_scale == pytest.approx(1e-3)  # ten times the published
    assert switches["log_scales"] is False and switches["cosine"] is False
    assert len(q.unet.time_groups) == 3


def test_the_paper_s_recipe(class_pipe, class_calibration, monkeypatch):
    q, _, (tla, cma), _ = recipe_of(class_pipe, class_calibration, "w4a4", monkeypatch, method="quest-paper")
    assert all(len(s.scale) == 1 for s in input_quantizers(q.unet).values())  # a single set for all timesteps
    assert tla.global_weight == cma.global_weight == 1 and tla.local and cma.local
    assert tla.lr_weight == pytest.approx(1e-4) and tla.lr_scale == pytest.approx(1e-3)


def test_scales_along_an_axis_of_the_released_code(uncond_pipe, class_pipe):
    axes = released_axes(swap(uncond_pipe, 4, 4).unet)
    attention = "down_blocks.0.attentions.0"
    assert axes["conv_in.input_quantizer"] == 1 and axes["time_embedding.linear_1.input_quantizer"] == -1
    # CompVis has tokens last in an unconditional attention, and so a scale for each.
    assert all(axes[f"{attention}.{n}"] == 1 for n in ("to_q.input_quantizer", "processor.q", "processor.v"))
    assert axes[f"{attention}.to_out.0.input_quantizer"] == 1 and axes[f"{attention}.processor.p"] == -1
    axes = released_axes(swap(class_pipe, 4, 4).unet)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert {axes[f"{block}.{n}"] for n in ("attn1.to_q.input_quantizer", "attn2.processor.k", "attn1.processor.p")} == {
        -1
    }
    assert axes["down_blocks.0.attentions.0.proj_in.input_quantizer"] == 1


@pytest.mark.parametrize("kind", ["uncond", "class"])
def test_released_granularity_trains_and_survives_saving(kind, request, tmp_path):
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    model = request.getfixturevalue(f"{kind}_model")
    recipe = dict(
        time_groups=3, samples=8, tla_iterations=3, cma_iterations=3, levels="wide" if kind == "class" else "released"
    )
    q = quest.quantize(pipe, "quest-official", "w4a4", calibration=calibration, **recipe)
    quantizers = input_quantizers(q.unet)
    assert all(s.scale.isfinite().all() and (s.scale > 0).all() for s in quantizers.values())
    assert quantizers["conv_in.input_quantizer"].scale.shape == (3, 1, 4, 1, 1)
    for name, first in qkv(q.unet).items():  # one input quantizer while finetuning, three equal ones in the file
        a, b = (quantizers[f"{n}.input_quantizer"] for n in (name, first))
        assert a is not b and torch.equal(a.scale, b.scale) and a.scale.shape[2] > 1
    assert (kind == "uncond") == bool(qkv(q.unet))
    quest.save(q, tmp_path / "m.safetensors")
    loaded = quest.load(pipe, tmp_path / "m.safetensors", kernel="reference")
    for name, quantizer in input_quantizers(loaded.unet).items():
        assert quantizer.spec == quantizers[name].spec
    a, b = (p(**arguments(p, model, "evaluation", [0, 1]), output_type="latent").images for p in (q, loaded))
    assert torch.equal(a, b)


def test_ends_of_fewer_bits_than_the_checkpoint_has(uncond_pipe, uncond_calibration, tmp_path):
    rtn = quest.quantize(uncond_pipe, "rtn", "w4a8", calibration=uncond_calibration, samples=8)
    quest.save(rtn, tmp_path / "m.safetensors", floats=True)
    q = swap(uncond_pipe, 4, 4, keep={"conv_in": [2, 8]})
    start_from(q.unet, tmp_path / "m.safetensors", {"conv_in": [2, 8], "conv_out": [2, 8]})
    for name, layer in quant_layers(q.unet):
        assert layer.weight_quantizer.spec.bits == 4
        other = rtn.unet.get_submodule(name)
        assert torch.equal(layer.weight, other.float_weight)
        same = torch.equal(layer.weight_quantizer.scale, other.weight_quantizer.scale)
        assert same == (name not in ("conv_in", "conv_out"))
    ends = swap(uncond_pipe, 4, 4, keep={}).unet
    start_from(ends, tmp_path / "m.safetensors", {})
    assert ends.conv_out.weight_quantizer.spec.bits == 4 and ends.conv_out.weight_quantizer.scale.isfinite().all()
    with pytest.raises(ValueError, match="4-bit weights, not 3"):
        start_from(swap(uncond_pipe, 3, 4).unet, tmp_path / "m.safetensors", {"conv_in": 8, "conv_out": 8})


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("preset", "fast", "short, tenth, full"),
        ("granularity", "channel", "tensor, released"),
        ("levels", "signed", "asymmetric, symmetric, wide, released"),
        ("ranges", "max", "mse-zero-point, mse, minmax, percentile, running, released"),
        ("time_embedding", True, "scales, tuned, frozen"),
        ("local_cma", "sd", "True, False, released"),
        ("order", "tla", "tla-cma, cma-tla, joint"),
        ("schedule", "random", "interleaved, sequential, released"),
    ],
)
def test_unknown_values_of_switches(key, value, said, uncond_pipe, uncond_calibration):
    with pytest.raises(ValueError, match=f"{key}: .* is not one of {said}"):
        quest.quantize(uncond_pipe, "quest-suite", "w4a4", calibration=uncond_calibration, **{key: value})
    with pytest.raises(ValueError, match="w4a32: QuEST tunes the scales of activations"):
        quest.quantize(uncond_pipe, "quest-suite", "w4a32", calibration=uncond_calibration)


LSUN = dict(layers_per_block=2, attention_head_dim=32)
ATTENTION = ("AttnDownBlock2D", "AttnUpBlock2D")
CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
# The denoisers of the paper: kind, channels, blocks with attention, those without, and (selection, parameters in
# millions: all, temporal, critical; layers in CompVis: temporal, critical), of the released code.
PUBLISHED_MODELS = {
    "LSUN-Bedrooms": (UNet2DModel, 3, (224, 448, 672, 896), (0, 1, 1, 1), LSUN, ("lsun", 274.06, 11.65, 24.27, 22, 16)),
    "LSUN-Churches": (
        UNet2DModel,
        4,
        (192, 384, 384, 768, 768),
        (1, 1, 1, 1, 0),
        LSUN
        | dict(
            attn_norm_num_groups=32,
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        ),
        ("lsun", 294.97, 27.76, 15.62, 35, 21),
    ),
    "ImageNet": (
        UNet2DConditionModel,
        3,
        (192, 384, 576, 960),
        (0, 1, 1, 1),
        dict(cross_attention_dim=512, attention_head_dim=1),
        ("imagenet", 400.92, 9.60, 126.9, 22, 96),
    ),
    "Stable Diffusion": (
        UNet2DConditionModel,
        4,
        (320, 640, 1280, 1280),
        (1, 1, 1, 0),
        dict(cross_attention_dim=768, attention_head_dim=8),
        ("sd", 859.52, 25.82, 148.8, 22, 32),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED_MODELS)
def test_what_the_released_code_tunes_of_the_published_models(name):
    """Trained parameters and the layers that L_G is summed over, of the real architectures without their weights."""
    kind, latent, channels, attention, config, (selection, *published) = PUBLISHED_MODELS[name]
    plain = ("DownBlock2D", "ResnetUpsampleBlock2D" if "upsample_type" in config else "UpBlock2D")
    down, up = CROSS if kind is UNet2DConditionModel else ATTENTION
    with torch.device("meta"):
        denoiser = kind(
            in_channels=latent,
            out_channels=latent,
            block_out_channels=channels,
            down_block_types=[down if a else plain[0] for a in attention],
            up_block_types=[up if a else plain[1] for a in reversed(attention)],
            **config,
        )
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    temporal, critical = (
        {n: m for n, m in layers.items() if matches(n, globs)} for globs in (TEMPORAL, SELECTIONS[selection])
    )

    def millions(modules):
        return sum(p.numel() for m in modules for p in m.parameters()) / 1e6

    found = [millions([denoiser]), millions(temporal.values()), millions(critical.values())]
    assert found == [pytest.approx(p, abs=0.006 if p < 100 or p == published[0] else 0.06) for p in published[:3]]
    assert [tuned_layers(denoiser, tuned, True) for tuned in (temporal, critical)] == published[3:]
    if selection == "lsun":
        assert tuned_layers(denoiser, critical, False) == 3 * published[4]


def test_shares_of_weights_are_those_of_the_layers_that_each_stage_tunes(class_pipe):
    parameters = dict(class_pipe.unet.named_parameters())
    whole = sum(p.numel() for p in parameters.values())
    found = shares(class_pipe.unet, "imagenet")
    for stage, globs in (("temporal", TEMPORAL), ("critical", globs_of("imagenet"))):
        size = sum(p.numel() for n, p in parameters.items() if matches(n.rpartition(".")[0], globs))
        assert 0 < found[stage] == pytest.approx(size / whole)
    assert found["both"] == pytest.approx(found["temporal"] + found["critical"])
