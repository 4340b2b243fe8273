"""The outlier dial: the same function in full precision, bit for bit, and other activations."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from quest.config import ConfigError, validate
from quest.diffusion.models import MODELS, find, get
from quest.diffusion.outliers import pairs, rescale
from quest.diffusion.sampling import generate
from quest.metrics import Cell, measure
from quest.metrics.noise_prediction import eps_error
from quest.report import outliers


def inputs_of(denoiser, call):
    """The largest input of every layer in one call of a denoiser, and the prediction."""
    largest = {}
    layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    handles = [
        m.register_forward_pre_hook(lambda _m, args, n=n: largest.__setitem__(n, args[0].abs().max().item()))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        prediction = denoiser(**call).sample
    for handle in handles:
        handle.remove()
    return largest, prediction


@pytest.mark.parametrize("factor", [4, 16])
@pytest.mark.parametrize("of", ["uncond", "class", "text"])
def test_predictions_keep_every_bit_and_some_layers_read_larger_inputs(request, of, factor):
    pipe, calibration = (request.getfixturevalue(f"{of}_{part}") for part in ("pipe", "calibration"))
    call = calibration.inputs(torch.arange(4))
    denoiser = copy.deepcopy(pipe.unet)
    before, exact = inputs_of(denoiser, call)
    names = rescale(denoiser, factor)
    after, prediction = inputs_of(denoiser, call)
    assert torch.equal(prediction, exact)
    assert len(names) == len(set(names)) > 3
    larger = [name for name in before if after[name] > 1.5 * before[name]]
    assert larger and all(after[name] >= before[name] for name in before)
    assert "to_q" in {name.rpartition(".")[2] for name in larger}


def test_one_changes_nothing_and_other_factors_are_refused(class_pipe):
    denoiser = copy.deepcopy(class_pipe.unet)
    weights = [p.clone() for p in denoiser.parameters()]
    rescale(denoiser, 1)
    assert all(map(torch.equal, weights, denoiser.parameters()))
    for factor in (0, 3, 10):
        with pytest.raises(ValueError, match="valid: powers of two"):
            rescale(denoiser, factor)


def test_four_bits_lose_more_with_outliers(class_pipe, class_calibration):
    import quest

    errors = []
    for factor in (1, 16):
        pipe = copy.copy(class_pipe)
        pipe.unet = copy.deepcopy(class_pipe.unet)
        rescale(pipe.unet, factor)
        student = quest.quantize(pipe, method="rtn", bits="w8a4", calibration=class_calibration)
        errors.append(eps_error(student, class_calibration)[0].mean().item())
    assert errors[1] > 1.5 * errors[0]


def test_every_pair_has_as_many_rows_as_columns(text_pipe):
    found = list(pairs(text_pipe.unet))
    kinds = {name.rpartition(".")[2] for name, *_ in found}
    assert kinds >= {"to_out", "to_k", "2", "to_v", "to_q", "0", "proj_in"}
    assert all(one.shape[1] == rows[0].shape[0] for _, rows, columns in found for one in columns)


def test_a_model_that_ships_has_a_name_for_each_setting_of_the_dial():
    assert get("photos-class-x4").folder == MODELS["photos-class"].folder
    assert find("photos-class-x16").protocol == MODELS["photos-class"].protocol
    for name in ("photos-class-x3", "imagenet-x4", "x4"):
        assert find(name) is None
    config = {
        "name": "mine",
        "models": {"photos-class-x4": {"images": 50}},
        "grid": [{"model": ["photos-class-x4"], "method": ["fp"], "bits": ["w32a32"]}],
        "methods": {"fp": {}},
    }
    validate(config)
    config["models"]["photos-class-x5"] = {"images": 50}
    with pytest.raises(ConfigError, match="unknown model"):
        validate(config)


def test_from_the_dial_to_the_table_of_leads(class_pipe, class_model, class_calibration):
    """Two methods at two settings on a tiny model: quantized, sampled, measured and compared."""
    import quest

    def sampled(pipe, errors):
        made = list(generate(pipe, class_model, "evaluation", 8))
        index, images = (np.concatenate([batch[i] for batch in made]) for i in (0, 2))
        pool = images.reshape(8, -1)[:, :6].astype(np.float32)
        features = dict.fromkeys(("pool", "spatial", "logits"), pool)
        latents = torch.cat([batch[1] for batch in made]).numpy()
        return Cell(index, features, images, latents, errors, timesteps=np.array([1]))

    cells, exact = [], {}
    for factor in (1, 4):
        pipe = copy.copy(class_pipe)
        pipe.unet = copy.deepcopy(class_pipe.unet)
        rescale(pipe.unet, factor)
        exact[factor] = sampled(pipe, None)
        for method in ("rtn", "rtn-mse"):
            student = quest.quantize(pipe, method=method, bits="w8a4", calibration=class_calibration)
            measured = measure(sampled(student, np.ones((4, 1))), None, exact[factor], extractor="scenes")
            name = {"model": "tiny" if factor == 1 else f"tiny-x{factor}", "method": method, "bits": "w8a4"}
            cells.append(measured | name)
    assert np.array_equal(exact[1].images, exact[4].images)
    found = outliers.frame(cells).set_index(["metric", "factor"])
    assert set(found.index.get_level_values("metric")) >= {"log_latent_mse", "psnr"}
    assert found.loc[("psnr", 4), "grows"] in ("grows", "shrinks", "neither")
    lead = {factor: found.loc[("psnr", factor), "lead"] for factor in (1, 4)}
    assert found.loc[("psnr", 4), "growth"] == pytest.approx(lead[4] - lead[1]) and lead[4] != lead[1]
