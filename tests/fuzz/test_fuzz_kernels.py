"""Random and hostile layers, attentions and denoisers on the integer kernel, against the reference or float64."""

import copy
import ctypes
import mmap

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quest
from quest.affine import QParams, QuantSpec
from quest.kernels.cpu import core, integer
from quest.quantization import ranges
from quest.quantization.layers import quantized
from quest.quantization.placement import place

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(not core.available(), reason="no compiled core: installed without a C++ compiler"),
]
REFUSED = (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool, torch.complex64)


@pytest.fixture(autouse=True)
def setting(draw):
    """Any instruction set of this machine, one thread or two, no gradients."""
    core.use(draw.choice(core.instruction_sets()))
    torch.set_num_threads(draw.choice((1, 1, 1, 2)))
    with torch.no_grad():
        yield
    torch.set_num_threads(1)
    core.use(core.best())


def guarded(x: Tensor, end: bool) -> Tensor:
    """x where its last value, or its first, lies beside memory that nobody may read."""
    page, size = mmap.PAGESIZE, x.numel() * x.element_size()
    pages = -(-size // page)
    area = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for outside in (start, start + (pages + 1) * page):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(outside), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(area, dtype=x.dtype, offset=page + (pages * page - size) * end, count=x.numel())
    return flat.as_strided(x.shape, x.stride()).copy_(x)


LAYOUTS = (
    lambda x: x,
    lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    lambda x: torch.stack([x, x], -1)[..., 1],
    lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    lambda x: torch.view_as_complex(torch.stack([x, -x], -1)).conj().imag,
    lambda x: x[:1].expand_as(x),
    lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x,
    lambda x: guarded(x, False),
    lambda x: guarded(x, True),
)


def values(draw, shape: tuple[int, ...], qparams: QParams) -> Tensor:
    """About as wide as the codes, anywhere in memory; sometimes not finite, huge, tiny, or of another dtype."""
    scale, zero_point, spec = qparams
    x = (torch.randn(shape) * 2.0 ** (spec.bits - 2) + (spec.qmin + spec.qmax) / 2 - zero_point) * scale
    if not x.numel() or not x.ndim or draw.random() < 0.08:
        return x.to(draw.choice((torch.float32, *DTYPES)))
    for _ in range(draw.choice((0, 0, 1, 3))):
        x.view(-1)[draw.randrange(x.numel())] = draw.choice(
            (torch.inf, -torch.inf, 3e38, -3e38, 1e-42, -0.0, torch.nan)
        )
    return draw.choice(LAYOUTS)(x)


def drawn_range(draw, spec: QuantSpec) -> QParams:
    """Sometimes where no calibration would put it."""
    scale = draw.choice((1e-38, 1e-20, 1e-8, 1e8, 1e20)) if draw.random() < 0.1 else 10 ** draw.uniform(-4, 1)
    inside = draw.randint(spec.qmin, spec.qmax)
    zero_point = 0 if spec.symmetric else draw.choice((inside, inside, inside, -draw.randint(1, 300), 900, 40_000))
    return QParams(torch.tensor(scale), torch.tensor(zero_point + 0.5 * (draw.random() < 0.03)), spec)


def drawn_spec(draw) -> QuantSpec:
    symmetric = draw.random() < 0.2
    return QuantSpec(draw.choice((2, 3, 4, 4, 5, 6, 7, 8, 8, 8)), symmetric, wide=symmetric and draw.random() < 0.3)


def dequantized(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec) -> Tensor:
    """Equations 2-3 in float64, rounded where float32 rounds; infinite values have the first or the last code."""
    low, high = (spec.qmin - zero_point).double(), (spec.qmax - zero_point).double()
    return (x.float() / scale).round().double().clamp(low, high) * scale.double()


def check(compute, expected: Tensor | None, bound: Tensor | None, refused: bool, may: bool, said: str) -> None:
    """Refused where that is right and elsewhere within the bound; where float32 overflows, anything goes.

    `refused`: it must be; `may`: it may be, or compute.
    """
    try:
        y = compute()
    except REFUSED as error:
        assert refused or may, f"refused: {error!r}: {said}"
        return
    assert not refused or not y.numel(), f"not refused: {said}"
    if not refused:
        assert y.shape == expected.shape and (may or y.dtype == torch.float32), f"{y.dtype} {tuple(y.shape)}: {said}"
        right = ((y - expected).abs() <= bound + 1e-37) | (bound > 1e31) | (expected.isnan() & y.isnan())
        wrong = f"{int((~right).sum())} of {y.numel()} wrong: {y[~right][:3]}, not {expected[~right][:3]}: {said}"
        assert right.all(), wrong


class Denoiser(nn.Module):
    """One layer, as `place` takes a denoiser."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer


def drawn_layer(draw) -> tuple[nn.Linear | nn.Conv2d, tuple[int, ...]]:
    """A layer, and the shape of an input that it takes or, sometimes, does not take."""

    def pair(low, high):
        return draw.randint(low, high), draw.randint(low, high)

    bias = draw.random() < 0.7
    if draw.random() < 0.4:
        inputs, outputs = (draw.choice((1, 3, 64, 257, 1023, *pair(1, 70))) for _ in range(2))
        layer, shape = nn.Linear(inputs, outputs, bias), (2, draw.choice((0, 1, 2, 33, 300)), inputs)
        shape = shape[-draw.randint(1, 3) :]
    else:
        groups, far = draw.choice((1, 1, 1, 2, 3)), draw.choice((2, 9))
        conv = draw.choice((dict(padding=1), dict(stride=pair(1, far), padding=pair(0, far), dilation=pair(1, 3)), {}))
        inputs, outputs = (groups * draw.randint(1, 40 // groups) for _ in range(2))
        layer = nn.Conv2d(inputs, outputs, draw.choice((1, 3, pair(1, 5))), groups=groups, bias=bias, **conv)
        shape = (draw.choice((0, 1, 2, 3)), inputs, *pair(1, 14))[draw.random() < 0.1 :]
    if draw.random() < 0.06:
        shape = draw.choice(((2, *shape), shape[1:], (*shape[:-1], shape[-1] + 1), (shape[0], 0, *shape[2:])))
    if draw.random() < 0.2:
        layer.weight.data *= draw.choice((1e-30, 1e10, 0))
    return layer.requires_grad_(False), shape


@pytest.mark.fuzz(share=5)
def test_layers(draw):
    """Exact but for 4e-7 of what is summed; NaN, and whatever torch refuses, is refused."""
    (new, shape), spec = drawn_layer(draw), drawn_spec(draw)
    qparams = drawn_range(draw, spec)
    layer = quantized(new, QuantSpec(draw.choice((2, 3, 4, 8, 8)), axis=draw.choice((0, 0, 0, None))), spec, None)
    layer.choose_weight_range(ranges.minmax)
    if draw.random() < 0.1:
        layer.weight_quantizer.zero_point += draw.choice((-40, 300, 40_000))
    weight = dequantized(new.weight, *layer.weight_quantizer.qparams)
    layer.input_quantizer.scale.data, layer.input_quantizer.zero_point = qparams.scale[None], qparams.zero_point[None]
    exact = not place(Denoiser(layer), "integer").refused
    x = values(draw, shape, qparams)
    operation = new._conv_forward if isinstance(new, nn.Conv2d) else F.linear
    try:
        q, bias = dequantized(x, *qparams), None if new.bias is None else new.bias.double()
        expected = operation(q, weight, bias)
        bound = operation(q.abs(), weight.abs(), bias if bias is None else bias.abs()) * (4e-7 if exact else 2e-5)
    except REFUSED:
        expected = bound = None
    other = x.dtype != torch.float32
    refused = expected is None or exact and (other or bool(x.isnan().any()))
    said = f"{layer}, {qparams}, input {x.dtype} {tuple(x.shape)} {x.stride()}"
    check(lambda: layer(x), expected, bound, refused, other, said)
    if exact and not refused and expected.numel():
        residual = draw.choice(LAYOUTS)(torch.randn(expected.shape))
        wider = bound + 4e-7 * residual.abs()
        check(lambda: layer(x, residual=residual), expected + residual.double(), wider, False, False, said)


@pytest.mark.fuzz(share=2)
def test_attentions(draw):
    """Both products, exact but for probabilities at a tie in float64, which may have the neighbouring code."""
    batch, heads, d = draw.choice((0, 1, 1, 2, 3)), draw.randint(1, 4), draw.choice((0, 1, 7, 8, 40, 64, 80, 160))
    n, m = (draw.choice((0, 1, 2, 7, 16, 33, 63, 64, 131)) for _ in range(2))
    shapes = [[batch, heads, length, d] for length in (n, m, m)]
    if draw.random() < 0.12:
        shapes[draw.randrange(3)][draw.randrange(4)] += draw.choice((1, 2))
    spec, p_spec = drawn_spec(draw), QuantSpec(draw.choice((4, 8, 8, 8)))
    step = torch.tensor(draw.choice((0.3, 1.0)) / p_spec.qmax)
    params = [*(drawn_range(draw, spec) for _ in range(3)), QParams(step, torch.tensor(0.0), p_spec)]
    if integer.supports_attention(*(QParams(p.scale[None], p.zero_point[None], p.spec) for p in params)):
        return
    factor = draw.choice((d**-0.5 if d else 1.0, 1e-3, 30.0))
    factor /= max((params[0].scale * params[1].scale).item() * 4**spec.bits, 1e-37)
    rows = [values(draw, tuple(shape), each) for shape, each in zip(shapes, params, strict=False)]
    try:
        q, k, v = (dequantized(t, *param) for t, param in zip(rows, params, strict=False))
        if k.shape[:-2] != q.shape[:-2] or k.shape[:-1] != v.shape[:-1]:
            raise ValueError("torch.bmm does not broadcast")
        scores = factor * q @ k.mT
        codes = scores.softmax(-1) / step.double()
        expected = codes.round().clamp(0, p_spec.qmax) * step.double() @ v
        # Scores in float32, and their exponentials, differ by this share.
        span = scores.abs().amax((-1, -2), keepdim=True) if scores.numel() else scores
        tied = ((codes % 1 - 0.5).abs() < codes * (4e-6 + 4e-7 * span) + 1e-4).double()
        bound = (tied + 4e-7 * codes.round()) * step.double() @ v.abs() * 1.0001
    except REFUSED:
        expected = bound = None
    refused = expected is None or any(t.dtype != torch.float32 or t.isnan().any() for t in rows)
    said = f"{params}, scale {factor}, " + ", ".join(f"{t.dtype} {tuple(t.shape)} {t.stride()}" for t in rows)
    check(lambda: integer.attention(*rows, params, factor), expected, bound, refused, False, said)


@pytest.fixture(scope="module")
def denoisers(text_pipe, text_calibration) -> tuple[nn.Module, nn.Module]:
    """A tiny U-Net with a context and time groups, on the reference and on integers."""
    recipe = dict(tla_iterations=1, cma_iterations=1, time_groups=3, samples=2)
    with torch.enable_grad():
        plain = quest.quantize(text_pipe, "quest-suite", "w8a8", calibration=text_calibration, **recipe).unet
    unet = copy.deepcopy(plain)
    place(plain, "reference")
    assert not place(unet, "integer").refused
    return plain, unet


def test_denoisers(draw, denoisers):
    """Whole blocks: contexts and images of other sizes, batches, dtypes and layouts, any timestep, no samples."""
    torch.set_num_threads(1)  # those of torch wait long for each other where the machine is busy
    batch, size = draw.choice((0, 1, 2, 2, 3)), draw.choice(((8, 8), (8, 8), (2, 4), (12, 6), (7, 8), (1, 1)))
    context = draw.choice((batch,) * 9 + (1,)), draw.choice((0, 1, 2, 5, 17, 64)), draw.choice((32,) * 9 + (31,))
    inputs = [torch.randn(batch, draw.choice((4,) * 9 + (5,)), *size), torch.randn(context)]
    inputs = [draw.choice(LAYOUTS)(x) if x.numel() else x for x in inputs]
    other = draw.random() < 0.1
    if other:
        inputs[draw.randrange(2)] = inputs[0].to(draw.choice(DTYPES))
    sample, context = inputs
    step = draw.choice((draw.randint(0, 900), torch.tensor(500.0), torch.full((batch,), 3), torch.tensor([901]), -1))
    said = f"{[(x.dtype, tuple(x.shape), x.stride()) for x in inputs]}, step {step}"
    plain, unet = (
        (lambda model=model: model(sample, step, encoder_hidden_states=context).sample) for model in denoisers
    )
    try:
        expected = plain()
        bound = 0.1 * expected.norm()
    except REFUSED:
        expected = bound = None
    check(unet, expected, bound, expected is None, other, said)
