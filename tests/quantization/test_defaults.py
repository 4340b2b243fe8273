"""torch's default dtype and device are the caller's: nothing here is computed in them."""

import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import quest
from quest.quantization.timegroups import TimeGroups

ROOT = Path(__file__).parents[2]
CODE = sorted(
    file
    for where in ("quest/kernels", "quest/quantization", "quest/learning", "baselines", "quest/affine")
    for file in (ROOT / where).rglob("*.py")
)
INTEGERS = ("arange", "randperm")  # of integers, whatever the default dtype
FLOATS = ("empty", "zeros", "ones", "full", "tensor", "rand", "randn", "linspace", "eye", "randint", "empty_strided")


def without(text: str) -> list[str]:
    """Calls that make a tensor and leave its device, or its dtype, to torch."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
            continue
        name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
        needed = {"device"} if name in INTEGERS else {"device", "dtype"} if name in FLOATS else set()
        if not needed <= given:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("file", CODE, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_allocation_names_dtype_and_device(file):
    assert without(file.read_text(encoding="utf-8")) == []


def test_the_search_for_allocations_finds_them():
    assert without("torch.empty(3, device=d)\ntorch.arange(3)") == ["torch.empty(3, device=d)", "torch.arange(3)"]
    assert without("torch.zeros(3, dtype=t, device=d)\ntorch.arange(3, device=d)\nx.new_empty(3)\ntorch.cat([x])") == []


RECIPES = {
    "rtn": dict(samples=8),
    "quest-suite": dict(time_groups=3, tla_iterations=2, cma_iterations=2, samples=8),
    "q-diffusion": dict(samples=8, weight_iterations=2, activation_iterations=2, rows=16),
}


@pytest.mark.parametrize("method", RECIPES)
def test_quantizing_in_another_default_dtype_gives_the_same_codes(method, uncond_pipe, uncond_calibration, tmp_path):
    files = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            q = quest.quantize(uncond_pipe, method, "w4a8", calibration=uncond_calibration, **RECIPES[method])
            files.append(tmp_path / f"{dtype}.safetensors")
            quest.save(q, files[-1])
        finally:
            torch.set_default_dtype(torch.float32)
    first, *others = map(load_file, files)
    for other in others:
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_timestep_keeps_its_digits():
    groups = TimeGroups([801, 800])
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert groups.index(801.0).tolist() == [0] and groups.index(800.0).tolist() == [1]
        with pytest.raises(ValueError, match="timestep 802 is above"):
            groups.enter(802)
    finally:
        torch.set_default_dtype(torch.float32)
