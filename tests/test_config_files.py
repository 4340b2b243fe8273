"""Files of configs: which are read, and which are refused in one line; no two have one name."""

from pathlib import Path

import pytest

from quest.__main__ import main as command_line
from quest.config import (
    ConfigError,
    check_names,
    old_names,
    read,
    schema_validators,
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


def test_old_names_of_methods_go_on_working_in_a_file(tmp_path, capsys):
    """As a row, in the grid, under init, method, of and against; one line says so. Other words stay."""
    old_names._notice.cache_clear()
    text = """
        name: quest
        models: {quest: {images: 2}}
        grid: [{model: [quest], method: [rtn, quest], bits: [w4a4]}]
        seeds: {method: [quest], bits: [w4a4], seed: [0, 1]}
        methods: {quest: {init: rtn}, mine: {method: quest, init: quest}}
        ablations: {against: quest, rows: {quest-groups-5: {of: quest}, other: {method: quest}}}
    """
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert read(tmp_path / "a.yaml") == {
        "name": "quest",
        "models": {"quest": {"images": 2}},
        "grid": [{"model": ["quest"], "method": ["rtn", "quest-suite"], "bits": ["w4a4"]}],
        "seeds": {"method": ["quest-suite"], "bits": ["w4a4"], "seed": [0, 1]},
        "methods": {"quest-suite": {"init": "rtn"}, "mine": {"method": "quest-suite", "init": "quest-suite"}},
        "ablations": {
            "against": "quest-suite",
            "rows": {"quest-groups-5": {"of": "quest-suite"}, "other": {"method": "quest-suite"}},
        },
    }
    assert capsys.readouterr().err == "quest: the method is called quest-suite now; write the new name\n"
    (tmp_path / "b.yaml").write_text("methods: {quest: {}, quest-suite: {}}", encoding="utf-8")
    with pytest.raises(ConfigError, match="methods.quest: the old name of quest-suite, which stands beside it"):
        read(tmp_path / "b.yaml")


def test_no_method_has_an_old_name():
    known = schema_validators()[1]
    assert not set(old_names.RENAMED) & set(known) and set(old_names.RENAMED.values()) <= set(known)
