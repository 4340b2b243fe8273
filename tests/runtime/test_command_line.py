"""Every script takes its shared arguments from one parser, so that they mean the same everywhere."""

import ast
import gc
import sys
import weakref
from pathlib import Path

import pytest

from quest.runtime import command_line

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    file
    for folder in ("workflow/scripts", "quest/zoo", "quest/diffusion")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if "__main__" in file.read_text(encoding="utf-8")
]


def test_shared_arguments(capsys):
    parser = command_line.parser("What it does.", "model", "bits", "file", "threads")
    found = parser.parse_args(["scenes-text", "w4a4", "--out", "a.json"])
    assert (found.model, found.bits, found.output, found.threads) == ("scenes-text", "w4a4", Path("a.json"), 1)
    for wrong in ("0", "-1", "1.5", "two", "²"):
        with pytest.raises(SystemExit):
            parser.parse_args(["scenes-text", "w4a4", "-o", "a.json", f"--threads={wrong}"])
        assert f"--threads: {wrong!r} is not a whole number from 1 on" in capsys.readouterr().err


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_every_script_has_its_parser_from_here(file):
    calls = [node.func for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    names = {call.attr for call in calls if isinstance(call, ast.Attribute)}
    assert "parser" in names and "ArgumentParser" not in names


class Loop:
    """Garbage that only the collector finds."""

    def __init__(self):
        self.own = self


def test_imports_collect_nothing_and_keep_no_garbage_of_a_process_that_has_torch(monkeypatch):
    def collected():
        loop = weakref.ref(Loop())
        with command_line.imports():
            on = gc.isenabled()
        gc.collect()
        return on, loop() is None and gc.isenabled()

    monkeypatch.setitem(sys.modules, "torch", sys)
    assert collected() == (True, True)
    monkeypatch.delitem(sys.modules, "torch")
    try:
        assert collected() == (False, False)
    finally:
        gc.unfreeze()
