"""Generate the parts of files that follow from the METHOD of each file in baselines/: the schema of recipes, the config
of all methods, the table of rows in docs/protocols.md, and the bibliography. Two marker lines enclose each part.
"""

import re
import textwrap
from pathlib import Path

from quest.runtime import command_line

ROOT = Path(__file__).parents[2]
COMMAND = "python -m workflow.scripts.generate"
MODELS = "[scenes-uncond, scenes-class, scenes-text]"  # the models in the config of all methods


def main() -> None:
    command_line.parser(__doc__).parse_args()

    from quest.runtime.files import write_text

    for path, text in texts().items():
        if path.read_text(encoding="utf-8") != text:
            write_text(path, text)
            print(f"{path.relative_to(ROOT)}: written")


def texts() -> dict[Path, str]:
    """Return the text that each file with a generated part must have."""
    from baselines import METHODS

    methods = list(METHODS.values())
    parts = {
        "workflow/schemas/config.schema.yaml": schema(methods),
        "workflow/config/all-methods.yaml": grid(methods),
        "docs/protocols.md": table(methods),
        "resources/references.bib": "\n".join(dict.fromkeys(m.paper.bibtex for m in methods if m.paper)),
    }
    return {ROOT / name: replaced((ROOT / name).read_text(encoding="utf-8"), part) for name, part in parts.items()}


def schema(methods) -> str:
    """Return the end of the schema: methods that quantize weights only, keywords of each method, and their rules."""
    from baselines import method

    weights_only = [row.name for row in methods if row.weights_only]
    lines = [f"  weights-only: {_flow({'enum': weights_only})}", "  methods:", "    type: object"]
    lines += ["    additionalProperties: false", "    properties:"]
    first_with: dict[str, str] = {}  # keywords -> the first method that has them; the others refer to it
    for row in methods:
        schemas = {name: method.schema(keyword) for name, keyword in method.keywords(row.function).items()}
        keywords = _wrapped([f"{name}: {_flow(value)}" for name, value in schemas.items()], " " * 8)
        if keywords in first_with:
            lines.append(f'      {row.name}: {{$ref: "#/$defs/methods/properties/{first_with[keywords]}"}}')
            continue
        first_with[keywords] = row.name
        lines.append(f"      {row.name}: {{type: object, additionalProperties: false, properties: {{")
        lines += [keywords + "}}"] if keywords else []
        lines[-1] += "" if keywords else "}}"
    return "\n".join([*lines, *rules(methods), ""])


def rules(methods) -> list[str]:
    """Return the lines of the schema with the rules of keywords, and what these keywords are without a recipe.

    fixed: keywords that define the row, which a model's protocol leaves as they are.
    """
    from baselines import method

    rows: dict[tuple, list] = {}  # rules -> the methods that have them
    for row in methods:
        if found := method.rules_of(row.function):
            rows.setdefault(tuple(map(_rule, found)), []).append((row, {n for rule in found for n in rule.keywords}))
    lines = ["rules:"]
    for found, having in rows.items():
        lines.append("  - methods:")
        for row, names in having:
            defaults = {n: p.default for n, p in method.keywords(row.quantize).items() if n in names}
            about = {"values": defaults, "fixed": [n for n in row.fixed if n in names]}
            lines.append(f"      {row.name}: {_flow(about)}")
        lines += ["    rules:", *(f"      - {rule}" for rule in found)]
    return lines


def _rule(rule) -> str:
    """Return a rule as one line of YAML."""
    parts = {key: {n: valid.limits for n, valid in getattr(rule, key).items()} for key in ("when", "valid")}
    return _flow(parts | {"why": rule.why})


def grid(methods) -> str:
    """Return the cells and recipes of the config of all methods; methods that quantize every layer come first."""
    from quest.quantization.layer_names import KEEP

    cells: dict[tuple, list[str]] = {}
    for row in methods:
        if not row.weights_only:
            cells.setdefault((row.keeps != KEEP, row.bits), []).append(row.name)
    lines = ["grid:"]
    for (_, bits), names in sorted(cells.items(), key=lambda cell: cell[0][0]):
        lines += [f"  - model: {MODELS}", f"    bits: {_flow(list(bits))}", "    method: ["]
        lines[-1] += _wrapped(names, " " * 6).strip() + "]"
    lines += ["methods:", *(f"  {row.name}: {_flow(row.recipe)}" for row in methods)]
    return "\n".join([*lines, ""])


def table(methods) -> str:
    """Return a Markdown table that describes the rows of result tables."""
    lines = ["| row | what it is |", "|---|---|"]
    for row in methods:
        paper = f" ([arXiv:{row.paper.arxiv}](https://arxiv.org/abs/{row.paper.arxiv}))" if row.paper else ""
        lines.append(f"| `{row.name}` | {row.about}{paper} |")
    return "\n".join([*lines, ""])


def replaced(text: str, part: str) -> str:
    """Replace the text between the lines "begin: written by ..." and "end: written by ..." by `part`."""
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    begin, end = (next(i for i, line in enumerate(lines) if f"{mark}: written by" in line) for mark in ("begin", "end"))
    return "".join([*lines[: begin + 1], part, *lines[end:]])


def _flow(value) -> str:
    """Return a value as one line of YAML."""
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip()


def _wrapped(items: list[str], indent: str) -> str:
    """Join the items of a YAML list or mapping, with line breaks between items only."""
    text = ", ".join(item.replace(" ", "\0") for item in items)
    return textwrap.fill(
        text, 110, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ).replace("\0", " ")


if __name__ == "__main__":
    main()
