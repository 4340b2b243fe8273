"""RO-Crate 1.1 metadata of a run: its files with their hashes, and who made which cell, where and by what recipe.

https://www.researchobject.org/ro-crate/specification/1.1 . A cell is a CreateAction; its instrument is this software
at a commit, with the versions and the machine in words; its object is the recipe. No torch.
"""

import mimetypes
from pathlib import Path
from urllib.parse import quote

from quest.quantization import header
from quest.runtime.download import sha256_of
from quest.runtime.files import dumps, read_json

FILE = "ro-crate-metadata.json"
OWN = {FILE, "crate.log"}  # still being written
VERSION = "https://w3id.org/ro/crate/1.1"
# The context of version 1.1 has no term for a hash.
CONTEXT = [f"{VERSION}/context", {"sha256": "https://schema.org/sha256"}]


def crate(run: Path, name: str) -> dict:
    """Describe all files of `results/NAME` that are there. Raises ValueError for a folder without a metrics.json."""
    metrics = sorted(run.glob("*/*/*/metrics.json"))
    if not metrics:
        raise ValueError(f"{run}: no metrics.json; valid: the folder of a run, results/NAME")
    files = [_file(run, file) for file in _files(run)]
    entities: dict[str, dict] = {}
    actions = [_cell(run, file, entities) for file in metrics]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"quest-suite: {name}",
        "description": f"Run {name} of quest-suite: quantized diffusion models, their samples, metrics and tables.",
        "datePublished": max(action["endTime"] for action in actions),
        "license": {"@id": "https://spdx.org/licenses/Apache-2.0"},
        "hasPart": [{"@id": file["@id"]} for file in files],
        "mentions": [{"@id": action["@id"]} for action in actions],
    }
    about = {"@id": FILE, "@type": "CreativeWork", "conformsTo": {"@id": VERSION}, "about": {"@id": "./"}}
    return {"@context": CONTEXT, "@graph": [about, root, *files, *actions, *entities.values()]}


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in OWN)


def _file(run: Path, file: Path) -> dict:
    place = file.relative_to(run).as_posix()
    kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
    told = {"@id": quote(place), "@type": "File", "name": place, "contentSize": str(file.stat().st_size)}
    return told | {"encodingFormat": kind, "sha256": sha256_of(file)}


def _cell(run: Path, metrics: Path, entities: dict[str, dict]) -> dict:
    """The action that made a cell. Its instrument and recipe are added to `entities`."""
    place, told = metrics.parent.relative_to(run).as_posix(), read_json(metrics)
    made = told.get("provenance") if isinstance(told, dict) else None
    if not (isinstance(made, dict) and isinstance(made.get("date"), str)):
        raise ValueError(f"{metrics}: no provenance with a date; valid: what the workflow writes")
    machine, versions = made.get("machine") or {}, made.get("versions") or {}
    software = {
        "@type": "SoftwareApplication",
        "name": "quest-suite",
        "softwareVersion": f"commit {made.get('commit')}{', changed' * bool(made.get('dirty'))}",
        "softwareRequirements": [f"{name} {version}" for name, version in versions.items()],
        "operatingSystem": str(machine.get("system")),
        "description": f"Ran on {machine.get('cpu')}, {machine.get('cores')} cores; config {made.get('config')}",
    }
    number = next((key for key, known in entities.items() if known == software | {"@id": key}), None)
    instrument = number or f"#software-{len(entities)}"
    entities[instrument] = software | {"@id": instrument}
    action = {
        "@id": f"#cell/{quote(place)}",
        "@type": "CreateAction",
        "name": f"quantize, sample and measure {place}",
        "endTime": made["date"],
        "instrument": {"@id": instrument},
        "result": [{"@id": quote(f.relative_to(run).as_posix())} for f in _files(metrics.parent)],
    }
    if (checkpoint := metrics.parent / "model.safetensors").is_file():
        told = header.read(checkpoint, diverged=True)
        recipe = {"method": told.get("method"), "bits": told.get("bits"), "recipe": told.get("recipe")}
        entity = {"@id": f"#recipe/{quote(place)}", "@type": "PropertyValue", "name": "recipe"}
        entities[entity["@id"]] = entity | {"value": dumps(recipe)}
        action["object"] = [{"@id": entity["@id"]}]
    return action
