"""What the compiled core is handed: computed as torch computes it, or refused as torch refuses it, never misread."""

import copy
import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from operands import activation, needs_core, weight
from torch import nn

import quest
from quest.affine import QParams, QuantSpec
from quest.kernels import reference
from quest.kernels.cpu import blocks, core, integer
from quest.kernels.cpu.core import abi, calls
from quest.quantization.layers import quant_layers
from quest.quantization.placement import place

pytestmark = [needs_core, pytest.mark.usefixtures("no_gradients")]
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError)


def agree(compute, dtype=torch.float32, atol=1e-5):
    """compute(kernel), on the integer kernel as on the reference: the same values, or an error from both.

    Of other dtypes always an error: torch mixes none, but for a few tensors without values.
    """
    if dtype != torch.float32:
        with pytest.raises(TypeError, match=f"takes float32 on a CPU, not {dtype}"):
            compute(integer)
        return
    try:
        expected = compute(reference)
    except REFUSALS:
        with pytest.raises((TypeError, ValueError)):
            compute(integer)
    else:
        y = compute(integer)
        assert y.shape == expected.shape and y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3, 8), (0, 8), (2, 0, 8), (8,), (3, 9), (3, 1), (3, 0), (2, 3, 4, 8)], ids=str)
def test_linear(isa, shape, dtype):
    w = weight(4, 8, bits=8)
    agree(
        lambda kernel: kernel.linear(torch.ones(shape, dtype=dtype), activation(8, 120.0), kernel.pack(w), None), dtype
    )


@pytest.mark.parametrize(
    "bias", [torch.ones(4), torch.ones(5), torch.ones(4).half(), torch.ones(8)[::2], torch.ones(4, device="meta")]
)
def test_biases(bias):
    w = weight(4, 8, bits=8)
    agree(lambda kernel: kernel.linear(torch.ones(3, 8), activation(8, 120.0), kernel.pack(w), bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 8, 5, 5), (0, 8, 5, 5), (8, 5, 5), (2, 9, 5, 5), (2, 8, 0, 5), (2, 8, 1, 1), (2, 8), (1, 2, 8, 5, 5)]
)
@pytest.mark.parametrize("padding", [(1, 1), (0, 0), (0, 4)])
def test_conv2d(isa, shape, padding, dtype):
    w, conv = weight(4, 8, 3, 3, bits=8), dict(stride=(1, 1), padding=padding, dilation=(1, 1), groups=1)
    x = torch.ones(shape, dtype=dtype)
    agree(lambda kernel: kernel.conv2d(x, activation(8, 120.0), kernel.pack(w), None, **conv), dtype)


QKV = {
    "same": ((2, 5, 8), (2, 7, 8), (2, 7, 8)),
    "other batch": ((2, 5, 8), (1, 7, 8), (1, 7, 8)),
    "batch of more": ((2, 5, 8), (3, 7, 8), (3, 7, 8)),
    "fewer values": ((2, 5, 8), (2, 7, 8), (2, 6, 8)),
    "wider keys": ((2, 5, 8), (2, 7, 9), (2, 7, 9)),
    "no sample": ((0, 5, 8), (0, 7, 8), (0, 7, 8)),
    "no query": ((2, 0, 8), (2, 7, 8), (2, 7, 8)),
    "no key": ((2, 5, 8), (2, 0, 8), (2, 0, 8)),
    "no channel": ((2, 5, 0), (2, 7, 0), (2, 7, 0)),
    "matrices": ((5, 8), (7, 8), (7, 8)),
}


@pytest.mark.parametrize("shapes", QKV.values(), ids=QKV)
@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.float64], ids=str)
def test_attention(isa, shapes, other):
    torch.manual_seed(0)
    q, k, v = map(torch.randn, shapes)
    params = [activation(8, 128.0)] * 3 + [activation(8, 0.0, 1 / 255)]
    for rows in ((q, k.to(other), v.to(other)), (q, k, v.to(other)), (q.to(other), k, v)):
        agree(lambda kernel, rows=rows: kernel.attention(*rows, params, 0.3), other, 0.02)


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (0, 8, 4, 4), (0, 8, 3), (2, 8, 0, 4), (2, 6, 4, 4), (2, 8)], ids=str)
def test_norms(isa, shape):
    x = torch.randn(shape)
    for norm, fused in ((nn.GroupNorm(4, 8), blocks.FusedGroupNorm), (nn.LayerNorm(4), blocks.FusedLayerNorm)):
        try:
            expected = norm(x)
        except REFUSALS:
            expected = None
        norm.__class__ = fused
        if expected is None:
            with pytest.raises(REFUSALS):
                norm(x)
        else:
            torch.testing.assert_close(norm(x), expected)


@pytest.mark.parametrize("size", [(3, 1), (1, 3), (1, 1), (4, 5)])
def test_strides_of_a_side_of_one_pixel_say_nothing(size):
    x = torch.randn(2, 8, *size).contiguous(memory_format=torch.channels_last)
    strides = [1000 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)]
    odd = x.as_strided(x.shape, strides)
    norm = nn.GroupNorm(4, 8)
    expected = norm(x)
    y = calls.group_norm(odd, 4, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(y, expected)
    w = integer.pack(weight(4, 8, 1, 1, bits=8))
    conv = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)
    assert torch.equal(*(integer.conv2d(t, activation(8, 120.0), w, None, **conv) for t in (odd, x)))


def test_a_negated_view_is_read_with_its_sign():
    x = torch.view_as_complex(torch.randn(3, 8, 2)).conj().imag
    assert x.is_neg()
    w, qparams = integer.pack(weight(4, 8, bits=8)), activation(8, 120.0)
    assert torch.equal(integer.linear(x, qparams, w, None), integer.linear(x.clone(), qparams, w, None))


def test_what_is_no_packed_weight_is_refused():
    w, x, qparams = integer.pack(weight(4, 8, bits=8)), torch.ones(3, 8), activation(8, 120.0)
    with pytest.raises(TypeError, match="a packed weight is uint8 on a CPU, not torch.uint8 on meta"):
        integer.linear(x, qparams, w.to("meta"), None)
    with pytest.raises(TypeError, match="a packed weight is uint8 on a CPU, not torch.float32"):
        integer.linear(x, qparams, torch.ones(4, 8), None)
    changed = torch.cat([w[..., :8], w[..., 8:] + 1], 3)
    for damaged in (torch.zeros_like(w), w[:1], w.roll(8), w.flatten()[:40], changed):
        with pytest.raises(
            ValueError,
            match="linear: .*packed weight",
        ):
            integer.linear(x, qparams, damaged.contiguous(), None)
    with pytest.raises(ValueError, match="the weight is that of a convolution"):
        integer.linear(x, qparams, integer.pack(weight(4, 8, 3, 3, bits=8)), None)
    with pytest.raises(ValueError, match="packed in another shape"):
        integer.unpack(w, (4, 9))
    with pytest.raises(ValueError, match="codes from 0 to 255"):
        codes = weight(4, 8, bits=8)
        integer.pack(replace(codes, codes=codes.codes + 100))


def test_an_odd_number_of_outputs_is_not_gated():
    with pytest.raises(ValueError, match="even number of outputs"):
        integer.linear(torch.ones(3, 8), activation(8, 1.0), integer.pack(weight(5, 8, bits=8)), None, gated=True)


@pytest.mark.parametrize("tensor", ["x", "bias", "residual"])
def test_lost_gradients_are_errors(tensor):
    given = dict(x=torch.ones(3, 8), bias=torch.ones(4), residual=torch.ones(3, 4))
    given[tensor].requires_grad_()
    w = integer.pack(weight(4, 8, bits=8))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="train on the reference"):
        integer.linear(given["x"], activation(8, 1.0), w, given["bias"], residual=given["residual"])


@pytest.fixture(scope="module")
def text_unet(text_pipe, text_calibration):
    denoiser = quest.quantize(text_pipe, "rtn", "w4a8", calibration=text_calibration, samples=8).unet
    assert place(denoiser, "integer").refused == {}
    return denoiser, text_calibration.inputs(torch.arange(4))


def test_contexts_of_a_unet(text_unet):
    denoiser, inputs = text_unet
    plain = copy.deepcopy(denoiser)
    place(plain, "reference")
    context = inputs["encoder_hidden_states"]
    gaps = context.transpose(0, 1).contiguous().transpose(0, 1)
    for given in (context, gaps, context[:, :1], context[:, :0]):
        y, e = (model(**inputs | {"encoder_hidden_states": given}).sample for model in (denoiser, plain))
        assert y.shape == e.shape and (y - e).norm() < 0.2 * e.norm()
    wrong = [context[:3], context[:1], context[..., :-1], context[0]]
    for given in (context.half(), context.double(), context.to("meta"), *wrong):
        for model in (plain, denoiser):
            with pytest.raises(REFUSALS):
                model(**inputs | {"encoder_hidden_states": given})
    with torch.enable_grad(), pytest.raises(RuntimeError, match="train on the reference"):
        denoiser(**inputs | {"encoder_hidden_states": context.clone().requires_grad_()})


def test_a_unet_of_no_rows(text_unet):
    denoiser, inputs = text_unet
    none = {n: t[:0] if t.ndim else t for n, t in inputs.items()}
    assert denoiser(**none).sample.shape == (0, *inputs["sample"].shape[1:])


@pytest.mark.parametrize("kind", ["default", "scale_shift"])
def test_embeddings_of_a_residual_block(kind):
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(in_channels=16, temb_channels=12, groups=4, time_embedding_norm=kind)
    x, temb = torch.randn(3, 16, 4, 4), torch.randn(3, 12)
    expected = [block(x, t) for t in (temb, temb[:1], temb[:, None].expand(3, 2, 12)[:, 0])]
    blocks.fuse(block)
    found = [block(x, t) for t in (temb, temb[:1], temb[:, None].expand(3, 2, 12)[:, 0])]
    for y, e in zip(found, expected, strict=True):
        torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-5)
    for wrong in (temb.half(), temb[:2], temb[:, :5], temb.to("meta")):
        with pytest.raises(REFUSALS):
            block(x, wrong)


def test_a_block_whose_layer_became_another_is_refused(text_unet):
    """As if a block had been put together of other layers than its struct names."""
    denoiser, inputs = text_unet
    denoiser = copy.deepcopy(denoiser)
    name, layer = next((n, m) for n, m in quant_layers(denoiser) if n.endswith("attn2.to_k"))
    layer.operand = integer.pack(weight(len(layer.operand), 5, bits=8))
    with pytest.raises(ValueError, match="keys' layer takes another number of channels"):
        denoiser(**inputs)


def test_too_little_memory_is_an_error_of_python():
    """The core's own memory, beyond what the process may have; afterwards it computes on."""
    code = """
import resource, sys, threading, torch
sys.path.insert(0, "tests/kernels")
from operands import QTensor, activation
from quest.kernels.cpu import core, integer

torch.set_num_threads(int(sys.argv[1]))
w = integer.pack(QTensor(torch.zeros(4, 200000), torch.ones(4, 1), torch.zeros(4, 1)))
x, q = torch.ones(300, 200000), activation(8, 1.0)

@torch.no_grad()
def compute(isa):
    core.use(isa)
    integer.linear(x[:20], q, w, None)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20), limits[1]))
    try:
        integer.linear(x, q, w, None)
    except MemoryError as error:
        print(isa, error)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert integer.linear(x, q, w, None).eq(0).all()

for isa in core.instruction_sets():  # each with a thread of its own, whose memory is new
    thread = threading.Thread(target=compute, args=[isa])
    thread.start()
    thread.join()
"""
    for threads in "12":
        # One heap that grows as the system allows; others reserve more than they use. Large memory goes back to the
        # system when it is freed; otherwise the next instruction set would get it again.
        environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        done = subprocess.run(
            [sys.executable, "-c", code, threads], capture_output=True, text=True, env=environment, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("linear: there is not enough memory") == len(core.instruction_sets()), done.stdout


def test_a_core_of_other_declarations_is_an_error(monkeypatch, tmp_path):
    """The hash knows every declaration, and no comment."""
    text, before = abi.HEADER.read_text(encoding="utf-8"), abi.digest()
    monkeypatch.setattr(abi, "HEADER", tmp_path / "abi.h")
    abi.HEADER.write_text("// more\n" + text.replace("\n\n", "\n"), encoding="utf-8")
    assert abi.digest() == before
    for old, new in (("int64_t rows, int64_t channels", "int64_t channels, int64_t rows"), ("float eps;\n", "")):
        assert old in text
        abi.HEADER.write_text(text.replace(old, new, 1), encoding="utf-8")
        assert abi.digest() != before
        with pytest.raises(RuntimeError, match="is older than its source: `pip install -e .` builds it anew"):
            core.core.__wrapped__()


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    for name in ("avx", "AVX2", "avx512"):
        monkeypatch.setenv("QUEST_ISA", name)
        with pytest.raises(ValueError, match=f"QUEST_ISA: '{name}' is no instruction set; valid here: portable"):
            core.core.__wrapped__()
    lacking = [name for name in core.ISAS if name not in core.instruction_sets()]
    for name in lacking:
        with pytest.raises(ValueError, match=f"this machine lacks {name}; valid here: portable"):
            core.use(name)
    assert core.instruction_sets() == [name for name in core.ISAS if name not in lacking]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", ["integer", "reference"])
def test_the_default_dtype_changes_nothing(text_unet, dtype, kernel):
    denoiser, inputs = text_unet
    denoiser = copy.deepcopy(denoiser)
    place(denoiser, kernel)
    expected = denoiser(**inputs).sample
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(denoiser(**inputs).sample, expected)
        place(denoiser, kernel)  # packed anew
        assert torch.equal(denoiser(**inputs).sample, expected)
        x, qparams = torch.ones(2, 8, dtype=torch.float32), QParams(torch.tensor(0.1), torch.tensor(3.0), QuantSpec(8))
        assert integer.linear(x, qparams, integer.pack(weight(4, 8, bits=8)), None).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_device_changes_nothing(text_unet):
    denoiser, inputs = text_unet
    denoiser = copy.deepcopy(denoiser)
    expected = denoiser(**inputs).sample
    layer = denoiser.conv_in
    with torch.device("meta"):
        place(denoiser, "integer")
        y = layer(inputs["sample"])
        assert layer.operand.is_cpu and y.is_cpu
    assert torch.equal(denoiser(**inputs).sample, expected)


def test_a_core_of_older_source_is_an_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _path: SimpleNamespace())
    with pytest.raises(RuntimeError, match="is older than its source: `pip install -e .` builds it anew"):
        core.core.__wrapped__()
