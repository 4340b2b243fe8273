"""What keywords of a method may be: one alone (`Valid`), and some beside each other (`Rule`). Imports nothing heavy.

Methods state both in their own files. `workflow.scripts.generate` writes them into the schema of configs, so that a
config can be checked without the methods, which need torch.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

BITS = ("w", "a")  # of weights and activations
LIMITS = ("maximum", "multipleOf")  # fields that may name a keyword


@dataclass(frozen=True)
class Valid:
    """Valid values of a keyword: `Annotated[int, Valid(minimum=1)]`. The fields have their names in JSON Schema."""

    enum: tuple | None = None
    minimum: float | None = None
    exclusiveMinimum: float | None = None  # noqa: N815
    maximum: float | str | None = None
    multipleOf: int | str | None = None  # noqa: N815
    pattern: str | None = None
    description: str | None = None

    def fault(self, value) -> str | None:
        """Explain why a value is not valid. Returns None for a valid value."""
        if self.enum is not None and value not in self.enum:
            return f"{value!r} is not one of {', '.join(map(str, self.enum))}"
        if self.pattern is not None and not (isinstance(value, str) and re.search(self.pattern, value)):
            return f"{value!r} is not one of {self.description}"
        if self.exclusiveMinimum is not None and not value > self.exclusiveMinimum:
            return f"{value!r} is out of bounds; valid: above {self.exclusiveMinimum}"
        above = self.minimum is None or value >= self.minimum
        below = self.maximum is None or value <= self.maximum
        if not (above and below):
            least = "up" if self.minimum is None else self.minimum
            most = "or more" if self.maximum is None else f"to {self.maximum}"
            return f"{value!r} is out of bounds; valid: {least} {most}"
        if self.multipleOf is not None and value % self.multipleOf:
            return f"{value!r} is no multiple of {self.multipleOf}"
        return None

    @property
    def limits(self) -> dict:
        """The fields that are set, ready for JSON."""
        found = {name: value for name, value in asdict(self).items() if value is not None}
        return found | ({"enum": list(self.enum)} if self.enum is not None else {})


class Rule(NamedTuple):
    """Where every keyword of `when` has such a value, every keyword of `valid` must have such a value.

    The value None stands for a default that is decided elsewhere: only `enum` can ask for it or exclude it. `maximum`
    and `multipleOf` may name a keyword of `when`, whose value is the limit. The bits are keywords, too: `w` and `a`.
    """

    when: dict[str, Valid]
    valid: dict[str, Valid]
    why: str

    @property
    def keywords(self) -> set[str]:
        """The keywords of a method that it speaks of."""
        return {*self.when, *self.valid} - {*BITS}


def check_together(rules: Iterable[Rule], values: Mapping, written: Collection[str]) -> None:
    """Raise ValueError for the first rule that the values of keywords break.

    values: those of defaults, too; rules about keywords that have none are passed over. written: the keywords that the
    user set; the message is about one of them where the rule names one.
    """
    for rule in rules:
        if not {*rule.when, *rule.valid} <= values.keys():
            continue
        if any(_fault(valid, values, name, otherwise="None") for name, valid in rule.when.items()):
            continue
        for name, valid in rule.valid.items():
            if (fault := _fault(valid, values, name)) is None:
                continue
            if name in BITS:
                raise ValueError(f"bits w{values['w']}a{values['a']}: {rule.why}; {fault}")
            subject = next((one for one in (name, *rule.when) if one in written), name)
            said = fault if subject == name else f"{values[subject]!r} does not go with {name}={values[name]!r}"
            others = " and ".join(f"{one}={values[one]!r}" for one in rule.when if one not in (subject, *BITS))
            raise ValueError(f"{subject}: {' with '.join([said, others] if others else [said])}; {rule.why}")


def _fault(valid: Valid, values: Mapping, name: str, otherwise: str | None = None) -> str | None:
    """`Valid.fault` with values in place of the names of keywords. otherwise: of None, unless `enum` decides."""
    if values[name] is None and valid.enum is None:
        return otherwise
    named = {field: values[limit] for field, limit in valid.limits.items() if field in LIMITS and limit in values}
    return replace(valid, **named).fault(values[name])
