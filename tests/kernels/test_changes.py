"""Blocks that the core computes in one call, between two of which somebody changes a part of them."""

import copy
import gc

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from operands import needs_core
from torch import nn

import quest
from quest.kernels.cpu import fused
from quest.quantization.attention import QuantAttention
from quest.quantization.placement import place

pytestmark = needs_core


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def with_time_groups(text_pipe, text_calibration):
    recipe = dict(time_groups=3, tla_iterations=0, cma_iterations=0, samples=8)
    return quest.quantize(text_pipe, "quest-suite", "w4a8", calibration=text_calibration, **recipe).unet


@pytest.fixture
def on_integers(with_time_groups, text_calibration):
    """A denoiser with three time groups on the integer kernel, and inputs of the noisiest timestep."""
    denoiser = copy.deepcopy(with_time_groups)
    assert place(denoiser, "integer").refused == {}
    noisiest = (text_calibration.timestep == text_calibration.timesteps[0]).nonzero().flatten()
    return denoiser, text_calibration.inputs(noisiest[:2])


def on_modules(denoiser: nn.Module, inputs: dict) -> torch.Tensor:
    """What a denoiser gives whose blocks have forgotten all they knew, as one that was made just now."""
    fused.forget(denoiser)
    return denoiser(**inputs).sample


class Adapter(nn.Module):
    """A layer with a trained update beside it, as LoRA puts one around a layer; the rest of it is the layer's."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.layer, name)

    def forward(self, x, *args, **kwargs):
        y = self.layer(x, *args, **kwargs)
        return y + 0.1 * y.roll(1, 1)


class Doubled(QuantAttention):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def doubled(processor: QuantAttention) -> QuantAttention:
    new = copy.copy(processor)
    new.__class__ = Doubled
    return new


def _moved(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data.clone() * 1.5


def _replaced(block, path: str) -> None:
    name, _, leaf = path.rpartition(".")
    parent = block.get_submodule(name)
    setattr(parent, leaf, Adapter(getattr(parent, leaf)))


CHANGES = {  # of a residual block
    "an adapter around a convolution": lambda b: _replaced(b, "conv1"),
    "an adapter around the last": lambda b: _replaced(b, "conv2"),
    "an adapter around the embedding": lambda b: _replaced(b, "time_emb_proj"),
    "other memory of a norm": lambda b: _moved(b.norm1.weight),
    "another parameter of a norm": lambda b: setattr(b.norm2, "bias", nn.Parameter(b.norm2.bias + 1)),
    "values of a norm": lambda b: b.norm2.bias.data.add_(1),
    "weights that are loaded": lambda b: b.norm1.load_state_dict({k: v + 1 for k, v in b.norm1.state_dict().items()}),
    "weights that are assigned": lambda b: b.norm1.load_state_dict(
        {k: v + 1 for k, v in b.norm1.state_dict().items()}, assign=True
    ),
    "another norm": lambda b: setattr(b, "norm1", nn.GroupNorm(1, b.norm1.num_channels)),
    "epsilon": lambda b: setattr(b.norm1, "eps", 1.0),
    "a bias": lambda b: _moved(b.conv1.bias),
    "no bias": lambda b: setattr(b.conv2, "bias", None),
    "a scale": lambda b: b.conv1.input_quantizer.scale.data.mul_(2),
    "other memory of a scale": lambda b: _moved(b.conv2.input_quantizer.scale),
    "zero points": lambda b: setattr(b.conv1.input_quantizer, "zero_point", b.conv1.input_quantizer.zero_point + 90),
    "an output scale": lambda b: setattr(b, "output_scale_factor", 2.0),
    "an activation": lambda b: setattr(b, "nonlinearity", nn.ReLU()),
    "a forward of another": lambda b: setattr(b.norm1, "forward", lambda x: x),
    "a hook that changes an output": lambda b: b.conv2.register_forward_hook(lambda _m, _a, y: 2 * y),
    "a hook of a norm": lambda b: b.norm2.register_forward_hook(lambda _m, _a, y: 2 * y),
    "a hook of an activation": lambda b: b.nonlinearity.register_forward_hook(lambda _m, _a, y: 2 * y),
}
ATTENTION_CHANGES = {  # of a transformer block
    "an adapter around queries": lambda b: _replaced(b, "attn1.to_q"),
    "an adapter around the last layer": lambda b: _replaced(b, "attn2.to_out.0"),
    "an adapter in the feed-forward": lambda b: _replaced(b, "ff.net.0.proj"),
    "another layer norm": lambda b: setattr(b, "norm3", nn.LayerNorm(b.norm3.normalized_shape, eps=1.0)),
    "other memory of a layer norm": lambda b: _moved(b.norm1.weight),
    "another processor": lambda b: setattr(b.attn1, "processor", doubled(b.attn1.processor)),
    "the scale of scores": lambda b: setattr(b.attn2, "scale", 3.0),
    "another number of heads": lambda b: setattr(b.attn1, "heads", 1),
    "an output factor": lambda b: setattr(b.attn1, "rescale_output_factor", 2.0),
    "ranges of values": lambda b: b.attn1.processor.v.scale.data.mul_(2),
    "a hook on an attention": lambda b: b.attn2.register_forward_hook(lambda _m, _a, y: 2 * y),
    "a hook on a projection": lambda b: b.ff.net[0].proj.register_forward_pre_hook(lambda _m, a: (2 * a[0],)),
    "a hook on the feed-forward": lambda b: b.ff.register_forward_hook(lambda _m, _a, y: 2 * y),
    "chunks of zeros": lambda b: setattr(b.ff, "forward", torch.zeros_like),
}


SHORTCUT_CHANGES = {  # of a residual block that has a shortcut
    "an adapter around the shortcut": lambda b: _replaced(b, "conv_shortcut"),
    "a scale of the shortcut": lambda b: b.conv_shortcut.input_quantizer.scale.data.mul_(2),
    "a hook on the shortcut": lambda b: b.conv_shortcut.register_forward_hook(lambda _m, _a, y: 2 * y),
}
TRANSFORMER_CHANGES = {  # of what lies around the block of a transformer
    "an adapter around the first layer": lambda t: _replaced(t, "proj_in"),
    "an adapter around the last layer": lambda t: _replaced(t, "proj_out"),
    "values of the norm": lambda t: t.norm.bias.data.add_(1),
    "another norm": lambda t: setattr(t, "norm", nn.GroupNorm(1, t.norm.num_channels)),
    "a scale": lambda t: t.proj_out.input_quantizer.scale.data.mul_(2),
    "a hook on the first layer": lambda t: t.proj_in.register_forward_hook(lambda _m, _a, y: 2 * y),
    "a hook on the block": lambda t: t.transformer_blocks[0].register_forward_hook(lambda _m, _a, y: 2 * y),
    "the block twice": lambda t: t.transformer_blocks.append(t.transformer_blocks[0]),
}


def assert_noticed(denoiser, inputs, block, change, called: nn.Module | None = None) -> None:
    """called: what is computed in one call; the block, unless it is inside of it."""
    first = denoiser(**inputs).sample
    assert vars(called or block)["one_call"]
    change(block)
    second = denoiser(**inputs).sample
    assert not torch.equal(first, second)
    assert torch.equal(second, denoiser(**inputs).sample)
    assert torch.equal(second, on_modules(denoiser, inputs))


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_residual_block_are_noticed(change, on_integers):
    denoiser, inputs = on_integers
    assert_noticed(denoiser, inputs, denoiser.mid_block.resnets[0], CHANGES[change])


@pytest.mark.parametrize("change", SHORTCUT_CHANGES)
def test_changes_of_a_shortcut_are_noticed(change, on_integers):
    denoiser, inputs = on_integers
    assert_noticed(denoiser, inputs, denoiser.up_blocks[-1].resnets[-1], SHORTCUT_CHANGES[change])


@pytest.mark.parametrize("change", TRANSFORMER_CHANGES)
def test_changes_of_a_transformer_are_noticed(change, on_integers):
    denoiser, inputs = on_integers
    transformer = next(m for m in denoiser.modules() if isinstance(m, Transformer2DModel))
    assert_noticed(denoiser, inputs, transformer, TRANSFORMER_CHANGES[change])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("change", ATTENTION_CHANGES)
def test_changes_of_a_transformer_block_are_noticed(change, whole, on_integers):
    """In a transformer that is one call, and in one of whose modules only the block is."""
    denoiser, inputs = on_integers
    transformer = next(m for m in denoiser.modules() if isinstance(m, Transformer2DModel))
    if not whole:
        transformer.norm.register_forward_hook(lambda *_: None)
    block = transformer.transformer_blocks[0]
    assert_noticed(denoiser, inputs, block, ATTENTION_CHANGES[change], transformer if whole else block)


def test_what_is_taken_back_is_noticed_too(on_integers):
    denoiser, inputs = on_integers
    block = denoiser.mid_block.resnets[0]
    first, layer = denoiser(**inputs).sample, block.conv1
    block.conv1 = Adapter(layer)
    handle = nn.modules.module.register_module_forward_hook(lambda m, _a, y: 2 * y if m is block.norm2 else None)
    changed = denoiser(**inputs).sample
    block.conv1 = layer
    handle.remove()
    assert not torch.equal(changed, first) and torch.equal(denoiser(**inputs).sample, first)
    assert block.one_call.unchanged()


def test_dropout_of_a_denoiser_in_training_mode(on_integers):
    denoiser, inputs = on_integers
    first = denoiser(**inputs).sample
    for module in denoiser.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert torch.equal(denoiser(**inputs).sample, first)  # in evaluation mode it does nothing
    denoiser.train()
    samples = [denoiser(**inputs).sample for _ in range(2)]
    assert not torch.equal(*samples)
    denoiser.eval()
    assert torch.equal(denoiser(**inputs).sample, first)


def test_memory_of_a_struct_is_kept(on_integers):
    """The tensors that a struct points to live as long as the struct, though the layers let go of them."""
    denoiser, inputs = on_integers
    denoiser(**inputs)
    block = denoiser.mid_block.resnets[0]
    (struct,) = block.one_call.structs.values()
    addresses = {t.data_ptr() for t in struct.kept}
    for parameter in block.parameters():
        parameter.data = parameter.data.clone()
    del block.one_call
    gc.collect()
    assert addresses == {t.data_ptr() for t in struct.kept}


@pytest.mark.parametrize(
    "change",
    [
        lambda q: q.scale.data.mul_(2),
        lambda q: _moved(q.scale),
        lambda q: q.zero_point.add_(90),
        lambda q: setattr(q, "scale", nn.Parameter(q.scale * 2, requires_grad=False)),
        lambda q: q.load_state_dict({k: v * 2 for k, v in q.state_dict().items()}),
    ],
)
def test_ranges_of_a_layer_outside_of_blocks(change, on_integers):
    denoiser, inputs = on_integers
    first = denoiser(**inputs).sample
    change(denoiser.conv_in.input_quantizer)
    second = denoiser(**inputs).sample
    place(denoiser, "integer")
    assert not torch.equal(first, second) and torch.equal(second, denoiser(**inputs).sample)
    assert torch.equal(second, copy.deepcopy(denoiser)(**inputs).sample)
