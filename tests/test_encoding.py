"""Text is read and written in UTF-8 whatever the locale, and JSON by the functions that keep it JSON."""

import ast
import math
from pathlib import Path

import pytest

from quest.diffusion import captions
from quest.runtime.files import dumps, loads, read_json, read_lines, read_text, write_lines

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    file
    for folder in ("quest", "baselines", "workflow", "tests")
    for pattern in ("*.py", "*.smk")
    for file in (ROOT / folder).rglob(pattern)
) + [ROOT / "setup.py", ROOT / "Snakefile"]
# Position of the mode among the arguments of what opens a file.
OPENERS = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0, "Path.open": 0}
PROCESSES = {"run", "Popen", "check_output", "check_call", "call"}
# Whose `open` takes no text mode by default.
BINARY_OPENERS = {"Image", "os", "tarfile", "zipfile", "tokenize", "gzip", "zip"}


def without_encoding(tree: ast.AST) -> list[int]:
    """Lines with a call that reads or writes text in whatever encoding the locale has."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        value = getattr(call.func, "value", None)
        owner = getattr(value, "id", getattr(value, "attr", ""))
        if "encoding" in keywords:
            continue
        if name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute):
            positional = 0 if name == "read_text" else 1
            text = len(call.args) <= positional
        elif name in PROCESSES and {"text", "universal_newlines"} & keywords.keys():
            text = True
        elif name in OPENERS and owner not in BINARY_OPENERS:
            place = 0 if name == "open" and isinstance(call.func, ast.Attribute) else OPENERS[name]
            mode = keywords.get("mode") or (call.args[place] if len(call.args) > place else None)
            default = "r" if "open" in name else "w+b"
            modes = [node.value for node in ast.walk(mode) if isinstance(node, ast.Constant)] if mode else [default]
            text = not any("b" in str(one) for one in modes)
        else:
            continue
        if text:
            found.append(call.lineno)
    return found


def python_of(file: Path) -> str:
    """The source; of a workflow file, the lines of Python that stand outside its rules."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        return text
    outside = []
    for line in text.splitlines():
        word = line.split(":")[0].split(" ")[0]
        if line and not line[0].isspace():
            python = word not in (
                "rule",
                "use",
                "checkpoint",
                "report",
                "include",
                "onerror",
                "onstart",
                "localrules",
                "wildcard_constraints",
            )
        outside.append(line if python else "")
    return "\n".join(outside)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_text_file_is_opened_as_utf8(file):
    assert without_encoding(ast.parse(python_of(file))) == []


# What is no file of ours: hashes of content, arguments of commands, and text that people read.
JSON_ELSEWHERE = {
    "quest/diffusion/declared.py",  # files of diffusers, which hold infinite numbers
    "quest/runtime/files.py",
    "quest/runtime/provenance.py",
    "quest/runtime/resume.py",
    "quest/report/ablations.py",
    "quest/report/evidence.py",
    "quest/report/settle/__init__.py",
    "quest/report/settle/lottery.py",
    "workflow/scripts/ablations.py",
    "workflow/scripts/evidence.py",
    "workflow/scripts/growth.py",
    "workflow/scripts/model.py",
    "workflow/scripts/quantize.py",
    "workflow/scripts/search.py",
    "workflow/scripts/settle.py",
    "workflow/scripts/tuning.py",
}


def test_json_is_read_and_written_by_one_pair_of_functions():
    found = {
        str(file.relative_to(ROOT))
        for file in SOURCES
        if file.suffix == ".py" and file.relative_to(ROOT).parts[0] != "tests"
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "json"
    }
    assert found - JSON_ELSEWHERE == set()


def test_what_is_not_finite_is_null_in_json_and_not_a_number_again():
    rows = {"rows": [{"value": math.nan, "low": -math.inf, "high": 1.5, "note": None}], "resampled": (math.inf, 0.5)}
    text = dumps(rows)
    assert text == '{"rows": [{"value": null, "low": null, "high": 1.5, "note": null}], "resampled": [null, 0.5]}'
    (row,), resampled = (again := loads(text, "x"))["rows"], again["resampled"]
    assert math.isnan(row["value"]) and math.isnan(row["low"]) and (row["high"], row["note"]) == (1.5, None)
    assert math.isnan(resampled[0]) and resampled[1] == 0.5 and dumps(again) == text


@pytest.mark.parametrize("text", ['{"a": NaN}', "[Infinity]", "[-Infinity]", "[1e999]", "{", "", "{'a': 1}"])
def test_what_is_not_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="a.json: not JSON: "):
        read_json(tmp_path / "a.json")


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode("latin-1"))
    for read in (read_text, read_lines, read_json, captions.load):
        with pytest.raises(ValueError, match="a.txt: not UTF-8"):
            read(tmp_path / "a.txt")


# What str.splitlines calls the end of a line, a line feed apart, and what text mode would change.
ENDS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r", "\r\u2028"]


def test_a_caption_keeps_its_place_whatever_it_holds(tmp_path):
    lines = [f"a {end}b{number}" for number, end in enumerate(ENDS)]
    (tmp_path / "c.txt").write_bytes("\n".join(lines).encode("utf-8"))
    assert captions.load(tmp_path / "c.txt") == lines
    write_lines(tmp_path / "again.txt", lines)
    assert read_lines(tmp_path / "again.txt") == lines == captions.load(tmp_path / "again.txt")
    with pytest.raises(ValueError, match="again.txt: a line holds a line feed"):
        write_lines(tmp_path / "again.txt", ["a\nb"])


def test_line_ends_and_marks_of_other_systems_are_no_part_of_a_caption(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo \r\n")
    assert captions.load(tmp_path / "c.txt") == ["one", "two"]


def test_no_line_reader_splits_at_what_unicode_calls_line_ends():
    """`splitlines` and iteration in text mode do; what they are left to is no data: messages, and what Linux tells."""
    allowed = {
        "quest/runtime/provenance.py",
        "quest/runtime/memory.py",
        "quest/benchmark/machine.py",
        "quest/benchmark/single_layers.py",
    }
    found = {
        str(file.relative_to(ROOT))
        for file in SOURCES
        if file.suffix == ".py" and file.relative_to(ROOT).parts[0] != "tests"
        for line in file.read_text(encoding="utf-8").split("\n")
        if ".splitlines(" in line and "str(error)" not in line
    }
    assert found - allowed == set()
