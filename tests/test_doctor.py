import pytest
import torch

from quest import doctor
from quest.__main__ import main
from quest.kernels import reference
from quest.kernels.cpu import integer
from quest.metrics import weights


def findings():
    return {what: (state, words) for what, state, words in doctor.report()[0]}


def test_what_works_here_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("QUEST_WEIGHTS", str(tmp_path))
    (tmp_path / weights.WEIGHTS["ViT-B-16"].file).write_text("not CLIP", encoding="utf-8")
    main(["doctor"])  # no exit: the reference works
    said = capsys.readouterr().out
    for line in ("ok  kernel reference", "ok  model scenes-text", "--  weights inception", "FAILED  weights ViT-B-16"):
        assert line in said, line
    reason = integer.unavailable(torch.device("cpu"))
    assert findings()["kernel integer"][0] == ("ok" if reason is None else "--")
    if not torch.cuda.is_available():
        assert "needs a CUDA GPU" in findings()["kernel triton"][1]


def test_a_missing_core_is_explained(monkeypatch):
    def gone():
        raise OSError("there is no compiled core: build it")

    monkeypatch.setattr(integer, "core", gone)
    found = findings()
    assert found["kernel integer"] == ("--", "there is no compiled core: build it")
    assert found["integer: path"][0] == "--" and "pip install" in found["integer: path"][1]
    assert found["kernel auto"][1].startswith("reference on a CPU")


@pytest.mark.parametrize("wrong", [lambda y: y + 0.1, lambda y: y * torch.nan])
def test_a_reference_that_is_wrong_is_an_error(monkeypatch, wrong):
    linear = reference.linear
    monkeypatch.setattr(reference, "linear", lambda *arguments: wrong(linear(*arguments)))
    with pytest.raises(SystemExit, match="the reference kernel does not compute what it should") as left:
        main(["doctor"])
    assert left.value.code not in (0, None)
    assert findings()["kernel reference"][0] == "FAILED"
