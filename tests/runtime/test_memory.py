"""Amounts of memory, and tensors that wait in memory or in files."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quest.config import ConfigError, read, validate
from quest.runtime import memory
from quest.runtime.memory import Waiting, parse


@pytest.mark.parametrize(
    "value, size",
    [(5, 5), ("20GB", 20 * 10**9), ("1.5 gb", 15 * 10**8), ("300MB", 3 * 10**8), ("7", 7), ("2 KB", 2000)],
)
def test_amounts(value, size):
    assert parse(value) == size


@pytest.mark.parametrize("value", [0, -1, "", "GB", "20GiB", "1e9", "ten", True, None, "0.5", [1]])
def test_bad_amounts_are_named(value):
    with pytest.raises(ValueError, match="memory: .* is no amount of memory; valid: bytes, or a text such as"):
        parse(value)


def test_the_budget_is_the_limit_or_what_is_free(monkeypatch):
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    assert 0 < memory.budget() < 2**50
    monkeypatch.setenv(memory.VARIABLE, "1MB")
    assert memory.budget() == memory.budget("cuda") == 10**6
    assert memory.waiting().budget == 500_000 < memory.waiting("cuda").budget
    monkeypatch.setenv(memory.VARIABLE, "much")
    with pytest.raises(ValueError, match="memory: 'much' is no amount"):
        memory.budget()


def test_what_is_left_is_the_budget_less_what_the_process_holds(monkeypatch):
    monkeypatch.delenv(memory.VARIABLE, raising=False)
    assert 0 < memory.left() <= memory.field("/proc/meminfo", "MemTotal")
    held = memory.field("/proc/self/status", "VmRSS")
    with memory.limited(int(held) + 10**8):
        assert 0 < memory.left() < 2 * 10**8
    with memory.limited(int(held) // 2):
        assert memory.left() < 0
    with memory.limited(2**60):
        assert memory.left() <= memory.free() + 10**9


def test_ulimit_counts_as_memory():
    code = "from quest.runtime.memory import free; print(free())"
    limit = 2 * 10**9
    found = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    assert 0 < int(found.stdout) < limit


@pytest.mark.parametrize("budget", [0, 2**40])
def test_rows_wait_with_the_layout_of_a_chunk(budget):
    waiting = Waiting(budget)
    image = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    inner = torch.randn(3, 6, 4).transpose(1, 2)
    for part in (image, inner, image[:1], torch.randn(4, 3).T, torch.arange(6).reshape(3, 2)):
        whole = waiting.rows(part, 9)
        assert whole.shape == (9, *part.shape[1:]) and whole.dtype == part.dtype and whole.data_ptr() % 64 == 0
        whole[: len(part)] = part
        assert torch.equal(whole[: len(part)], part)
        assert (waiting.in_memory > 0) == (budget > 0)
    assert waiting.rows(image, 9).is_contiguous(memory_format=torch.channels_last)
    assert waiting.rows(inner, 9).stride() == (24, 1, 4)
    del whole, part
    assert waiting.held == waiting.in_memory == 0 and waiting.most > 0


def test_what_exceeds_the_budget_lies_in_files_until_there_is_room_again():
    waiting, part = Waiting(1000), torch.zeros(1, 100)
    first = waiting.rows(part, 2)
    second = waiting.rows(part, 2)
    assert (waiting.in_memory, waiting.held) == (800, 1600)
    del first
    third = waiting.rows(part, 1)
    assert (waiting.in_memory, waiting.held, waiting.most) == (400, 1200, 1600)
    assert second.numel() + third.numel() == 300


def test_the_budget_of_a_config_is_checked():
    smoke = read(Path(__file__).parents[2] / "workflow/config/smoke.yaml")
    for value in ("20GB", 20 * 10**9):
        validate(smoke | {"memory": value})
    with pytest.raises(ConfigError, match="memory: '20 GiB' is no amount of memory; valid"):
        validate(smoke | {"memory": "20 GiB"})
