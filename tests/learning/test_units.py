"""The units of a denoiser, and the layout in which they are judged."""

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D

from quest.learning import units
from quest.quantization.layers import attentions, input_quantizers, quant_layers
from quest.quantization.swapping import swap


@pytest.fixture(params=["uncond", "class"])
def case(request):
    return request.getfixturevalue(f"{request.param}_pipe"), request.getfixturevalue(f"{request.param}_calibration")


def test_units_stand_in_execution_order_and_hold_everything_once(case):
    pipe, calibration = case
    q = swap(pipe, 8, 8).unet
    found = units.units(q, calibration.inputs(torch.arange(1)))
    names = [u.name for u in found]
    assert names[:3] == ["time_embedding.linear_1", "time_embedding.linear_2", "conv_in"] and names[-1] == "conv_out"
    middle = [i for i, n in enumerate(names) if n.startswith("mid_block")]
    assert max(i for i, n in enumerate(names) if n.startswith("down")) < min(middle)
    assert max(middle) < min(i for i, n in enumerate(names) if n.startswith("up_blocks"))
    assert sorted(n for u in found for n in u.layers) == sorted(n for n, _ in quant_layers(q))
    assert sorted(n for u in found for n in u.quantizers) == sorted(input_quantizers(q))
    whole = {type(m) for u in found for m in u.modules.values() if len(u.modules) < len(u.layers)}
    if any(isinstance(m, BasicTransformerBlock) for m in q.modules()):
        assert whole == {ResnetBlock2D, BasicTransformerBlock}
        assert all(u.layers and len(u.modules) == 1 for u in found)
    else:
        assert whole == {ResnetBlock2D}
        attention = [n for n, _ in attentions(q)]
        for kind, size in (("qkv", 3), ("processor", 1), ("to_out.0", 1)):  # one after the other
            assert [n.removesuffix(f".{kind}") for n in names if n.endswith(kind)] == [
                n for n in sorted(attention, key=lambda n: names.index(f"{n}.qkv"))
            ]
            of = [u for u in found if u.name.endswith(kind)]
            assert all(len(u.modules) == size and bool(u.layers) == (kind != "processor") for u in of)
        at = names.index(f"{attention[0]}.qkv")
        assert names[at : at + 3] == [f"{attention[0]}.{kind}" for kind in ("qkv", "processor", "to_out.0")]


def test_an_unconditional_attention_is_judged_in_the_layout_of_the_paper_s_network():
    """[B, channels, tokens], whether of its layers or of its products' heads."""
    y = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    heads = y.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1)  # [3 * 2, 5, 4], as a processor has them
    assert torch.equal(units._channels_first(y, 3), y.transpose(1, 2))
    assert torch.equal(units._heads_as_channels(heads, 3), y.transpose(1, 2))
