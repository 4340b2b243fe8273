"""A killed quantization goes on where it was, and ends at the same bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import quest
from baselines import quest as finetune
from quest.kernels.cpu import core
from quest.learning import reconstruction
from quest.quantization import checkpoint
from quest.runtime import resume
from quest.runtime.hashing import tensor_hash
from quest.runtime.provenance import provenance
from quest.runtime.resume import digest, resuming

ROOT = Path(__file__).parents[2]

RECIPES = {
    "q-diffusion": dict(weight_iterations=3, activation_iterations=3, batch=4, rows=16, samples=4),
    "quest-suite": dict(tla_iterations=3, cma_iterations=3, batch=4, samples=4),
}


class Killed(BaseException):
    """Not an Exception, as a signal is not."""


@pytest.fixture
def computed(monkeypatch):
    """Names of the parts that were computed; `kill_after` stops before one more."""

    def counted(function, name):
        def wrapped(*args, **kwargs):
            if len(found) == found.kill_after:
                raise Killed
            result = function(*args, **kwargs)
            found.append(name(*args))
            return result

        return wrapped

    class Found(list):
        kill_after = None

    found = Found()
    monkeypatch.setattr(reconstruction, "learn_rounding", counted(reconstruction.learn_rounding, lambda *a: a[0]))
    monkeypatch.setattr(reconstruction, "learn_steps", counted(reconstruction.learn_steps, lambda *a: a[0]))
    monkeypatch.setattr(finetune, "align", counted(finetune.align, lambda _d, stage, *_: stage.name))
    return found


@pytest.mark.parametrize("method", RECIPES)
def test_a_killed_job_goes_on_and_ends_at_the_same_bits(method, uncond_pipe, uncond_calibration, computed, tmp_path):
    def made():
        pipe = quest.quantize(uncond_pipe, method, "w4a4", calibration=uncond_calibration, **RECIPES[method])
        return pipe.unet

    whole = made()
    parts = list(computed)
    assert len(parts) > 1 and (method != "quest-suite" or len(parts) == 2)
    computed.clear()
    computed.kill_after = len(parts) - 1
    with pytest.raises(Killed), resuming(tmp_path / "parts", {"job": 1}):
        made()
    computed.clear()
    computed.kill_after = None
    with resuming(tmp_path / "parts", {"job": 1}) as earlier:
        again = made()
    assert computed == parts[-1:], "nothing is computed twice"
    assert earlier.seconds > 0 and not (tmp_path / "parts").exists()
    assert again.stages == whole.stages
    expected, state = (checkpoint.state(denoiser, floats=True) for denoiser in (whole, again))
    assert all(torch.equal(v, state[k]) and v.stride() == state[k].stride() for k, v in expected.items())


def test_parts_of_another_job_are_thrown_away(tmp_path, capsys):
    values = torch.zeros(3)

    def learn():
        values.add_(1)
        return (values.sum().item(),)

    def run(identity, kill=False):
        with resuming(tmp_path / "parts", identity):
            numbers = resume.part("unit", lambda: {"values": values}, learn, torch.Generator())
            if kill:
                raise Killed
        return numbers

    with pytest.raises(Killed):
        run({"recipe": {"seed": 0}, "code": "a"}, kill=True)
    values.zero_()
    with pytest.raises(Killed):
        run({"recipe": {"seed": 0}, "code": "a"}, kill=True)
    assert values.tolist() == [1, 1, 1] and "going on after 1 parts" in capsys.readouterr().out, "filled, not learned"
    assert run({"recipe": {"seed": 1}, "code": "a"}) == (6,), "learned once more, on top"
    assert "another recipe; thrown away" in capsys.readouterr().out


def run_one(folder, identity, kill=False, learned=1.0, size=3):
    """A job of one part; with `kill` it stops behind it. Returns the part's numbers."""
    values = torch.zeros(size)

    def learn():
        values.add_(learned)
        return (values.sum().item(),)

    with resuming(folder, identity):
        numbers = resume.part("unit", lambda: {"values": values}, learn, torch.Generator())
        if kill:
            raise Killed
    return numbers


@pytest.fixture
def kept(tmp_path):
    """(folder, tensors, header) of the part that a killed job left."""
    with pytest.raises(Killed):
        run_one(tmp_path / "parts", {"job": 1}, kill=True)
    with safe_open(tmp_path / "parts/unit.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tmp_path / "parts", tensors, json.loads(file.metadata()["quest"])


def written(folder, tensors, header, rehash=True):
    if rehash:
        header = header | {"hashes": {name: tensor_hash(value) for name, value in tensors.items()}}
    save_file(tensors, folder / "unit.safetensors", {"quest": json.dumps(header)})


FORGED = {
    "a value that is not finite": lambda tensors: tensors["values"].fill_(torch.nan),
    "another shape": lambda tensors: tensors.update(values=torch.zeros(2)),
    "another type": lambda tensors: tensors.update(values=torch.zeros(3, dtype=torch.float64)),
    "no numbers": lambda tensors: tensors.pop("numbers"),
    "no values": lambda tensors: tensors.pop("values"),
    "another generator": lambda tensors: tensors.update(generator=torch.zeros(3, dtype=torch.uint8)),
}


@pytest.mark.parametrize("change", FORGED)
def test_a_part_that_is_not_what_the_job_would_have_written_is_refused(kept, change):
    folder, tensors, header = kept
    FORGED[change](tensors)
    written(folder, tensors, header)
    with pytest.raises(ValueError, match=r"unit\.safetensors.*remove it to compute that part again"):
        run_one(folder, {"job": 1})


def test_a_part_whose_bytes_have_changed_or_that_has_no_hashes_is_refused(kept):
    folder, tensors, header = kept
    written(folder, tensors | {"values": tensors["values"] + 1}, header, rehash=False)
    with pytest.raises(ValueError, match="its tensor values is not what was written"):
        run_one(folder, {"job": 1})
    for told in ({}, {"identity": header["identity"]}, {"identity": "other"}):
        save_file(tensors, folder / "unit.safetensors", {"quest": json.dumps(told)})
        with pytest.raises(ValueError, match="of another job|lacks tensors, or their hashes"):
            run_one(folder, {"job": 1})


def test_a_part_of_another_job_that_was_put_there_is_refused(kept, tmp_path):
    folder, tensors, header = kept
    with pytest.raises(Killed):
        run_one(tmp_path / "other", {"job": 2}, kill=True)
    written(tmp_path / "other", tensors, header)
    with pytest.raises(ValueError, match=r"unit\.safetensors is a part of another job"):
        run_one(tmp_path / "other", {"job": 2})


def test_a_part_that_diverged_is_computed_again_and_not_kept(tmp_path):
    with pytest.raises(Killed):
        run_one(tmp_path / "parts", {"job": 1}, kill=True, learned=torch.inf)
    assert not list((tmp_path / "parts").glob("*.safetensors"))


def test_a_record_that_cannot_be_read_throws_its_parts_away(kept, capsys):
    folder, _, _ = kept
    (folder / resume.IDENTITY).write_text("{", encoding="utf-8")
    assert run_one(folder, {"job": 1}) == (3,)
    assert "thrown away" in capsys.readouterr().out


def test_a_damaged_part_is_named(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / resume.IDENTITY).write_text(json.dumps({}), encoding="utf-8")
    (folder / "unit.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"unit\.safetensors is corrupted, .* remove it"), resuming(folder, {}):
        resume.part("unit", dict, lambda: None, torch.Generator())


def test_what_computes_is_part_of_a_job(monkeypatch):
    """Another build of the core, another instruction set of it, or another one of torch."""
    own = core.identity()
    assert own["torch"] == torch.backends.cpu.get_cpu_capability()
    if not core.available():
        assert own["sha256"] is own["isa"] is None
        return
    assert len(own["sha256"]) == 64 and own["abi"] and own["isa"] == core.best()
    try:
        for isa in core.instruction_sets():
            monkeypatch.setenv("QUEST_ISA", isa)
            core.core.__wrapped__()  # what a process does that loads the core
            assert core.identity() == own | {"isa": isa}
    finally:
        core.use(own["isa"])
    code = "from quest.kernels.cpu import core; print(core.identity()['isa'])"
    other = os.environ | {"QUEST_ISA": "portable"}
    told = subprocess.run([sys.executable, "-c", code], env=other, capture_output=True, encoding="utf-8")
    assert told.stdout.strip() == "portable", told.stderr
    assert provenance()["core"] == own
    assert "identity()" in (ROOT / "workflow/scripts/quantize.py").read_text(encoding="utf-8")


def test_the_digest_follows_contents(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1", encoding="utf-8")
    other.write_text("2", encoding="utf-8")
    first = digest(one, other)
    assert first == digest(other, one)
    other.write_text("3", encoding="utf-8")
    assert digest(one, other) != first
