"""A command whose reader has gone, as in `python -m quest settle | head`, ends without a traceback."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from quest import __main__ as command

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
        (["-m", "workflow.scripts.tables", "--help"], 0),
        (["-c", PRINTS], 1),
    ],
)
def test_the_reader_may_go(words, code):
    assert ended(*words) == (code, "")


def test_other_pipes_are_no_excuse():
    code = f"{PRINTS.replace('100_000', '0')}; raise BrokenPipeError('another')"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 1 and "BrokenPipeError: another" in run.stderr


@pytest.mark.parametrize("line, code, told", [("exec {} >&-", 0, []), ("exec {} > /dev/full", 1, ["OSError"])])
def test_without_a_standard_output_or_space_nothing_of_ours_fails(line, code, told):
    python = f"{sys.executable} -c {shlex.quote(PRINTS)}"
    run = subprocess.run(["sh", "-c", line.format(python)], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == code and "atexit" not in run.stderr
    assert [line.partition(":")[0] for line in run.stderr.splitlines() if "Errno" in line][:1] == told


@pytest.mark.parametrize(
    "words, error, ends",
    [
        (["doctor"], BrokenPipeError("of another pipe"), BrokenPipeError),
        (["doctor"], PermissionError(13, "Permission denied", "x"), "doctor: .*Permission denied: 'x'"),
        (["judge", "a", "b"], PermissionError(13, "Permission denied", "x"), "^3$"),
        (["judge", "a", "b"], BrokenPipeError("of another pipe"), "^3$"),
        (["judge", "a", "b"], RuntimeError("a fault"), "^3$"),  # not 1, the verdict "worse"
    ],
)
def test_an_error_is_no_lost_reader_and_no_verdict(words, error, ends, monkeypatch):
    def fail(_options):
        raise error

    monkeypatch.setattr(command, f"_{words[0]}", fail)
    with pytest.raises(SystemExit if isinstance(ends, str) else ends, match=ends if isinstance(ends, str) else None):
        command.main(words)
