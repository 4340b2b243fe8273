"""Which room may import which, in one direction only: what an import means, imports inside functions included.

A room is a folder of the library or a module that stands beside the folders. Workflow scripts and tests stand above
all rooms and may import any of them.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Room -> what it may import, from the ground up: each room imports rooms that are listed before it.
ROOMS = {
    "quest.runtime": set(),
    "quest.kernels.cpu.core": set(),  # the compiled library and its calls, among them fake quantization
    "quest.affine": {"quest.kernels.cpu.core"},  # the arithmetic that kernels compute and quantizers choose
    "quest.kernels": {"quest.kernels.cpu.core", "quest.affine"},
    "quest.diffusion": {"quest.runtime"},
    "quest.quantization.header": {"quest.runtime"},  # of checkpoints, which reports read without torch
    "quest.quantization": {
        "quest.quantization.header",
        "quest.runtime",
        "quest.affine",
        "quest.kernels",
        "quest.diffusion",
    },
    "quest.learning": {"quest.runtime", "quest.affine", "quest.diffusion", "quest.quantization"},
    "quest.metrics": {"quest.runtime", "quest.diffusion"},
    "quest.config": {"quest.runtime", "quest.diffusion"},
    "quest.report": {"quest.quantization.header", "quest.runtime", "quest.diffusion", "quest.metrics"},
    "quest.properties": {
        "quest.affine",
        "quest.diffusion",
        "quest.quantization",
        "quest.learning",
        "quest.metrics",
    },
    "quest.zoo": {"quest.runtime", "quest.diffusion", "quest.metrics"},
    "baselines": {
        "quest.quantization.header",
        "quest.runtime",
        "quest.config",  # rules of keywords, which configs are checked by, too
        "quest.affine",
        "quest.diffusion",
        "quest.quantization",
        "quest.learning",
    },
    "quest": {
        "quest.config",
        "quest.diffusion",
        "quest.quantization",
        "baselines",
    },  # quest/__init__.py: quantize, save, load
    "quest.planning": {
        "quest.runtime",
        "quest.diffusion",
        "quest.quantization",
        "quest.learning",
        "quest.metrics",
        "quest.config",
        "baselines",
        "quest",
    },
    "quest.doctor": {
        "quest.runtime",
        "quest.kernels.cpu.core",
        "quest.affine",
        "quest.kernels",
        "quest.diffusion",
        "quest.metrics",
    },
    # Takes what quest.load or quest.quantize made.
    "quest.export": {"quest.runtime", "quest.diffusion", "quest.affine", "quest.kernels", "quest.quantization"},
    "quest.benchmark": {
        "quest.runtime",
        "quest.kernels.cpu.core",
        "quest.affine",
        "quest.kernels",
        "quest.diffusion",
        "quest.quantization",
        "quest.report",
        "quest.planning",
        "quest.config",  # of models that ship:
        "baselines",
        "quest",
        "quest.metrics",  # the error of each contender
        "quest.export",  # contenders on other runtimes
    },
    "quest.judge": {"quest.runtime", "quest.diffusion", "quest.metrics", "quest.report"},
    "quest.__main__": {
        "quest.runtime",  # the end of a program whose reader has gone
        "quest.config",
        "quest.diffusion",
        "quest.quantization",
        "quest.planning",
        "quest.doctor",
        "quest.export",
        "quest.judge",
        "quest.report",  # settle
    },
}


def sources(root: Path) -> dict[str, Path]:
    """Module name -> file, of everything in quest/ and baselines/."""
    files = [file for package in ("quest", "baselines") for file in sorted((root / package).rglob("*.py"))]
    return {".".join(f.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(module: str, text: str, modules: set[str]) -> Iterator[str]:
    """Modules of this project that a source imports, wherever in the file the import stands."""
    package = module if any(m.startswith(f"{module}.") for m in modules) else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            whole = [f"{base}.{alias.name}" for alias in node.names]
            found = [name if name in modules else base for name in whole]
        else:
            continue
        yield from (name for name in found if name.partition(".")[0] in ("quest", "baselines", "workflow"))


def room_of(module: str) -> str | None:
    """The room that a module lies in: the longest name in ROOMS that it starts with; None for a room that is new."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    found = next((name for name in names if name in ROOMS), None)
    return None if found == "quest" and module != "quest" else found


def faults(texts: dict[str, str]) -> list[str]:
    """What ROOMS does not allow in these sources, given by module name."""
    wrong = []
    for module, text in texts.items():
        room = room_of(module)
        if room is None:
            wrong.append(f"{module}: its room is not in ROOMS")
            continue
        for name in imports(module, text, set(texts)):
            other = room_of(name)
            if other != room and other not in ROOMS[room]:
                wrong.append(
                    f"{module} imports {name}: {room} may import {', '.join(sorted(ROOMS[room])) or 'nothing'}"
                )
    return wrong


def test_imports_go_one_way():
    assert faults({module: file.read_text(encoding="utf-8") for module, file in sources(ROOT).items()}) == []


def test_the_table_itself_goes_one_way_and_has_no_room_that_is_gone():
    for place, (room, allowed) in enumerate(ROOMS.items()):
        assert allowed <= set(list(ROOMS)[:place]), room
    assert {room_of(module) for module in sources(ROOT)} == set(ROOMS)


def reachable(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """Room -> the rooms that it imports, directly or through other rooms."""

    def below(room: str) -> set[str]:
        return set(arrows[room]).union(*map(below, arrows[room]))

    return {room: below(room) for room in arrows}


def test_the_diagram_of_contributing_shows_the_table():
    """The diagram leaves out arrows that follow from others, so both must reach the same rooms."""
    diagram = re.search(r"```mermaid\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = re.findall(r"^ +(\S+) --> (.+)$", diagram[1], re.MULTILINE)
    arrows = {room: set(imported.split(" & ")) for room, imported in lines}
    arrows |= {room: set() for room in set().union(*arrows.values()) - set(arrows)}
    names = {room: room.removeprefix("quest.") for room in ROOMS}
    assert reachable(arrows) == reachable({names[r]: {names[a] for a in allowed} for r, allowed in ROOMS.items()})


@pytest.mark.parametrize(
    "module, line",
    [
        ("quest.kernels.reference", "from quest.quantization.layers import QuantLayer"),
        ("quest.kernels.reference", "from quest.quantization import layers"),
        ("quest.kernels.reference", "from ..quantization import layers"),
        ("quest.kernels.cpu.core", "from quest.affine import FLOAT"),
        ("quest.runtime.files", "def f():\n    import quest.diffusion.models as m"),
        ("quest.quantization.layers", "if TYPE_CHECKING:\n    from baselines import METHODS"),
        ("quest.learning.units", "import quest"),
        ("quest.metrics.per_image", "from workflow.scripts import metrics"),
        ("quest.attic.old", ""),
        ("quest.old", ""),
    ],
)
def test_an_arrow_upwards_and_a_new_room_are_seen(module, line):
    texts = dict.fromkeys(sources(ROOT), "")
    assert faults(texts) == []
    assert len(faults(texts | {module: line})) == 1


def test_methods_are_known_by_the_registry():
    """And by what all methods have in common, baselines.method; a single one is known to other methods alone."""
    modules = sources(ROOT)
    for module, file in modules.items():
        if room_of(module) != "baselines":
            named = {
                n for n in imports(module, file.read_text(encoding="utf-8"), set(modules)) if n.startswith("baselines.")
            }
            assert named <= {"baselines.method"}, module


def test_quantization_loads_without_methods_and_pipelines():
    modules = [module for module in sources(ROOT) if room_of(module) == "quest.quantization"]
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout
    unwanted = ("baselines", "quest.diffusion.pipelines", "quest.learning", "diffusers.pipelines.stable_diffusion")
    assert [name for name in loaded.split() if name.startswith(unwanted)] == []
