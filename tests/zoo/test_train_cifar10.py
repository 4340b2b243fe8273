"""The CIFAR-10 training script: the published shape, data from a file, the same parameters after a stop."""

import io

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file

from quest.diffusion.published import ARCHITECTURE
from quest.zoo import train_cifar10
from quest.zoo.pictures import cifar10
from quest.zoo.train_cifar10 import train

TINY = ARCHITECTURE | {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}


def test_the_denoiser_has_ddpms_parameters():
    with torch.device("meta"):
        unet = UNet2DModel(**ARCHITECTURE)
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6, 1) == 35.7  # arXiv:2006.11239, App. B
    assert {m.heads for m in unet.modules() if hasattr(m, "to_q")} == {1}


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """Four images of one colour each, as the file has them."""
    parts = []
    for level in (0, 80, 160, 240):
        stream = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), level, np.uint8)).save(stream, "JPEG", quality=95)
        parts.append(stream.getvalue())
    path = tmp_path_factory.mktemp("cifar") / "train.npz"
    offsets = np.cumsum([0, *map(len, parts)])
    np.savez(
        path,
        data=np.frombuffer(b"".join(parts), np.uint8),
        offsets=offsets,
        labels=np.zeros(4, np.uint8),
        classes=["all"],
    )
    return path


def test_images_come_from_a_file_of_jpegs(jpegs, tmp_path):
    images = cifar10(jpegs)[0]
    assert images.shape == (4, 32, 32, 3) and images.dtype == np.uint8
    assert np.abs(images.reshape(4, -1).astype(int) - [[0], [80], [160], [240]]).max() <= 2
    np.savez(tmp_path / "other.npz", arr_0=images)
    with pytest.raises(ValueError, match="other.npz: has arr_0; a data file of pictures also has data, off"):
        cifar10(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder; --download fetches"):
        cifar10(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="--download fetches CIFAR-10 there"):
        cifar10(tmp_path)


def test_a_stopped_run_ends_with_the_same_parameters(jpegs, tmp_path, monkeypatch):
    images = cifar10(jpegs)[0]
    options = {"iterations": 4, "batch": 4, "save_every": 2, "architecture": TINY}
    train(images, tmp_path / "whole", **options)
    save = train_cifar10.save_checkpoint

    def killed(path, iteration, *rest):
        save(path, iteration, *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_cifar10, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(images, tmp_path / "cut", **options)
    monkeypatch.undo()
    train(images, tmp_path / "cut", **options)
    one, other = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # What is written is the average, not the parameters of the last iteration.
    last = torch.load(tmp_path / "cut.checkpoint", weights_only=True)["modules"][0]
    assert not torch.equal(last["conv_in.weight"], one["conv_in.weight"])


def test_a_loss_that_is_not_finite_stops_the_run(jpegs, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cifar10, "LEARNING_RATE", float("inf"))
    with pytest.raises(FloatingPointError, match="the loss is nan in iteration 1"):
        train(cifar10(jpegs)[0], tmp_path / "out", iterations=3, batch=2, architecture=TINY)
