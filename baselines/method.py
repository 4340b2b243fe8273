"""How a method describes itself: each file in baselines/ exports one `METHOD`.

The registry and the plans read it. `python -m workflow.scripts.generate` writes the schema of configs,
workflow/config/all-methods.yaml, the table in docs/protocols.md and the bibliography from it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from quest.config.rules import Rule, Valid, check_together
from quest.quantization import layer_names
from quest.quantization.layer_names import KEEP, Keep


def one_of(names: Iterable) -> Valid:
    """The keyword must equal one of `names`."""
    return Valid(enum=tuple(names))


TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}  # names in JSON Schema
Count = Annotated[int, Valid(minimum=1)]
Iterations = Annotated[int, Valid(minimum=0, description="0 leaves the stage out")]
Bits = Annotated[int, Valid(minimum=2, maximum=16)]
Positive = Annotated[float, Valid(exclusiveMinimum=0)]
Guidance = Annotated[float, Valid(minimum=1, description="1 is no guidance")]
Seed = Annotated[int, Valid(minimum=0, maximum=2**32 - 1)]


class Paper(NamedTuple):
    """An entry of resources/references.bib."""

    key: str
    arxiv: str
    title: str
    authors: str
    venue: str
    year: int

    @property
    def bibtex(self) -> str:
        fields = {"title": self.title, "author": self.authors, "booktitle": self.venue, "year": self.year}
        fields |= {"eprint": self.arxiv, "archivePrefix": "arXiv"}
        lines = [f"  {name} = {{{value}}}," for name, value in fields.items()]
        return "\n".join([f"@inproceedings{{{self.key},", *lines, "}\n"])


class Step(NamedTuple):
    """A training step that `python -m quest measure` times.

    learn(student, pipe, calibration, model, iterations, batch) runs that many iterations of `batch` rows, at learning
    rates of zero. student: the quantized denoiser, with activation ranges for each timestep.
    """

    learn: Callable
    stages: tuple[str, ...]  # their names in the records of `quest.quantization.cost.record`
    rows: int | None = None  # the fixed number of rows; None: the cost depends on the rows, and both parts are measured


@dataclass(frozen=True)
class Method:
    """One row of the tables, and further rows in `variants`.

    `function` is quantize(pipe, calibration, w, a, *, <keywords>): it returns a quantized pipeline and does not change
    the full-precision `pipe`. The annotations of its keywords define the valid values (`Valid`).

    work(recipe, w, model, trajectories) counts how often making a checkpoint takes each step that
    `quest.planning.measure` measures: {step: count}. recipe: all keywords, as attributes. trajectories: their number in
    the calibration set.
    """

    name: str
    function: Callable
    about: str  # one line of Markdown that describes the row
    work: Callable[[Any, int, Any, int], Counter] | None = None  # None: unknown, and a plan says so
    fixed: dict = field(default_factory=dict)  # keywords that define the row; they override a model's protocol
    variants: dict[str, dict] = field(default_factory=dict)  # name of another row -> the fields in which it differs
    paper: Paper | None = None
    weights_only: bool = False  # activations stay in float; other methods start from it
    recipe: dict = field(default_factory=dict)  # its recipe in workflow/config/all-methods.yaml
    bits: tuple[str, ...] = ("w8a8", "w4a8", "w4a4")  # its bits in that file
    steps: dict[str, Step] = field(default_factory=dict)  # steps in `work` that no other method takes

    @property
    def quantize(self) -> Callable:
        """`function` with the keywords that the row fixes."""
        return partial(self.function, **self.fixed)

    @property
    def description(self) -> str:
        """`about` as a sentence, with the paper and the fixed keywords."""
        cited = f" (arXiv:{self.paper.arxiv})" if self.paper else ""
        settings = ", ".join(f"{name} = {value!r}" for name, value in self.fixed.items() if name != "keep")
        return f"{self.about[0].upper()}{self.about[1:]}{cited}." + (f" Here: {settings}." if settings else "")

    @property
    def keeps(self) -> Keep:
        """Glob over layer names -> bits, of the layers whose bits differ from those of the row."""
        return self.fixed.get("keep", KEEP)

    def rows(self) -> list["Method"]:
        """The method and its variants."""
        others = [replace(self, name=name, variants={}, **fields) for name, fields in self.variants.items()]
        return [replace(self, variants={}), *others]


def takes(kind: type) -> Callable:
    """Decorator of quantize(pipe, calibration, w, a, recipe): the fields of dataclass `kind` become its keywords.

    `kind.rules`, where there are any, are rules of these keywords (`Rule`); a recipe that breaks one is a ValueError.
    """

    def decorate(function):
        @wraps(function)
        def quantize(pipe, calibration, w, a, **keywords):
            recipe = kind(**keywords)
            check_together(quantize.rules, {"w": w, "a": a} | vars(recipe), keywords)
            return function(pipe, calibration, w, a, recipe)

        positional = list(signature(function).parameters.values())[:4]
        quantize.__signature__ = Signature([*positional, *signature(kind).parameters.values()])
        quantize.rules = getattr(kind, "rules", ())
        return quantize

    return decorate


def keywords(function: Callable) -> dict[str, Parameter]:
    """The keyword arguments of a method."""
    return {n: p for n, p in signature(function).parameters.items() if p.kind == p.KEYWORD_ONLY}


def rules_of(function: Callable) -> tuple[Rule, ...]:
    """The rules of a method's keywords."""
    return getattr(function.func if isinstance(function, partial) else function, "rules", ())


def check(function: Callable, arguments: dict, w: int, a: int) -> None:
    """Raise ValueError for the first keyword argument that its annotation or a rule does not allow.

    NaN and infinity are not allowed either. w, a: bits of weights and activations. Raises TypeError for a keyword that
    the function does not have.
    """
    known = signature(function).parameters
    if not any(parameter.kind == Parameter.VAR_KEYWORD for parameter in known.values()):
        if (unknown := next((name for name in arguments if name not in known), None)) is not None:
            raise TypeError(f"{unknown}: no keyword of this method; valid: {', '.join(keywords(function)) or 'none'}")
    for name, parameter in keywords(function).items():
        if name in arguments and (fault := _fault(parameter, arguments[name])):
            raise ValueError(f"{name}: {fault}")
    defaults = {name: parameter.default for name, parameter in keywords(function).items()}
    check_together(rules_of(function), {"w": w, "a": a} | defaults | arguments, arguments)


def _fault(keyword: Parameter, value) -> str | None:
    """Why a value of a keyword is not valid; None if it is, or if the annotation says nothing about it."""
    kind, *bounds = _plain(keyword.annotation)
    if value is None:
        optional = kind not in TYPES or keyword.default is None or NoneType in get_args(keyword.annotation)
        return None if optional else f"None is no value of it; leave it out for {keyword.default!r}"
    number = None if isinstance(value, bool) else value
    if kind is bool and not isinstance(value, bool):
        return f"{value!r} is not one of True, False"
    if kind is int and not isinstance(number, Integral):
        return f"{value!r} is not a whole number"
    if kind is float and not (isinstance(number, Real) and math.isfinite(number)):
        return f"{value!r} is not a finite number"
    if kind == Keep:
        return layer_names.fault(value)
    return next((fault for valid in bounds if (fault := valid.fault(value))), None)


def schema(keyword: Parameter) -> dict:
    """JSON Schema of a keyword. Raises TypeError for an annotation that has none."""
    kind, *bounds = _plain(keyword.annotation)
    if kind == Keep:
        return {"$ref": "#/$defs/keep"}
    limits = {name: value for valid in bounds for name, value in valid.limits.items()}
    if "enum" in limits:
        return limits
    if kind not in TYPES:
        raise TypeError(f"{keyword}: annotate it as bool, int, float, str, Keep or Annotated[one of them, Valid(...)]")
    return {"type": TYPES[kind]} | limits


def _plain(annotation) -> list:
    """[type, bounds ...] of an annotation. A None among its types is left out: it only marks a default."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    if get_origin(annotation) is Annotated:
        return [get_args(annotation)[0], *annotation.__metadata__]
    return _plain(kinds[0]) if NoneType in get_args(annotation) else [annotation]
