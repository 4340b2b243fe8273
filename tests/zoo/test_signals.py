from functools import partial

import numpy as np
import pytest
import torch

import quest
from quest.diffusion.calibration_set import collect
from quest.properties.sensitivity import parts
from quest.quantization.layer_names import KEEP
from quest.zoo import signals, train_signals


def test_a_signal_is_the_same_however_many_are_drawn():
    many = signals.draw("train", 24)
    few = signals.draw("train", 8, start=16)
    assert np.array_equal(many.values[16:], few.values) and np.array_equal(many.labels[16:], few.labels)
    assert not np.array_equal(signals.draw("validation", 24).values, many.values)
    with pytest.raises(ValueError, match="'test' is not one of train"):
        signals.draw("test", 1)


def test_classes_differ_in_what_their_names_say():
    drawn = signals.draw("train", 800)
    assert drawn.values.shape == (800, signals.LENGTH) and drawn.values.dtype == np.float32
    assert abs(drawn.values.mean()) < 0.15 and 0.8 < drawn.values.std() < 1.2
    crossings = (np.diff(np.sign(drawn.values - drawn.values.mean(1, keepdims=True))) != 0).sum(1)
    of_class = {name: crossings[drawn.labels == i].mean() for i, name in enumerate(signals.CLASSES)}
    assert all(of_class[f"fast {kind}"] > 1.5 * of_class[f"slow {kind}"] for kind in signals.WAVEFORMS)


def test_the_command_trains_into_the_file_that_it_is_given(tmp_path, monkeypatch):
    out = tmp_path / "signals.safetensors"
    monkeypatch.setattr(train_signals, "train", partial(train_signals.train, batch=4, examples=8))
    monkeypatch.setattr("sys.argv", ["train_signals", "-o", str(out), "--iterations", "2"])
    train_signals.main()
    assert out.is_file()


def test_a_trained_denoiser_is_quantized_like_any_other(tmp_path, undeclared):
    train_signals.train(tmp_path / "signals.safetensors", iterations=2, batch=4, examples=8)
    model = train_signals.model(tmp_path / "signals.safetensors")
    pipe = model.load()
    calibration = collect(pipe, model, "calibration", 4)
    assert calibration.sample.shape == (4 * model.steps, 1, 1, signals.LENGTH)
    assert {"time embedding", "attention q, k, v", "feed-forward", "attention products"} <= set(parts(pipe.unet))
    assert "other" not in parts(pipe.unet)
    settings = dict(samples=4, time_groups=2, tla_iterations=1, cma_iterations=1, batch=4)
    student = quest.quantize(pipe, "quest-suite", "w4a4", calibration=calibration, **settings)
    assert undeclared(student.unet, 4, 4, KEEP) == []
    inputs = calibration.inputs(torch.arange(4))
    prediction = student.unet(**inputs).sample
    assert prediction.shape == inputs["sample"].shape and prediction.isfinite().all()


def test_training_lowers_the_error(tmp_path):
    short, long = (
        train_signals.train(tmp_path / "signals.safetensors", iterations, batch=16, examples=64)
        for iterations in (2, 30)
    )
    assert long < 0.9 * short
