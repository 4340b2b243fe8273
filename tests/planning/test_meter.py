"""What a copy of the process takes: its own processor time, and the memory that the system cannot drop."""

import time

import numpy as np
import pytest

from quest.planning import meter


def test_time_and_memory_of_a_copy(tmp_path):
    before = np.ones(4_000_000)  # 32 MB that are there already

    def work():
        held = np.ones(6_000_000)  # 48 MB
        start = time.process_time()
        while time.process_time() < start + 0.2:
            before[0] += held[0]
        print("done")

    cost = meter.in_copy(work, tmp_path / "log")
    assert 0.2 <= cost["seconds"] < 0.5 and 47 < cost["memory_mb"] < 60
    assert before[0] == 1 and (tmp_path / "log").read_text(encoding="utf-8") == "done\n"


def test_pages_of_files_do_not_count(tmp_path):
    np.ones(4_000_000).tofile(tmp_path / "values")

    def work():
        assert np.memmap(tmp_path / "values", np.float64).sum() == 4_000_000
        time.sleep(5 * meter.PAUSE)

    assert meter.in_copy(work, tmp_path / "log")["memory_mb"] < 10


def test_work_that_fails_names_its_log(tmp_path):
    def work():
        raise SystemExit("no such file")

    with pytest.raises(ChildProcessError, match=str(tmp_path / "log")):
        meter.in_copy(work, tmp_path / "log")
    assert "no such file" in (tmp_path / "log").read_text(encoding="utf-8")
