"""ro-crate-metadata.json has the structure of RO-Crate 1.1, and says the truth about the files of a run."""

import hashlib
import json
import sys
from urllib.parse import unquote

import pytest

from quest.runtime.files import dumps
from workflow.scripts import crate

SEEN = {"commit": "abc", "dirty": False, "versions": {"torch": "2.9"}, "date": "2026-01-02T03:04:05+00:00"}
SEEN |= {"machine": {"cpu": "Some CPU", "cores": 2, "system": "Linux x86_64"}, "config": "0" * 64}


@pytest.fixture
def run(tmp_path, write_checkpoint):
    for method, date in (("rtn", "2026-01-01T00:00:00+00:00"), ("quest-suite@1", SEEN["date"])):
        folder = tmp_path / "mine" / "photos-class" / method / "w4a4"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(dumps({"rows": [], "provenance": SEEN | {"date": date}}), encoding="utf-8")
    write_checkpoint(folder / "model.safetensors", method="quest-suite", bits="w4a4", recipe={"seed": 1})
    (tmp_path / "mine" / "a table.csv").write_text("x\n1\n", encoding="utf-8")
    return tmp_path / "mine"


def written(run, monkeypatch) -> dict:
    monkeypatch.setattr(sys, "argv", ["crate", str(run)])
    crate.main()
    return json.loads((run / "ro-crate-metadata.json").read_text(encoding="utf-8"))


def references(value):
    """Every {"@id": ...} in the values of an entity; RO-Crate 1.1 has no other nested objects."""
    if isinstance(value, dict):
        assert value.keys() == {"@id"}
        yield value["@id"]
    elif isinstance(value, list):
        for one in value:
            yield from references(one)


def test_the_structure_is_that_of_ro_crate(run, monkeypatch):
    told = written(run, monkeypatch)
    assert told.keys() == {"@context", "@graph"} and told["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    entities = {entity["@id"]: entity for entity in told["@graph"]}
    assert len(entities) == len(told["@graph"]) and all(entity["@type"] for entity in entities.values())
    about = entities["ro-crate-metadata.json"]
    assert about["@type"] == "CreativeWork" and about["about"] == {"@id": "./"}
    assert about["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    root = entities["./"]
    assert root["@type"] == "Dataset" and {"name", "description", "datePublished", "license"} <= root.keys()
    assert root["datePublished"] == SEEN["date"]
    for entity in entities.values():
        for target in (found for value in entity.values() for found in references(value)):
            assert target in entities or target.startswith("https://"), target
    files = {key for key, entity in entities.items() if entity["@type"] == "File"}
    assert {part["@id"] for part in root["hasPart"]} == files
    assert all(not key.startswith(("/", "..")) and " " not in key for key in files)


def test_files_hashes_and_origin_are_those_of_the_run(run, monkeypatch):
    written(run, monkeypatch)
    told = written(run, monkeypatch)  # its own file, of the first time, is not a part of the run
    graph = told["@graph"]
    files = {unquote(entity["@id"]): entity for entity in graph if entity["@type"] == "File"}
    there = {f.relative_to(run).as_posix() for f in run.rglob("*") if f.is_file()} - {"ro-crate-metadata.json"}
    assert files.keys() == there and "a table.csv" in there
    for place, entity in files.items():
        content = (run / place).read_bytes()
        assert entity["sha256"] == hashlib.sha256(content).hexdigest() and entity["contentSize"] == str(len(content))
    assert files["a table.csv"]["encodingFormat"] == "text/csv"
    actions = [entity for entity in graph if entity["@type"] == "CreateAction"]
    software = [entity for entity in graph if entity["@type"] == "SoftwareApplication"]
    (recipe,) = [entity for entity in graph if entity["@type"] == "PropertyValue"]
    assert len(actions) == 2 and len(software) == 1  # both cells have one commit and machine
    assert software[0]["softwareVersion"] == "commit abc" and "Some CPU, 2 cores" in software[0]["description"]
    assert json.loads(recipe["value"]) == {"method": "quest-suite", "bits": "w4a4", "recipe": {"seed": 1}}


def test_a_folder_that_is_no_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["crate", str(tmp_path)])
    with pytest.raises(SystemExit, match="crate: .*: no metrics.json; valid: the folder of a run"):
        crate.main()


def test_metrics_that_the_workflow_did_not_write_are_named(run, monkeypatch):
    for text in ("[]", "{}", dumps({"provenance": {}})):
        (run / "photos-class" / "rtn" / "w4a4" / "metrics.json").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=r"crate: .*rtn/w4a4/metrics.json: no provenance with a date"):
            written(run, monkeypatch)
