"""Report what works on this machine and why the rest does not: kernels, devices, weights, rivals of the benchmark."""

import os
import shutil
from importlib import metadata

import torch
from torch.nn import functional as F

from quest import kernels
from quest.affine import QParams, QTensor, QuantSpec, quantize
from quest.diffusion.denoisers import NAMES
from quest.diffusion.models import MODELS, ZOO
from quest.metrics import weights
from quest.runtime.provenance import provenance

TOLERANCE = 1e-5  # largest error over largest output; float rounding stays below


def report() -> tuple[list[tuple[str, str, str]], bool]:
    """Findings as (subject, "ok", "--" or "FAILED", explanation), and whether the reference kernel is correct.

    Everything can run on the reference kernel. "--" marks what is absent or unusable here but that nothing else needs.
    """
    reference = deviation("reference", torch.device("cpu"))
    sound = reference is not None and reference < TOLERANCE
    findings = [("machine", "ok", _machine()), ("threads", "ok", _threads())]
    findings += [_kernel(name, torch.device("cpu")) for name in ("reference", "integer")]
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    findings += [("integer: path", *_path()), _cuda(), _kernel("triton", gpu)]
    chosen = kernels.choose("auto", torch.device("cpu"))
    findings.append(("kernel auto", "ok", f"{chosen} on a CPU, reference on a GPU"))
    findings += _weights() + _models() + _extras()
    return findings, sound


def text(findings: list[tuple[str, str, str]]) -> str:
    """The findings of `report` as lines of text."""
    width = max(len(what) for what, *_ in findings)
    return "\n".join(f"{state:>6}  {what:<{width}}  {words}" for what, state, words in findings) + "\n"


@torch.no_grad()
def deviation(kernel: str, device: torch.device) -> float | None:
    """Largest error of a kernel's linear layer against float64, over the largest output; None if one is not finite."""
    generator = torch.Generator().manual_seed(0)
    column = torch.rand(24, 1, generator=generator) * 0.01 + 1e-3
    codes = torch.randint(0, 256, (24, 37), generator=generator).float()
    weight = QTensor(codes, column, torch.full((24, 1), 120.0))
    params = QParams(torch.tensor(0.05), torch.tensor(100.0), QuantSpec(8))
    x, bias = torch.randn(19, 37, generator=generator) * 3, torch.randn(24, generator=generator)
    exact = F.linear(_exact(quantize(x, params)), _exact(weight), bias.double())
    module = kernels.get(kernel)
    output = module.linear(
        x.to(device),
        QParams(params.scale.to(device), params.zero_point.to(device), params.spec),
        module.pack(QTensor(codes.to(device), column.to(device), weight.zero_point.to(device))),
        bias.to(device),
    ).cpu()
    if not output.isfinite().all():
        return None
    return ((output - exact).abs().max() / exact.abs().max()).item()


def _exact(q: QTensor):
    return (q.codes.double() - q.zero_point.double()) * q.scale.double()


def _machine():
    record = provenance()
    return f"{record['machine']['cpu']}, {record['machine']['system']}, Python {record['versions']['python']}"


def _threads():
    limit = os.environ.get("OMP_NUM_THREADS")
    why = f" (OMP_NUM_THREADS={limit})" if limit else ""
    return f"{torch.get_num_threads()} of {os.cpu_count()} cores{why}; scripts take --threads, rules have one each"


def _kernel(name, device):
    """The finding for a kernel, which is tried if it is available."""
    what = f"kernel {name}"
    if device is None:
        return what, "--", "it needs a CUDA GPU, and there is none"
    if reason := kernels.get(name).unavailable(device):
        return what, "--", reason
    try:
        difference = deviation(name, device)
    except (RuntimeError, OSError) as error:
        return what, "FAILED", (str(error) or type(error).__name__).splitlines()[0]
    if difference is None:
        return what, "FAILED", "a layer's output is not finite"
    words = f"a layer differs from the exact sums by {difference:.1g} of its largest output"
    return what, "ok" if difference < TOLERANCE else "FAILED", words


def _path():
    """The finding for the instruction set that the integer kernel uses, and why it uses no better one."""
    from quest.kernels.cpu import integer
    from quest.kernels.cpu.core import best

    if integer.unavailable(torch.device("cpu")):
        compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        status = f"{compiler} is there" if compiler else "there is no C++ compiler"
        return "--", f"{status}; `pip install -e .` builds the core if there is a compiler"
    isa, forced = best(), os.environ.get("QUEST_ISA")
    if forced:
        return "ok", f"{isa}, as QUEST_ISA says"
    lacking = {
        "portable": "neither AVX2 and FMA nor dot products of NEON on this processor: correct, but slower than float32",
        "avx2": "no VNNI on this processor, which multiplies and adds in one instruction",
        "avxvnni": "no AVX-512 on this processor, whose vectors are twice as long",
    }
    return "ok", isa + (f": {lacking[isa]}" if isa in lacking else "")


def _cuda():
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return "device cuda", "ok", ", ".join(names)
    if torch.version.cuda is None:
        return "device cuda", "--", f"torch {torch.__version__} was built without CUDA"
    return "device cuda", "--", "no GPU, or no driver for it"


def _weights():
    findings = []
    for name, known in weights.WEIGHTS.items():
        file = weights.folder() / known.file
        if not file.is_file():
            words = f"not in {weights.folder()} (QUEST_WEIGHTS names another folder); fetched when first needed"
            findings.append((f"weights {name}", "--", words))
            continue
        right = weights.sha256_of(file) == known.sha256
        findings.append((f"weights {name}", *(("ok", str(file)) if right else ("FAILED", f"{file} has another hash"))))
    return findings


def _models():
    findings = []
    for name, model in MODELS.items():
        if model.origin is None:
            ships = any(file for part in NAMES for file in (ZOO / name / part).glob("*.safetensors"))
            findings.append((f"model {name}", "ok" if ships else "--", "ships" if ships else f"not in {ZOO / name}"))
    return findings


def _extras():
    findings = []
    for package in ("openvino", "nncf", "torchao"):
        try:
            findings.append((f"rival {package}", "ok", metadata.version(package)))
        except metadata.PackageNotFoundError:
            findings.append(
                (f"rival {package}", "--", 'not installed: pip install -e ".[kernels]"; only timed against')
            )
    return findings
