"""Files of configs: which are read, and which are refused in one line; no two have one name."""

from pathlib import Path

import pytest

from quest.__main__ import main as command_line
from quest.config import (
    ConfigError,
    check_names,
    read,
)

CONFIGS = sorted(Path(__file__).parents[1].glob("workflow/config/*.yaml"))


@pytest.mark.parametrize(
    "text, words",
    [
        ("name: a\nmodels: {}\nname: b\n", ["a.yaml, line 3", "'name' stands twice", "line 1"]),
        ("name: a\nmodels:\n  m: {images: 2, images: 4}\n", ["line 3", "'images' stands twice"]),
        ("methods:\n  rtn: {}\n  quest: {}\n  rtn: {samples: 8}\n", ["line 4", "'rtn' stands twice", "line 2"]),
        ("name: a\nmodels: {8: {}}\n", ["line 2", "key 8 is not text"]),
        ("name: a\nmodels: {on: {}}\n", ["line 2", "key True is not text"]),
        ("- a\n- b\n", ["a.yaml", "no keys"]),
        ("", ["a.yaml", "no keys"]),
        ("name: \xe9\n", ["a.yaml", "not UTF-8"]),
        ("name: {a\n", ["a.yaml", "not YAML", "line"]),
    ],
)
def test_a_file_is_refused_in_one_line(tmp_path, text, words):
    (tmp_path / "a.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []
    with pytest.raises(SystemExit, match="a.yaml"):
        command_line(["plan", str(tmp_path / "a.yaml")])


def test_a_merged_mapping_is_no_second_key(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, x: 2}\n", encoding="utf-8")
    assert read(tmp_path / "a.yaml") == {"a": {"x": 1}, "b": {"x": 2}}


def test_two_configs_with_one_name(tmp_path):
    for file, name in {"a.yaml": "same", "b.yaml": "same", "c.yaml": "other"}.items():
        (tmp_path / file).write_text(f"name: {name}\n", encoding="utf-8")
    check_names([tmp_path / "a.yaml", tmp_path / "c.yaml", tmp_path / "a.yaml"])
    with pytest.raises(ConfigError, match="'same'.*a.yaml.*b.yaml"):
        check_names(tmp_path.glob("*.yaml"))


def test_a_config_that_is_no_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("name: [", encoding="utf-8")
    with pytest.raises(ConfigError, match="a.yaml: not YAML: .*line 1") as caught:
        check_names([tmp_path / "a.yaml"])
    assert "\n" not in str(caught.value)


def test_shipped_names_differ():
    check_names(CONFIGS)
