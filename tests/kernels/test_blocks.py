"""Fused float operations against diffusers' own modules."""

import copy
import gc
import weakref

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from operands import needs_core
from torch import nn

import quest
from quest.kernels.cpu import blocks
from quest.quantization.attention import QuantAttention
from quest.quantization.layers import QuantLayer
from quest.quantization.placement import place
from quest.quantization.swapping import swap

pytestmark = needs_core


@pytest.fixture(autouse=True)
def no_grad(isa):
    with torch.no_grad():
        yield


def assert_same(fused: nn.Module, *inputs, within: float = 2e-6):
    """The fused form against the module itself in double precision."""
    plain = copy.deepcopy(fused).double()
    blocks.unfuse(plain)
    expected = plain(*(x.double() for x in inputs))
    y = fused(*inputs)
    assert y.shape == expected.shape and (y - expected).abs().max() < within * expected.abs().max()


def scrambled(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    blocks.fuse(module)
    return module


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "contiguous": lambda x: x,
    "channels of more": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]],
    "rows of more": lambda x: torch.cat([x, x], 3).contiguous(memory_format=torch.channels_last)[..., : x.shape[3]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels, groups, size", [(48, 8, (8, 8)), (20, 4, (5, 3)), (96, 1, (1, 1)), (6, 6, (7, 2))])
def test_group_norm(layout, channels, groups, size):
    norm = scrambled(nn.GroupNorm(groups, channels))
    x = LAYOUTS[layout](torch.randn(3, channels, *size) * 3 + 20)
    assert type(norm) is blocks.FusedGroupNorm
    assert_same(norm, x)
    rows = x.flatten(2)
    assert_same(norm, rows)
    assert_same(norm, rows.transpose(1, 2).contiguous().transpose(1, 2))
    assert_same(scrambled(nn.GroupNorm(groups, channels, affine=False)), x)


@pytest.mark.parametrize("n", [3, 7, 48, 97])
def test_layer_norm(n):
    x = torch.randn(5, 3, n) * 2 + 1
    assert_same(scrambled(nn.LayerNorm(n)), x)
    assert_same(scrambled(nn.LayerNorm(n, elementwise_affine=False)), x)
    assert_same(scrambled(nn.LayerNorm(n)), x.transpose(0, 1))


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
@pytest.mark.parametrize("resample", [{}, {"up": True}, {"down": True}, {"temb_channels": None}])
def test_resnet_block(kind, resample):
    given = dict(in_channels=16, out_channels=24, temb_channels=12, groups=4, time_embedding_norm=kind) | resample
    if resample.get("temb_channels", 1) is None and kind == "scale_shift":
        pytest.skip("diffusers asks for an embedding")
    block = scrambled(ResnetBlock2D(**given))
    assert type(block) is blocks.FusedResnetBlock
    temb = None if block.time_emb_proj is None else torch.randn(2, 12)
    for layout in LAYOUTS.values():
        x = layout(torch.randn(2, 16, 6, 4))
        plain = copy.deepcopy(block).double()
        blocks.unfuse(plain)
        expected = plain(x.double(), None if temb is None else temb.double())
        assert (block(x, temb) - expected).abs().max() < 3e-6 * expected.abs().max()


def test_upsample_keeps_the_layout_of_large_batches():
    block = scrambled(Upsample2D(8, use_conv=True))
    x = torch.randn(65, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    seen = []
    block.conv.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    assert_same(block, x)
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)


@pytest.fixture(scope="module", params=["uncond", "class", "text"])
def with_time_groups(request):
    pipe, calibration = (request.getfixturevalue(f"{request.param}_{what}") for what in ("pipe", "calibration"))
    recipe = dict(time_groups=3, tla_iterations=0, cma_iterations=0, samples=8)
    return quest.quantize(pipe, "quest-suite", "w4a8", calibration=calibration, **recipe).unet, calibration


@pytest.fixture
def on_integers(with_time_groups):
    """A denoiser with three time groups on the integer kernel, and its calibration set."""
    denoiser, calibration = with_time_groups
    denoiser = copy.deepcopy(denoiser)
    assert place(denoiser, "integer").refused == {}
    return denoiser, calibration


def test_blocks_in_one_call(on_integers, threads):
    """To the bit what their modules give, which compute where one of them has a hook; in every time group."""
    denoiser, calibration = on_integers
    blocks_of = [m for m in denoiser.modules() if isinstance(m, ResnetBlock2D | Attention)]
    # With a hook, a gated layer leaves its gelu to torch, whose last bits differ: now and then another code is next.
    gated = [m.proj for m in denoiser.modules() if isinstance(m, GEGLU)]
    found = []
    for hooks in (False, True, False):
        seen = []
        parts = [m for m in denoiser.modules() if hooks and isinstance(m, QuantLayer | QuantAttention)]
        parts = [m for m in parts if m not in gated]
        handles = [m.register_forward_hook(lambda m, *_, seen=seen: seen.append(m)) for m in parts]
        found.append([])
        for timestep in calibration.timesteps:
            inputs = calibration.inputs(calibration.timestep == timestep)
            found[-1].append(denoiser(**inputs).sample)
        assert set(seen) == set(parts) and bool(handles) == hooks
        for handle in handles:
            handle.remove()
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))
    known = [vars(m).get("one_call") for m in blocks_of]
    assert sum(bool(block) and len(block.structs) == 3 for block in known) > 3


def test_blocks_in_one_call_are_freed(with_time_groups):
    denoiser, calibration = with_time_groups
    denoiser = copy.deepcopy(denoiser)
    place(denoiser, "integer")
    denoiser(**calibration.inputs(calibration.timestep == calibration.timesteps[0]))
    gone = weakref.ref(denoiser.mid_block.resnets[0].conv1.operand)
    del denoiser
    gc.collect()
    assert gone() is None


def test_blocks_ask_anew_after_placing(on_integers):
    denoiser, calibration = on_integers
    inputs = calibration.inputs(calibration.timestep == calibration.timesteps[0])
    first = denoiser(**inputs).sample
    layer = denoiser.mid_block.resnets[0].conv1
    place(denoiser, "reference")
    layer.thaw()
    layer.weight.data.mul_(2)
    layer.choose_weight_range()
    place(denoiser, "integer")
    second = denoiser(**inputs).sample
    assert not torch.equal(first, second)
    assert torch.equal(copy.deepcopy(denoiser)(**inputs).sample, second)


def test_not_a_number_in_a_block(on_integers):
    denoiser, calibration = on_integers
    inputs = calibration.inputs(calibration.timestep == calibration.timesteps[0])
    bias = denoiser.mid_block.resnets[0].norm1.bias.data
    before = bias[0].item()
    bias[0] = torch.nan
    with pytest.raises(ValueError, match="residual block: the input holds NaN"):
        denoiser(**inputs)
    bias[0] = before
    for gated in (m for m in denoiser.modules() if isinstance(m, GEGLU)):
        gated.proj.bias.data[-1] = torch.nan
        with pytest.raises(ValueError, match="transformer: the input holds NaN"):
            denoiser(**inputs)
        gated.proj.bias.data[-1] = 0.0
    denoiser(**inputs)


def test_gated_linear_that_is_not_quantized_stays_itself():
    assert_same(scrambled(GEGLU(12, 20)), torch.randn(3, 4, 12))


def test_gradients_take_the_plain_way():
    norm = scrambled(nn.GroupNorm(2, 8))
    with torch.enable_grad():
        x = torch.randn(2, 8, 3, 3, requires_grad=True)
        (gradient,) = torch.autograd.grad(norm(x).square().sum(), x)
        blocks.unfuse(norm)
        (expected,) = torch.autograd.grad(norm(x).square().sum(), x)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
def test_whole_float_denoisers(kind, request):
    """Fused and plain blocks around the same layers: quantized ones whose specs are float."""
    pipe, calibration = request.getfixturevalue(f"{kind}_pipe"), request.getfixturevalue(f"{kind}_calibration")
    denoiser = swap(pipe, 32, 32, softmax_bits=32).unet
    inputs = calibration.inputs(torch.arange(4))
    expected = denoiser(**inputs).sample
    blocks.fuse(denoiser)
    kinds = {type(m) for m in denoiser.modules()} & set(blocks.FUSED.values())
    assert len(kinds) >= 2 and not {type(m) for m in denoiser.modules()} & set(blocks.FUSED)
    y = denoiser(**inputs).sample
    assert (y - expected).abs().max() < 1e-5 * expected.abs().max()
    blocks.unfuse(denoiser)
    assert torch.equal(denoiser(**inputs).sample, expected)
