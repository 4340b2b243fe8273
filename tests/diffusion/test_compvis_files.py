"""What files of checkpoints are read, and which are refused: pickles with code, truncated ones, others."""

import os
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from test_compvis import state_of, written

from quest.diffusion.compvis.checkpoint import read


class Code:
    """Unpickled as usual, this leaves a file behind."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state_of("imagenet"), "extra": Code(f"touch {tmp_path / 'ran'}")}, path)
    with pytest.raises(ValueError, match=r"model.ckpt: refused, .*(posix|os)\.system.*nothing was run"):
        read(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False)  # it would have run
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_truncated_file_is_said_to_be_one(tmp_path, suffix, share):
    path, state = tmp_path / f"model{suffix}", state_of("imagenet")
    written(state, path) if suffix == ".ckpt" else save_file(state, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=rf"model{suffix} \({path.stat().st_size} bytes\): truncated, or not a"):
        read(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.ckpt: no such file; give the path of a CompVis checkpoint"):
        read(tmp_path / "none.ckpt")
    (tmp_path / "page.ckpt").write_text("<html>Please log in</html>", encoding="utf-8")
    with pytest.raises(ValueError, match="page.ckpt .*truncated, or not a PyTorch checkpoint"):
        read(tmp_path / "page.ckpt")
    torch.save({"state_dict": {"step": 3}}, tmp_path / "step.ckpt")
    with pytest.raises(ValueError, match="step.ckpt: holds no state_dict of tensors"):
        read(tmp_path / "step.ckpt")


def test_lightning_checkpoints_are_read_without_lightning(tmp_path, monkeypatch):
    """Theirs name the class of a callback as the key of its state."""
    place = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": place})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", place):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[place].ModelCheckpoint = callback
    state = {"model.weight": torch.ones(2)}
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "callbacks": {callback: {"best_model_path": "", "monitor": "val"}}}, path)
    monkeypatch.undo()
    assert torch.equal(read(path)["model.weight"], torch.ones(2))
