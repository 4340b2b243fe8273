"""Names of layers without torch are those that quantization finds in the denoiser."""

import pytest

from quest.config import ConfigError, Run
from quest.diffusion.models import MODELS, ZOO
from quest.planning import keep
from quest.quantization.swapping import quantizable


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.origin is None])
def test_names_in_the_files_of_models_that_ship(name):
    assert sorted(keep.stored(ZOO / name)) == sorted(keep.built(name))


@pytest.mark.parametrize("kind", ["uncond", "class", "text"])
def test_names_in_a_folder_that_diffusers_writes(kind, request, tmp_path):
    pipe = request.getfixturevalue(f"{kind}_pipe")
    pipe.unet.save_pretrained(tmp_path / "unet", max_shard_size="100KB")  # several files
    layers, processors = quantizable(pipe.unet)
    assert sorted(keep.stored(tmp_path)) == sorted([*layers, *processors]) and len(list(tmp_path.rglob("*tensors"))) > 1


def config(kept, **models):
    return {"models": {"scenes-class": {}, "lsun-bedrooms": {}} | models, "methods": {"rtn": {"keep": kept}, "fp": {}}}


@pytest.mark.parametrize("model", ["scenes-class", "lsun-bedrooms"])  # with files, and built without
def test_a_name_that_no_layer_has(model):
    one = [Run(model, "rtn", "w4a4"), Run(model, "fp", "w32a32")]
    keep.check(config({"conv_in": 8, "*.processor": 32, "*.conv_shortcut": 8}), one)
    with pytest.raises(ConfigError, match=f"rtn on {model}: keep: no layer is named like 'conv_inn'"):
        keep.check(config({"conv_inn": 8}), one)


def test_a_declared_model_is_checked_where_its_files_name_layers(tmp_path, uncond_pipe):
    mine = config({"conv_inn": 8}, mine={"pipeline": str(tmp_path)})
    keep.check(mine, [Run("mine", "rtn", "w4a4")])  # no safetensors: its jobs check it
    uncond_pipe.unet.save_pretrained(tmp_path / "unet")
    keep.stored.cache_clear()
    with pytest.raises(ConfigError, match="rtn on mine: keep: no layer is named like 'conv_inn'; names are such as"):
        keep.check(mine, [Run("mine", "rtn", "w4a4")])
