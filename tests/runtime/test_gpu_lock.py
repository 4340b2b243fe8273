import os
import signal
import subprocess
import sys

import pytest
import torch

from quest.runtime import gpu_lock, memory

DEVICES = ["GPU-a", "GPU-b"]
# Takes a device, says which, and keeps it until its input ends.
JOB = """
import sys
from pathlib import Path
from quest.runtime import gpu_lock
print(gpu_lock.hold({devices}, Path({folder!r}), pause=0.05), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path):
    """Start a job that takes one of DEVICES."""
    jobs = []

    def job():
        command = [sys.executable, "-c", JOB.format(devices=DEVICES, folder=str(tmp_path))]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        jobs.append(subprocess.Popen(command, text=True, **pipes, encoding="utf-8"))
        return jobs[-1]

    yield job
    for one in jobs:
        one.kill()
        one.wait()
        for pipe in (one.stdin, one.stdout, one.stderr):
            pipe.close()


def test_each_job_has_a_device_of_its_own_and_a_killed_one_gives_it_back(start):
    first, second = start(), start()
    assert {first.stdout.readline(), second.stdout.readline()} == {"0\n", "1\n"}
    third = start()
    assert "all 2 GPUs are taken" in third.stderr.readline()
    os.kill(second.pid, signal.SIGKILL)  # leaves its lock file behind, but no lock
    assert third.stdout.readline() in ("0\n", "1\n")
    fourth = start()
    assert "all 2 GPUs are taken" in fourth.stderr.readline()
    first.stdin.close()
    assert fourth.stdout.readline() in ("0\n", "1\n")


def test_a_device_is_known_by_its_name_not_by_its_place(tmp_path):
    """Slurm shows a job the devices it gave to it, numbered from 0."""
    assert gpu_lock.hold(["GPU-a"], tmp_path) == 0
    assert gpu_lock.hold(["GPU-a", "GPU-b"], tmp_path) == 1
    assert gpu_lock.hold(["GPU-c"], tmp_path) == 0


def test_jobs_share_a_device_where_their_parts_are_free(tmp_path, monkeypatch):
    def hold(*part):
        return gpu_lock.hold(DEVICES, tmp_path, part=part)

    def wait(_):
        raise TimeoutError

    monkeypatch.setattr(gpu_lock.time, "sleep", wait)
    assert [hold(2, 4), hold(3, 4), hold(2, 4)] == [0, 1, 0]
    for part in ((2, 4), (4, 4), (1, 1)):  # one part is free, of the second device
        with pytest.raises(TimeoutError):
            hold(*part)
    assert hold(1, 4) == 1  # those that waited hold nothing


def test_a_whole_device_is_not_shared(tmp_path, monkeypatch):
    assert gpu_lock.hold(DEVICES, tmp_path) == 0
    monkeypatch.setenv(gpu_lock.VARIABLE, "1/4")
    assert gpu_lock.hold(DEVICES, tmp_path, part=gpu_lock.parts()) == 1


def test_a_cpu_and_a_named_device_need_no_lease(monkeypatch):
    monkeypatch.setattr(gpu_lock, "hold", lambda devices: pytest.fail("took a lease"))
    for device in ("cpu", "cuda:1"):
        gpu_lock.take(device)


def test_a_job_that_shares_a_gpu_has_its_parts_of_the_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 6)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5)
    assert memory.budget("cuda") == 70 + 6 - 5
    monkeypatch.setenv(gpu_lock.VARIABLE, "2/8")
    assert memory.budget("cuda") == 20 - 5


def test_no_gpu(tmp_path):
    with pytest.raises(ValueError, match="there is no GPU here; valid: cpu"):
        gpu_lock.hold([], tmp_path)


def test_a_lock_follows_no_link_and_lies_in_a_folder_of_this_user(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine", encoding="utf-8")
    before = precious.stat()
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    (own / "GPU-a.lock").symlink_to(precious)
    with pytest.raises(OSError):
        gpu_lock.hold(["GPU-a"], own)
    (tmp_path / "link").symlink_to(own)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for folder in (tmp_path / "link", open_to_all):
        with pytest.raises(ValueError, match=f"{folder.name}: GPU locks need a folder that only this user"):
            gpu_lock.hold(["GPU-a"], folder)
    assert precious.stat().st_mtime_ns == before.st_mtime_ns
    assert gpu_lock.hold(["GPU-a"], tmp_path / "new") == 0
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
