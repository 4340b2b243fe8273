"""Exports compute what the reference kernel computes; what their formats cannot hold is refused by name."""

import copy
import importlib.util
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

import quest
from quest import export
from quest.__main__ import main
from quest.affine import QuantSpec
from quest.benchmark import trained, whole_steps
from quest.diffusion.calibration_set import collect
from quest.diffusion.denoisers import denoiser_of
from quest.diffusion.models import MODELS
from quest.quantization import ranges
from quest.quantization.layers import quantized as quantized_layer

NEEDED = sorted(set().union(*export.NEEDED.values()))
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def calibrated(class_pipe, class_model):
    """A pipeline whose denoiser has a block on each side, and its calibration set; larger ones take long to trace."""
    torch.manual_seed(0)
    pipe = copy.deepcopy(class_pipe)
    pipe.unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=8,
        cross_attention_dim=32,
        attention_head_dim=4,
    ).eval()
    return pipe, collect(pipe, class_model, "calibration", 2)


@pytest.fixture(scope="module")
def quantized(calibrated):
    pipe, calibration = calibrated
    return quest.quantize(pipe, "rtn-mse", "w4a8", calibration=calibration, samples=8)


@pytest.fixture(scope="module")
def file(quantized, tmp_path_factory):
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}")
    path = tmp_path_factory.mktemp("onnx") / "denoiser.onnx"
    assert export.export(quantized, path) <= export.TOLERANCE
    assert [f.name for f in path.parent.iterdir()] == ["denoiser.onnx"]
    return path


def test_other_runtimes_compute_the_same(quantized, file, tmp_path, monkeypatch):
    """To the last digits, but for inputs with a value at a tie, for other numbers of rows and tokens than traced."""
    import onnx

    denoiser = denoiser_of(quantized)
    monkeypatch.setattr(export, "write", lambda denoiser, inputs, path: path.write_bytes(file.read_bytes()))
    assert export.export(quantized, tmp_path / "ir.xml") <= export.TOLERANCE
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ir.bin", "ir.xml"]
    for made in (file, tmp_path / "ir.xml"):
        differences = []
        for step in range(50, 1000, 190):
            inputs = export.inputs_of(denoiser, batch=1) | {"timestep": torch.tensor(step)}
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :2] * step / 1000
            differences.append(export.compared(made, denoiser, inputs))
        assert sorted(differences)[2] < 1e-5 and max(differences) <= export.TOLERANCE, made
    # Weights are codes of a byte, and quantizers are operators of the format.
    graph = onnx.load(file).graph
    kinds = [node.op_type for node in graph.node]
    layers = sum(name.endswith("codes") for name in export.exportable(denoiser).state_dict())
    assert kinds.count("DequantizeLinear") - kinds.count("QuantizeLinear") == layers > 10
    codes = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.UINT8 and tensor.dims]
    assert sum(np.prod(tensor.dims) for tensor in codes) > 50_000


@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_weights_of_one_sign_have_a_zero_point_that_no_byte_holds(tmp_path):
    conv = torch.nn.Conv2d(8, 4, 3)
    with torch.no_grad():
        conv.weight[1].abs_().add_(0.5)
    layer = quantized_layer(conv, QuantSpec(8, axis=0), QuantSpec(8), None)
    layer.choose_weight_range(ranges.mse_zero_point)
    layer.input_quantizer.scale.data.fill_(8 / 255)
    layer.input_quantizer.zero_point.fill_(127)
    layer.freeze()
    assert layer.qweight.zero_point.min() < 0
    wide = quantized_layer(torch.nn.Conv2d(8, 4, 3), QuantSpec(12, axis=0), QuantSpec(8), None)
    wide.choose_weight_range(ranges.mse_zero_point)
    wide.input_quantizer = layer.input_quantizer
    with pytest.raises(ValueError, match="wide.weight: codes or zero points that a byte cannot hold"):
        export._Layer(wide, "wide")

    class Denoiser(torch.nn.Module):
        config = SimpleNamespace(sample_size=8, in_channels=8, get=lambda key: None)

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, sample, timestep, return_dict=True):
            y = self.layer(sample) + 0 * timestep
            return SimpleNamespace(sample=y) if return_dict else (y,)

    inputs, path = export.inputs_of(Denoiser(layer)), tmp_path / "layer.onnx"
    export.write(Denoiser(export._Layer(layer, "layer")), inputs, path)
    assert export.compared(path, Denoiser(layer), inputs) < 1e-5


def test_the_benchmark_runs_the_export(calibrated, quantized, file, class_model, monkeypatch):
    """The error of each runtime is that of the quantized denoiser; OpenVINO in its fast mode adds some of its own."""
    pipe, held_out = calibrated
    monkeypatch.setitem(MODELS, "tiny", class_model)
    monkeypatch.setattr(trained, "pipeline", lambda name: pipe)
    monkeypatch.setattr(trained, "trajectories", lambda name, split, folder: held_out)
    monkeypatch.setattr(trained, "exported", lambda name, bits, folder: file)
    batch = int((held_out.call == 0).sum())
    wanted = trained.error("tiny", denoiser_of(quantized), None)
    assert 1e-4 < wanted < 0.5
    for kernel in ("onnxruntime w8a8", "OpenVINO w8a8 accurate", "OpenVINO w8a8"):
        step = whole_steps.rival("tiny", kernel, batch, None)
        found = trained.error("tiny", step, None)
        assert found == pytest.approx(wanted, rel=2.0 if kernel == "OpenVINO w8a8" else 0.05), kernel


def test_a_killed_export_leaves_no_pair_of_different_files(quantized, tmp_path, monkeypatch):
    """Whichever step of putting the two files of OpenVINO in place is the last one."""
    file, replace = tmp_path / "ir.xml", os.replace
    monkeypatch.setattr(export, "NEEDED", {".xml": ()})
    monkeypatch.setattr(export, "write", lambda denoiser, inputs, path: None)
    monkeypatch.setattr(export, "compared", lambda path, denoiser, inputs: 0.0)

    def made(text):
        return lambda _onnx, path: [path.with_suffix(s).write_text(text, encoding="utf-8") for s in (".xml", ".bin")]

    monkeypatch.setattr(export, "to_ir", made("old"))
    export.export(quantized, file)
    monkeypatch.setattr(export, "to_ir", made("new"))
    for last in (0, 1):
        done = []

        def until_killed(source, target, last=last, done=done):
            if len(done) == last:
                raise KeyboardInterrupt
            done.append(replace(source, target))

        monkeypatch.setattr(os, "replace", until_killed)
        with pytest.raises(KeyboardInterrupt):
            export.export(quantized, file)
        assert [f.name for f in tmp_path.iterdir()] == ["ir.bin"]
    monkeypatch.setattr(os, "replace", replace)
    export.export(quantized, file)
    assert {f.name: f.read_text(encoding="utf-8") for f in tmp_path.iterdir()} == {"ir.bin": "new", "ir.xml": "new"}


def test_operators_on_bytes_are_the_quantizers(quantized):
    """Bit for bit on the reference kernel, before any runtime is asked."""
    inputs = export.inputs_of(denoiser_of(quantized))
    with torch.no_grad():
        wanted = denoiser_of(quantized)(**inputs).sample
        found = export.exportable(denoiser_of(quantized))(**inputs).sample
    assert torch.equal(found, wanted)


def test_what_the_formats_cannot_hold_is_refused(calibrated, quantized, tmp_path):
    pipe, _ = calibrated
    grouped = copy.deepcopy(denoiser_of(quantized))
    quantizer = grouped.conv_in.input_quantizer
    quantizer.scale = torch.nn.Parameter(quantizer.scale.repeat(3), requires_grad=False)
    with pytest.raises(ValueError, match="conv_in.input: 3 time groups; .* time_groups: 1"):
        export.exportable(grouped)
    shifted = copy.deepcopy(denoiser_of(quantized))
    shifted.conv_in.input_quantizer.zero_point -= 300
    with pytest.raises(ValueError, match="conv_in.input: codes or zero points that a byte cannot hold"):
        export.exportable(shifted)
    for key, value, said in (("time_cond_proj_dim", 256, "a further input"), ("sample_size", None, "height and width")):
        other = copy.deepcopy(denoiser_of(quantized))
        other.register_to_config(**{key: value})
        with pytest.raises(ValueError, match=f"export: {key}: .*{said}"):
            export.exportable(other)
    with pytest.raises(ValueError, match="not quantized"):
        export.export(pipe, tmp_path / "x.onnx")
    with pytest.raises(ValueError, match="the suffix must be .onnx, or .xml"):
        export.export(quantized, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="no folder"):
        export.export(quantized, tmp_path / "none" / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_checkpoint_of_a_folder(calibrated, quantized, tmp_path, monkeypatch, capsys):
    calibrated[0].save_pretrained(tmp_path / "pipe")
    quest.save(quantized, tmp_path / "q.safetensors")
    given = []
    monkeypatch.setattr(export, "export", lambda *words: given.append(words) or 1e-6)
    main(["export", str(tmp_path / "pipe"), str(tmp_path / "q.safetensors"), "-o", str(tmp_path / "x.onnx")])
    ((pipe, path),) = given
    assert path == tmp_path / "x.onnx" and "differs from the reference kernel by 1.0e-06" in capsys.readouterr().out
    inputs = export.inputs_of(denoiser_of(quantized))
    with torch.no_grad():
        found, wanted = (denoiser_of(one)(**inputs).sample for one in (pipe, quantized))
    assert denoiser_of(pipe).quantization["bits"] == "w4a8"
    # Weights of a folder lie in memory in another order, and so sums in floats have other last digits.
    assert (found - wanted).abs().max() <= export.TOLERANCE * wanted.abs().max()
    with pytest.raises(SystemExit, match="none.*: no such file; valid: a folder of a pipeline"):
        main(["export", str(tmp_path / "none"), "q.safetensors", "-o", "x.onnx"])


@pytest.mark.parametrize(
    "method, recipe, said",
    [
        ("dilate", {}, "conv_in: it has a prologue, which the format does not hold"),
        ("dynamic", {}, "conv_in.input: scales and codes dynamic per token"),
        ("fp4", {}, "codes e2m1; the format holds static scales and whole numbers"),
        (
            "svdquant",
            {"dynamic": "static", "grid": 1, "iterations": 1},
            "it has a branch, which the format does not hold",
        ),
    ],
)
def test_what_stands_beside_codes_is_refused(calibrated, method, recipe, said):
    pipe, calibration = calibrated
    made = quest.quantize(pipe, method, "w4a4", calibration=calibration, **recipe)
    with pytest.raises(ValueError, match=said):
        export.exportable(denoiser_of(made))
