"""What methods say of themselves, and what is made from it."""

import math
import re
import textwrap
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated

import pytest

import quest
from baselines import METHODS, MODULES
from baselines.method import Bits, Count, Method, Paper, Positive, Valid, check, keywords, one_of, schema, takes
from quest.config import weights_only
from quest.quantization.layer_names import KEEP, Keep
from workflow.scripts import generate

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    strength: Positive = 0.5
    kind: Annotated[str, one_of(("soft", "hard")), Valid(description="how")] = "soft"
    axis: Annotated[int | None, one_of((0, None))] = 0
    rows: Count | None = None
    bits: Bits = 8
    keep: Keep | None = None
    init: str | None = None
    exact: bool = False


@takes(Recipe)
def quantize(pipe, calibration, w: int, a: int, recipe: Recipe):
    """Return what came in."""
    return pipe, w, a, recipe


def test_every_file_generated_is_as_its_methods_say():
    stale = [
        str(path.relative_to(ROOT))
        for path, text in generate.texts().items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert stale == [], f"regenerate: {generate.COMMAND}"


def test_a_stale_file_is_replaced_and_never_half_written(tmp_path, monkeypatch):
    stale, before = tmp_path / "page.md", tmp_path / "before.md"
    stale.write_text("stale", encoding="utf-8")
    before.hardlink_to(stale)  # would change with the file if that were written in place
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "texts", lambda: {stale: "new"})
    monkeypatch.setattr("sys.argv", ["generate"])
    generate.main()
    assert [file.read_text(encoding="utf-8") for file in (stale, before)] == ["new", "stale"]


def test_every_method_is_in_the_registry():
    files = {
        path.stem
        for path in ROOT.glob("baselines/*.py")
        if re.search(r"^METHOD = ", path.read_text(encoding="utf-8"), re.M)
    }
    assert files == set(MODULES)
    assert weights_only() == [name for name, method in METHODS.items() if method.weights_only]


def test_names_are_given_once():
    """METHODS would hold the last of two rows of one name."""
    from importlib import import_module

    rows = [row.name for module in MODULES for row in import_module(f"baselines.{module}").METHOD.rows()]
    assert sorted(rows) == sorted(METHODS)


def test_the_fields_of_a_recipe_are_keywords():
    assert quantize("pipe", None, 4, 8, rows=3) == ("pipe", 4, 8, Recipe(rows=3))
    assert list(keywords(quantize)) == ["strength", "kind", "axis", "rows", "bits", "keep", "init", "exact"]
    assert quantize.__doc__ == "Return what came in." and keywords(quantize)["strength"].default == 0.5
    with pytest.raises(TypeError, match="strenght"):
        quantize("pipe", None, 4, 8, strenght=1)


def test_schemas_of_annotations():
    assert {name: schema(p) for name, p in keywords(quantize).items()} == {
        "strength": {"type": "number", "exclusiveMinimum": 0},
        "kind": {"enum": ["soft", "hard"], "description": "how"},
        "axis": {"enum": [0, None]},
        "rows": {"type": "integer", "minimum": 1},
        "bits": {"type": "integer", "minimum": 2, "maximum": 16},
        "keep": {"$ref": "#/$defs/keep"},
        "init": {"type": "string"},
        "exact": {"type": "boolean"},
    }
    number = keywords(quantize)["rows"].replace(annotation=Annotated[int, Valid(minimum=0, description="x")] | None)
    assert schema(number) == {"type": "integer", "minimum": 0, "description": "x"}
    for unknown in (list, "int", Parameter.empty):
        with pytest.raises(TypeError, match="rows.*annotate it as bool"):
            schema(number.replace(annotation=unknown))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"strength": 0}, "strength: 0 is out of bounds; valid: above 0"),
        ({"strength": math.nan}, "strength: nan is not a finite number"),
        ({"strength": math.inf}, "strength: inf is not a finite number"),
        ({"rows": 1.5}, "rows: 1.5 is not a whole number"),
        ({"rows": True}, "rows: True is not a whole number"),
        ({"kind": "solid"}, "kind: 'solid' is not one of soft, hard"),
        ({"rows": "64"}, "rows: '64' is not a whole number"),
        ({"rows": 0}, "rows: 0 is out of bounds; valid: 1 or more"),
        ({"bits": 17}, "bits: 17 is out of bounds; valid: 2 to 16"),
        ({"exact": True, "bits": 1}, "bits: 1 is out of bounds; valid: 2 to 16"),
        ({"exact": "no"}, "exact: 'no' is not one of True, False"),
        ({"kind": None}, "kind: None is no value of it; leave it out for 'soft'"),
        ({"keep": ["conv_in"]}, "keep: .'conv_in'. is no mapping of layer names to bits"),
        ({"keep": {"conv_in": "8"}}, "keep: 'conv_in': '8'; valid: a layer name and its bits, 2 to 16 or 32"),
        ({"keep": {"conv_in": [8, 8, 8]}}, r"keep: 'conv_in': \[8, 8, 8\]; valid"),
    ],
)
def test_keywords_out_of_bounds(given, said):
    with pytest.raises(ValueError, match=said):
        check(quantize, given, 4, 8)


def test_a_largest_value_holds_alone_and_may_be_zero():
    assert Valid(maximum=4).fault(5) == "5 is out of bounds; valid: up to 4" and Valid(maximum=4).fault(4) is None
    assert Valid(minimum=-1, maximum=0).fault(1) == "1 is out of bounds; valid: -1 to 0"
    assert Valid(maximum=4).fault(math.nan) and Valid(minimum=-1).fault(math.nan)


@pytest.mark.parametrize("name", METHODS)
def test_every_number_of_a_method_has_bounds(name):
    """Counts, seeds and rates: none is negative, NaN or infinite, and a rate of zero learns nothing."""
    function = METHODS[name].quantize
    kinds = {key: schema(keyword).get("type") for key, keyword in keywords(function).items()}
    for key in [key for key, kind in kinds.items() if kind in ("integer", "number")]:
        rate = re.search(r"(^|_)lr($|_)", key) and key != "lr_zero_point"  # zero leaves zero points as they are
        for value in (math.nan, math.inf, -math.inf, -1, *([0] if rate else [])):
            with pytest.raises(ValueError, match=f"^{key}: "):
                check(function, {key: value}, 4, 8)


def test_keywords_within_bounds_and_of_functions_without_any():
    given = {"strength": 1e-9, "kind": "hard", "axis": None, "rows": None, "bits": 16, "keep": {"a": 2, "b": [16, 32]}}
    check(quantize, given, 4, 8)
    check(lambda pipe, calibration, w, a, *, rows=1: pipe, {"rows": None}, 4, 8)
    check(lambda pipe, calibration, w, a, rows=1: pipe, {"rows": 0}, 4, 8)
    check(lambda pipe, calibration, w, a, **others: pipe, {"rows": 0}, 4, 8)


def test_what_a_method_cannot_do_is_refused_before_a_calibration_set_is_drawn(uncond_pipe, monkeypatch):
    monkeypatch.setattr("quest.diffusion.calibration_set.draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(TypeError, match="sample: no keyword of this method; valid: ranges, keep, softmax_bits"):
        quest.quantize(uncond_pipe, "rtn", sample=4)
    with pytest.raises(ValueError, match="adaround quantizes weights only: its bits are w4a32, not w4a8"):
        quest.quantize(uncond_pipe, "adaround", "w4a8")
    with pytest.raises(ValueError, match=r"keep: no layer is named like 'conv_inn'; names are such as conv_in, "):
        quest.quantize(uncond_pipe, "rtn", keep={"conv_inn": 8})


def test_variants_are_rows_that_differ_in_some_fields():
    kept = {"conv_in": 32}
    method = Method("foo", quantize, "a method", variants={"foo-as-released": dict(fixed={"keep": kept, "rows": 5})})
    foo, released = method.rows()
    assert (foo.name, released.name, released.about) == ("foo", "foo-as-released", "a method")
    assert foo.keeps == KEEP and released.keeps == kept
    assert released.quantize("pipe", None, 4, 8)[3] == Recipe(keep=kept, rows=5)
    assert released.description == "A method. Here: rows = 5."


def test_the_example_of_contributing_is_a_method(uncond_pipe, uncond_calibration, undeclared):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    namespace = {"__name__": "foo"}
    exec(textwrap.dedent(re.search(r"```python\n(.*?)```", text, re.S)[1]), namespace)
    foo = namespace["METHOD"]
    assert foo.name == "foo" and schema(keywords(foo.function)["power"])["maximum"] == 8
    q = quest.quantize(uncond_pipe, foo.quantize, "w4a8", calibration=uncond_calibration, samples=4, power=3.0)
    assert q.unet.quantization["method"] == "foo.quantize" and q.unet.quantization["recipe"]["power"] == 3
    assert undeclared(q.unet, 4, 8, foo.keeps) == []
    with pytest.raises(ValueError, match="power: 9 is out of bounds; valid: 1 to 8"):
        quest.quantize(uncond_pipe, foo.quantize, "w4a8", calibration=uncond_calibration, power=9)


def test_entries_of_the_bibliography():
    paper = Paper("who2024foo", "2401.00001", "{Foo}: A Method", "Who, Anna", "ICML", 2024)
    assert paper.bibtex.startswith("@inproceedings{who2024foo,\n  title = {{Foo}: A Method},")
    assert "  eprint = {2401.00001},\n" in paper.bibtex and paper.bibtex.endswith("}\n")


def test_only_what_stands_between_the_marks_is_replaced():
    text = "a\n# begin: written by `x`\nold\nolder\n# end: written by it\nb\n"
    assert generate.replaced(text, "new\n") == "a\n# begin: written by `x`\nnew\n# end: written by it\nb\n"
