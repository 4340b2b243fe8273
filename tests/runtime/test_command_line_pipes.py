"""A command whose reader has gone, as in `python -m quest settle | head`, ends without a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRINTS = "from quest.runtime.command_line import may_lose_reader; may_lose_reader(); print('x' * 100_000)"


def ended(*words):
    """The exit code of a program, and what it said, after the reader of its output has gone."""
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    ) as run:
        run.stdout.close()
        said = run.stderr.read()
    return run.returncode, said


@pytest.mark.parametrize(
    "words, code",
    [
        (["-m", "quest", "--help"], 0),
        (["-u", "-m", "quest", "plan", "--help"], 0),
        (["-m", "workflow.scripts.seeds", "--help"], 0),
        (["-c", PRINTS], 1),
    ],
)
def test_the_reader_may_go(words, code):
    assert ended(*words) == (code, "")


def test_other_pipes_are_no_excuse():
    code = f"{PRINTS.replace('100_000', '0')}; raise BrokenPipeError('another')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 1 and "BrokenPipeError: another" in run.stderr
