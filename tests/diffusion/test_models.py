import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from quest.diffusion import models
from quest.diffusion.models import MODELS, SEEDS


def test_importing_the_table_does_not_import_torch():
    code = "import sys, quest.diffusion.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_protocols_in_one_line():
    assert {name: model.protocol for name, model in MODELS.items() if not name.startswith("tiny-")} == {
        "scenes-uncond": "ddim 40, eta 1, guidance 1",
        "scenes-class": "ddim 20, eta 0, guidance 3",
        "scenes-text": "plms 20, guidance 3",
        "photos-class": "ddim 20, eta 0, guidance 3",
        "photos-dit": "ddim 20, eta 0, guidance 3",
        "emoji-uncond": "ddim 40, eta 1, guidance 1",
        "emoji-text": "plms 20, guidance 3",
        "lsun-bedrooms": "ddim 200, eta 1, guidance 1",
        "lsun-churches": "ddim 500, eta 0, guidance 1",
        "imagenet": "ddim 20, eta 0, guidance 3",
        "sd14": "plms 50, guidance 7.5",
        "cifar10": "ddim-quadratic 100, eta 0, guidance 1",
    }


def test_unknown_model_lists_the_known():
    with pytest.raises(ValueError, match="'scenes-txt' is not one of scenes-uncond, scenes-class, scenes-text"):
        models.get("scenes-txt")


SHIPPED = [model for model in MODELS.values() if model.origin is None]


@pytest.mark.parametrize("model", SHIPPED, ids=lambda model: model.name)
def test_an_untrained_model_says_how_to_train_it(model, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "ZOO", tmp_path)
    with pytest.raises(FileNotFoundError, match=f"{model.name}: .*snakemake zoo"):
        model.load()


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
def test_half_precision_files_load_as_float32(kind, request, tmp_path, monkeypatch):
    shipped = request.getfixturevalue(f"{kind}_model").load().to(torch.float16)
    shipped.save_pretrained(tmp_path / f"scenes-{kind}")
    monkeypatch.setattr(models, "ZOO", tmp_path)
    pipe = models.get(f"scenes-{kind}").load()
    assert type(pipe) is type(shipped)
    modules = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
    assert len(modules) == len([m for m in shipped.components.values() if isinstance(m, torch.nn.Module)]) >= 2
    for module in modules:
        assert not module.training
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    for a, b in zip(pipe.unet.parameters(), shipped.unet.parameters(), strict=True):
        assert torch.equal(a, b.float())


def test_splits_never_share_a_seed():
    model = MODELS["scenes-uncond"]
    seeds = [set(model.seeds(split, range(50_000))) for split in SEEDS]
    assert sum(map(len, seeds)) == len(set.union(*seeds))
    assert model.seeds("calibration", [0, 7]) == [1_000_000, 1_000_007]
    with pytest.raises(ValueError, match="split: 'train' is not one of"):
        model.seeds("train", [0])


def test_conditions_are_the_scenes_of_the_split():
    from quest.diffusion.scenes import draw

    scenes = draw("evaluation", 12)
    indices = [3, 11, 3, 0]  # any order, repeats
    labels = MODELS["scenes-class"].conditions("evaluation", indices)["class_labels"]
    assert labels == [scenes.labels()[i] for i in indices] and all(type(label) is int for label in labels)
    assert MODELS["scenes-text"].conditions("evaluation", indices) == {
        "prompt": [scenes.captions()[i] for i in indices]
    }
    assert MODELS["scenes-uncond"].conditions("evaluation", indices) == {}


def test_a_source_of_captions_may_end():
    captions = ["one", "two", "three"]
    model = replace(MODELS["scenes-text"], source=lambda split, start, stop: captions[start:stop])
    assert model.conditions("evaluation", np.array([2, 0])) == {"prompt": ["three", "one"]}
    with pytest.raises(ValueError, match="scenes-text: split 'evaluation' has fewer than 4 captions"):
        model.conditions("evaluation", [0, 3])


def test_steps_divide_the_schedule_and_groups_divide_the_steps():
    for model in MODELS.values():
        assert 1000 % model.steps == 0  # "leading" spacing reproduces the original sampler only then
        distinct = 96 if model.sampler == "ddim-quadratic" else model.steps  # of the first few some coincide
        assert distinct % model.time_groups == 0


def test_imagenet_has_every_class_as_often():
    labels = MODELS["imagenet"].conditions("evaluation", range(50_000))["class_labels"]
    assert set(np.bincount(labels)) == {50}
    few = MODELS["imagenet"].conditions("calibration", range(256))["class_labels"]
    assert len(set(few)) == 256 and max(np.diff(sorted(few))) <= 5  # spread over all of them


def test_only_files_with_a_known_hash_are_fetched():
    for model in MODELS.values():
        if model.origin and model.origin.url:
            assert len(model.origin.sha256) == 64 and int(model.origin.sha256, 16)


def test_the_papers_models_have_what_q_diffusions_commands_set():
    """Ranges and split shortcuts of arXiv:2302.04304's released commands; ImageNet is not among its models."""
    set_there = {name: (MODELS[name].split, MODELS[name].activation_ranges) for name in MODELS}
    assert set_there["lsun-bedrooms"] == (False, "ema-symmetric")
    assert set_there["lsun-churches"] == (False, "mse")
    assert set_there["sd14"] == set_there["scenes-text"] == (True, "ema")
    assert set_there["cifar10"] == set_there["scenes-uncond"] == (True, "ema-symmetric")
