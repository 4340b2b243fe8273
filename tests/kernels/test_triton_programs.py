"""What of the Triton kernel needs no GPU and no interpreter: packed codes, refusals, and what programs compile to."""

import importlib.util
import sys

import pytest
import torch
from operands import weight

from quest.affine import QParams, QTensor, QuantSpec
from quest.kernels.triton import kernel as triton

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def test_packed_codes():
    """A byte or half a byte for each code, 16 bytes more for each tap of an output."""
    assert triton.pack(weight(320, 640, bits=8)).shape == (320, 1, 1, 656)
    assert triton.pack(weight(320, 640, bits=4)).shape == (320, 1, 1, 336)
    w = weight(5, 40, 3, 3, bits=4, outside=True)
    packed = triton.pack(w)
    assert packed.shape == (5, 3, 3, 32 + 16) and packed.dtype == torch.uint8
    codes = torch.cat([packed[..., :32] & 15, packed[..., :32] >> 4], dim=-1)
    assert torch.equal(codes[..., :40].permute(0, 3, 1, 2).float(), w.codes) and (codes[..., 40:] == 8).all()
    header = packed[..., 32:].contiguous().view(torch.int32)
    assert torch.equal(header[..., 0].double(), (w.codes - w.zero_point).double().sum(1))
    assert torch.equal(header[:, 0, 0, 3].double(), (w.codes - w.zero_point).double().sum((1, 2, 3)))
    assert torch.equal(header[:, 0, 0, 2] + 8, w.zero_point.flatten().int())
    assert torch.equal(header[:, 0, 0, 1].contiguous().view(torch.float32), w.scale.flatten())


def test_what_is_not_exact_is_refused():
    def groups(spec: QuantSpec, *zero_points: float) -> QParams:
        return QParams(torch.ones(len(zero_points)), torch.tensor(zero_points), spec)

    spec, w = QuantSpec(8, axis=0), weight(4, 6, bits=8)
    assert triton.supports(w, spec, groups(QuantSpec(8), -300.0, 128.0)) is None
    assert "16 bits, more than 8" in triton.supports(w, spec, groups(QuantSpec(16), 0.0))
    assert "no integers" in triton.supports(w, spec, groups(QuantSpec(8), 0.5))
    assert "grouped" in triton.supports(w, spec, groups(QuantSpec(8), 0.0), groups=2, padding=(1, 1))
    long = QTensor(torch.ones(1, 2**17), torch.ones(1, 1), torch.zeros(1, 1))
    assert "sums of 131072 products" in triton.supports(long, spec, groups(QuantSpec(8), 0.0))
    a = groups(QuantSpec(8), 128.0)
    assert triton.supports_attention(a, a, a, a) is None
    assert "p: 16 bits" in triton.supports_attention(a, a, a, a._replace(spec=QuantSpec(16)))


def test_where_it_is_not_available(monkeypatch):
    assert triton.unavailable(torch.device("meta")) == "it computes on a CUDA GPU, not on meta"
    assert "in float32, not in torch.float16" in triton.unavailable(torch.device("cuda"), torch.float16)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "quest.kernels.triton.programs", raising=False)
    monkeypatch.delattr("quest.kernels.triton.programs", raising=False)
    assert "the package triton cannot be imported" in triton.unavailable(torch.device("cuda"))


def compiled(program, types: dict[str, str], constants: dict, capability: int) -> str:
    """Machine-independent code of a program for that compute capability; no GPU takes part."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = program.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    multiples = ("x_row", "depth", "span", "width", "v_width")
    aligned = [i for i, n in enumerate(names) if signature[n][0] == "*" or (n in multiples and n not in constants)]
    source = ASTSource(program, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4}).asm["ptx"]


ON_TENSOR_CORES = {80: "mma.sync.aligned.m16n8k32.row.col", 90: "wgmma.mma_async.sync.aligned.m64n64k32"}


@needs_triton
@pytest.mark.parametrize(
    "capability, bits, kind",
    [
        (80, 8, "linear"),
        (80, 4, "conv"),
        (80, 8, "conv of pixels"),
        (90, 4, "linear"),
        (90, 8, "linear of rows"),
        (90, 8, "conv"),
        (90, 4, "conv of pixels"),
    ],
)
def test_layers_compile_to_integer_products(tmp_path, monkeypatch, capability, bits, kind):
    """A linear layer of half-precision inputs, or a 3 x 3 convolution over codes, whose pixels may have scales."""
    fused = kind.startswith("linear")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from quest.kernels.triton.programs import multiply

    types = {n: "*fp32" for n in ("sums", "weight_float", "bias", "scale", "zero_point")}
    types |= {"x": "*fp16" if fused else "*i8", "weight": "*i8" if bits == 8 else "*u8"}
    types |= {"weight_int": "*i32", "y": "*fp16"}
    size = 1 if fused else 3
    constants = dict(QMIN=0, QMAX=255, BITS=bits, KH=size, KW=size, FUSED=fused, POINTWISE=fused, PADDED=not fused)
    constants |= {"OF_ROWS": kind == "linear of rows", "OF_PIXELS": kind == "conv of pixels"}
    constants |= dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64) | ({"sums": None} if fused else {})
    code = compiled(multiply.fn, types, constants, capability)
    assert ON_TENSOR_CORES[capability] in code and ".s32.s8.s8" in code
    assert ("div.rn.f32" in code) == fused and "div.full" not in code


@needs_triton
@pytest.mark.parametrize("dynamic", [False, True])
def test_attention_compiles_to_integer_products(tmp_path, monkeypatch, dynamic):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from quest.kernels.triton.programs import attend

    kinds = (("", "*i8"), ("_sums", "*fp32"), ("_scale", "*fp32"), ("_zero", "*fp32"))
    types = {name + suffix: kind for name in "qkvp" for suffix, kind in kinds} | {"y": "*fp16", "scale": "fp32"}
    constants = dict(
        QMIN=0, QMAX=255, **dict.fromkeys(("OF_Q", "OF_K", "OF_V", "OF_P"), dynamic), BLOCK_M=64, BLOCK_N=64, BLOCK_D=64
    )
    code = compiled(attend, types, constants, 90)
    assert ON_TENSOR_CORES[90] in code and ".s32.s8.s8" in code and "div.rn.f32" in code


def test_scales_of_rows_are_computed_and_those_of_groups_refused():
    def format(axis, **of):
        return QParams(torch.tensor(1.0), torch.tensor(0.0), QuantSpec(8, axis=axis, **of))

    spec, conv = QuantSpec(8, axis=0), dict(groups=1, padding=(1, 1))
    for rows in ("token", "tensor"):
        assert triton.supports(weight(4, 32, bits=8), spec, format(-1, rows=rows)) is None
        assert triton.supports(weight(4, 32, 3, 3, bits=8), spec, format(1, rows=rows), **conv) is None
    groups = format(-1, rows="token", group=16)
    assert "groups of 16" in triton.supports(weight(4, 32, bits=8), spec, groups)
    token, channel = format(-1, rows="token"), format(-2, rows="token")
    assert triton.supports_attention(token, token, channel, token) is None
    assert "v: scales" in triton.supports_attention(token, token, token, token)


def test_signed_inputs_are_refused():
    one = torch.ones(1)
    signed, unsigned = (QParams(one, one * 0, QuantSpec(8, symmetric)) for symmetric in (True, False))
    weight = QTensor(torch.ones(2, 3), torch.ones(2, 1), torch.zeros(2, 1))
    spec = QuantSpec(8, axis=0)
    assert (
        triton.supports(weight, spec, signed) == "input: signed codes"
        and triton.supports(weight, spec, unsigned) is None
    )
    assert triton.supports_attention(unsigned, signed, unsigned, unsigned) == "k: signed codes"
    assert triton.supports_attention(unsigned, unsigned, unsigned, unsigned) is None
