"""Kinds of blocks that this project's U-Nets lack: computed as their modules compute them, in one call or not."""

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from operands import needs_core
from torch import nn

from quest.affine import QuantSpec
from quest.kernels.cpu import blocks
from quest.quantization.attention import QuantAttention
from quest.quantization.layers import QuantLayer, name_quantizers, quantized, replace

pytestmark = needs_core


@pytest.fixture(autouse=True)
def no_grad(isa):
    with torch.no_grad():
        yield


def on_integers(module: nn.Module, group: int | None = None) -> nn.Module:
    """The module at W4A8 on the integer kernel. group: channels that share a scale of a linear weight."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    root = nn.Module()
    root.m = module.requires_grad_(False).eval()
    for name, layer in list(root.named_modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            spec = QuantSpec(4, axis=0, group=group if isinstance(layer, nn.Linear) else None)
            replace(root, name, quantized(layer, spec, QuantSpec(8), None))
        if hasattr(layer, "set_processor"):
            layer.set_processor(QuantAttention(QuantSpec(8), QuantSpec(8), None))
    name_quantizers(root)
    for name, part in root.named_modules():
        if isinstance(part, QuantLayer):
            part.choose_weight_range()
        if hasattr(part, "zero_point") and part.spec.axis is None:
            of_probabilities = name.endswith("processor.p")
            part.scale.data.fill_(1 / 255 if of_probabilities else 0.04)
            part.zero_point.fill_(0 if of_probabilities else 120)
    for part in root.modules():
        if isinstance(part, QuantLayer):
            part.freeze("integer")
        elif isinstance(part, QuantAttention):
            part.kernel_name = "integer"
    blocks.fuse(root)
    return module.requires_grad_(False)


def one_by_one(module: nn.Module, *inputs) -> torch.Tensor:
    """What the modules give one by one, because each has a hook. With one, a gated layer leaves its gelu to torch."""
    gated = [part.proj for part in module.modules() if isinstance(part, GEGLU)]
    parts = [part for part in module.modules() if isinstance(part, QuantLayer | QuantAttention) and part not in gated]
    handles = [part.register_forward_hook(lambda *_: None) for part in parts]
    found = module(*inputs)
    for handle in handles:
        handle.remove()
    return found


def transformer(**given) -> Transformer2DModel:
    given = dict(num_attention_heads=2, attention_head_dim=16, in_channels=32, norm_num_groups=4) | given
    return Transformer2DModel(cross_attention_dim=24, **given)


GENERATOR = torch.Generator().manual_seed(1)
INPUTS = torch.randn(2, 32, 4, 5, generator=GENERATOR), torch.randn(2, 3, 24, generator=GENERATOR)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("given", [{}, {"attention_head_dim": 20}, {"num_layers": 2}, {"in_channels": 16}])
def test_transformers(linear, group, given):
    module = on_integers(transformer(use_linear_projection=linear, **given), group)
    inputs = INPUTS[0][:, : module.in_channels], INPUTS[1]
    first = module(*inputs).sample
    in_one_call = len(module.transformer_blocks) == 1 and not (linear and group)
    assert bool(vars(module)["one_call"]) == in_one_call
    assert torch.equal(first, one_by_one(module, *inputs).sample)
    assert torch.equal(first, module(*inputs, return_dict=False)[0])


@pytest.mark.parametrize("name", ["norm_q", "norm_k", "group_norm"])
def test_norms_inside_an_attention(name):
    module = on_integers(transformer())
    before = module(*INPUTS).sample
    norm = nn.GroupNorm(2, 32) if name == "group_norm" else nn.LayerNorm(16)
    norm.weight.fill_(3.0)
    setattr(module.transformer_blocks[0].attn1, name, norm)
    after = module(*INPUTS).sample
    assert not torch.equal(before, after) and torch.equal(after, one_by_one(module, *INPUTS).sample)


@pytest.mark.parametrize("given", [{}, {"out_channels": 32}, {"out_channels": 48}, {"conv_2d_out_channels": 48}])
def test_residual_blocks(given):
    module = on_integers(ResnetBlock2D(in_channels=32, temb_channels=8, groups=4, **given))
    inputs = INPUTS[0], torch.randn(2, 8)
    assert torch.equal(module(*inputs), one_by_one(module, *inputs))


def test_a_linear_shortcut_computes_rows_of_pixels():
    module = ResnetBlock2D(in_channels=32, temb_channels=None, groups=4)
    module.conv_shortcut = nn.Linear(5, 5)
    module = on_integers(module)
    assert torch.equal(module(INPUTS[0], None), one_by_one(module, INPUTS[0], None))


def test_images_without_pixels_are_refused():
    for module, more in (
        (transformer(), INPUTS[1]),
        (ResnetBlock2D(in_channels=32, temb_channels=8, groups=4), torch.randn(2, 8)),
    ):
        with pytest.raises(ValueError, match="with pixels"):
            on_integers(module)(INPUTS[0][:, :, :0], more)
