"""What the audit says, against bytes counted here; and the size of Stable Diffusion's denoiser at 4 bits."""

import re
from types import SimpleNamespace

import pytest
import torch

import quest
from quest.__main__ import main
from quest.diffusion.compvis import networks
from quest.diffusion.random_checkpoints import COMPVIS
from quest.quantization import audit, checkpoint, cost, ranges
from quest.quantization.layers import input_quantizers, quant_layers
from quest.quantization.swapping import swap
from quest.quantization.timegroups import TimeGroups


@pytest.fixture(scope="module")
def made(text_pipe, text_calibration, tmp_path_factory):
    q = quest.quantize(text_pipe, "rtn", "w4a8", calibration=text_calibration, keep={"*.conv_shortcut": 32})
    folder = tmp_path_factory.mktemp("audit")
    quest.save(q, folder / "model.safetensors", model="tiny-text")
    quest.save(q, folder / "start.safetensors", floats=True)
    return q, folder


def test_account(text_pipe, made):
    q, folder = made
    found = audit.account(folder / "model.safetensors")
    assert found["parameters"] == sum(p.numel() for p in text_pipe.unet.parameters())
    coded = [m for _, m in quant_layers(q.unet) if m.weight_quantizer.spec.bits < 32]
    assert sum(found["bytes"]["codes"].values()) == sum(m.weight.numel() // 2 for m in coded)
    rows = sum(m.weight.shape[0] for _, m in quant_layers(q.unet))  # a scale and a zero point each
    assert sum(found["bytes"]["weight scales"].values()) == 8 * rows
    assert sum(found["bytes"]["activation scales"].values()) == 8 * len(input_quantizers(q.unet))
    norms = [p for n, p in text_pipe.unet.named_parameters() if "norm" in n.split(".")[-2]]
    assert found["bytes"]["float"]["norm"] == 4 * sum(p.numel() for p in norms)
    shortcuts = [p for n, p in text_pipe.unet.named_parameters() if "conv_shortcut" in n]
    assert found["bytes"]["float"]["shortcut"] == 4 * sum(p.numel() for p in shortcuts)
    assert "other" not in found["bytes"]["float"] and found["scheduler"] == 0
    assert {kind: of_kind for kind, of_kind in cost.stored(q.unet).items()} == found["bytes"]


def test_command(made, capsys):
    q, folder = made
    main(["audit", str(folder / "model.safetensors")])
    told = capsys.readouterr().out
    full = 4 * cost.parameters(q.unet)
    size = q.unet.quantization["cost"]["footprint"]["bytes"]
    assert "tiny-text rtn w4a8" in told and "weights per channel 0; activations per tensor" in told
    assert re.search(rf"^denoiser +{size:,} bytes", told, re.M) and f"{size / full:.4f} of float32" in told
    assert re.search(rf"^file +{(folder / 'model.safetensors').stat().st_size:,} bytes", told, re.M)
    assert re.search(r"^bits per parameter +\d+\.\d+$", told, re.M) and "e12 for one sample" in told
    main(["audit", str(folder / "start.safetensors")])
    told = capsys.readouterr().out
    assert f"weights are in float32, for other methods to start from (packed: {size / full:.4f})" in told


def test_what_is_no_checkpoint_is_one_line(made, text_calibration, tmp_path):
    (tmp_path / "text.safetensors").write_text("hello", encoding="utf-8")
    text_calibration.save(tmp_path / "calibration.safetensors")
    content = bytearray((made[1] / "model.safetensors").read_bytes())
    content[-3] ^= 4
    (tmp_path / "changed.safetensors").write_bytes(content)
    for name, said in {
        "nothing": "audit: .*nothing.safetensors: no such file; valid: a checkpoint",
        "text": "audit: .*text.safetensors is corrupted, or no safetensors file",
        "calibration": "audit: .*calibration.safetensors is not a quantized checkpoint",
        "changed": "audit: .*changed.safetensors is corrupted: its tensor",
    }.items():
        with pytest.raises(SystemExit, match=said) as left:
            main(["audit", str(tmp_path / f"{name}.safetensors")])
        assert left.value.code != 0 and "\n" not in str(left.value)


def stable_diffusion(w, a, groups=None):
    """A pipeline of Stable Diffusion's denoiser without its weights, quantized; the float one beside it."""
    unet = networks.denoiser(COMPVIS / "sd14.yaml", "meta")
    return swap(SimpleNamespace(unet=unet, scheduler=None), w, a, softmax_bits=16, groups=groups), unet


def test_stable_diffusion_at_4_bits_is_at_most_016_of_float32():
    pipe, unet = stable_diffusion(4, 8, TimeGroups(list(range(999, 0, -40))))
    full = 4 * sum(p.numel() for p in unet.parameters())
    found = {kind: sum(of_kind.values()) for kind, of_kind in cost.stored(pipe.unet).items()}
    assert full == 4 * 859_520_964
    assert found["codes"] < 0.126 * full and sum(found.values()) < 0.128 * full


@pytest.mark.slow
def test_a_file_of_stable_diffusion_s_shape_at_4_bits(tmp_path):
    """Zeros, which the system hands out without memory behind them until they are written to."""
    pipe, unet = stable_diffusion(4, 8)
    for module in pipe.unet.modules():
        for name, value in module.named_parameters(recurse=False):
            if value.is_meta:
                setattr(module, name, torch.nn.Parameter(torch.zeros(value.shape), requires_grad=False))
    for _, layer in quant_layers(pipe.unet):
        layer.choose_weight_range(ranges.minmax)
    path = tmp_path / "model.safetensors"
    checkpoint.save(pipe, path)
    found = audit.account(path)
    full = 4 * sum(p.numel() for p in unet.parameters())
    assert 4 * found["parameters"] == full and found["file"] < 0.128 * full
    assert found["bytes"] == cost.stored(pipe.unet)
    print(audit.report(path))
