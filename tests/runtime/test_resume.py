"""A killed quantization goes on where it was, and ends at the same bits."""

import json

import pytest
import torch

import quest
from baselines import quest as finetune
from quest.learning import reconstruction
from quest.runtime import resume
from quest.runtime.resume import digest, resuming

RECIPES = {
    "q-diffusion": dict(weight_iterations=3, activation_iterations=3, batch=4, rows=16, samples=4),
    "quest": dict(tla_iterations=3, cma_iterations=3, batch=4, samples=4),
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
    assert len(parts) > 1 and (method != "quest" or len(parts) == 2)
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
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) and v.stride() == state[k].stride() for k, v in whole.state_dict().items())


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


def test_a_damaged_part_is_named(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / resume.IDENTITY).write_text(json.dumps({}), encoding="utf-8")
    (folder / "unit.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"unit\.safetensors is corrupted, .* remove it"), resuming(folder, {}):
        resume.part("unit", dict, lambda: None, torch.Generator())


def test_the_digest_follows_contents(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("1", encoding="utf-8")
    other.write_text("2", encoding="utf-8")
    first = digest(one, other)
    assert first == digest(other, one)
    other.write_text("3", encoding="utf-8")
    assert digest(one, other) != first
