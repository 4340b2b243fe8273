"""Models that only a config declares, from their folder to their metrics, a tiny one of each family."""

import json

import families
import numpy as np
import pytest
import torch
from PIL import Image

import quest
from quest.config import ConfigError, validate
from quest.diffusion import declared, models
from quest.diffusion.calibration_set import CalibrationSet, collect
from quest.diffusion.denoisers import denoiser_of
from quest.diffusion.sampling import generate
from quest.learning import units
from quest.metrics import Cell, measure
from quest.metrics.features import extract
from quest.metrics.noise_prediction import eps_error
from quest.planning import plan, shapes
from quest.quantization import cost, guards, placement
from quest.quantization.layers import quant_layers
from quest.quantization.swapping import swap

# What a config says of each family beside its folder; what follows from the folder: sampler, conditioning, halves.
PROMPTS = {"prompts": "prompts.txt"}
SETTINGS = {
    "sd1": (PROMPTS | {"sampler": "dpmsolver++", "steps": 4, "guidance": 5.0}, ("dpmsolver++", "text", 2)),
    "sd2": (PROMPTS | {"steps": 4, "guidance": 5.0}, ("dpmsolver++", "text", 2)),
    "turbo": (PROMPTS | {"steps": 2}, ("euler-ancestral", "text", 1)),
    "lcm": (PROMPTS | {"steps": 3, "guidance": 8.0}, ("lcm", "text", 1)),
    "ddpm": ({"steps": 4}, ("ddpm", "none", 1)),
    "dit": ({"steps": 4, "guidance": 3.0}, ("ddim", "class", 2)),
    "pixart": (PROMPTS | {"steps": 4, "guidance": 4.5}, ("dpmsolver++", "text", 2)),
    "sdxl": (PROMPTS | {"steps": 4, "guidance": 5.0}, ("euler", "text", 2)),
    "inpainting": (PROMPTS | {"steps": 4, "guidance": 5.0, "pictures": "pictures"}, ("ddim", "text", 2)),
    "sd3": (PROMPTS | {"steps": 4, "guidance": 7.0}, ("flow-euler", "text", 2)),
}
QUEST = {"tla_iterations": 1, "cma_iterations": 1, "batch": 2, "samples": 4}


@pytest.fixture(scope="session")
def folder_of(text_pipe, tmp_path_factory):
    """A function that writes the pipeline of a family once and gives its folder."""
    root = tmp_path_factory.mktemp("pipelines")

    def folder(name):
        if not (root / name).is_dir():
            families.make(name, text_pipe.tokenizer).save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture
def declare(folder_of, tmp_path, monkeypatch):
    """A function that declares a family as a config does, records it as rule `model` does, and gives it as scripts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "PREPARED", tmp_path / "models")
    monkeypatch.setattr(declared, "PREPARED", tmp_path / "models")
    (tmp_path / "prompts.txt").write_text("".join(f"a {word}\n" for word in ("star", "cat", "tree")), encoding="utf-8")

    (tmp_path / "pictures").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(256, size=(20, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / f"{i}.png")

    def declare(family, **changes):
        settings = {"pipeline": str(folder_of(family)), "images": 4} | SETTINGS[family][0] | changes
        config = {"name": "mine", "models": {"my-model": settings}, "methods": {"fp": {}, "rtn": {}}}
        config["grid"] = [{"model": ["my-model"], "method": ["rtn"], "bits": ["w4a8"]}]
        validate(config)
        of_config = declared.of_config(config)["my-model"]
        declared.prepare("my-model", settings, tmp_path / "models" / "my-model")
        model = models.get("my-model")
        assert model.protocol == of_config.protocol
        return model

    return declare


def cell_of(pipe, model, **errors) -> Cell:
    made = list(generate(pipe, model, "evaluation", 4))
    index, latents, images = (np.concatenate([np.asarray(batch[i]) for batch in made]) for i in range(3))
    assert images.dtype == np.uint8 and len(np.unique(images)) > 20 and np.isfinite(latents).all()
    return Cell(index, extract(images, model.extractor), images, latents, **errors)


@pytest.mark.parametrize("family", SETTINGS)
def test_a_model_in_a_config_is_quantized_sampled_and_measured(family, declare, tmp_path):
    """QuEST with integer kernels, and the same images from the file as from memory on the reference kernel."""
    model = declare(family)
    assert (model.sampler, model.conditioning, model.halves) == SETTINGS[family][1]
    pipe = model.load()
    calibration = collect(pipe, model, "calibration", 4)
    assert len(calibration) == 4 * model.calls * model.halves
    calibration.save(tmp_path / "calibration.safetensors")
    calibration = CalibrationSet.load(tmp_path / "calibration.safetensors")
    recipe = model.recipe(quest_method().quantize, 8) | QUEST
    student = quest.quantize(pipe, "quest-suite", "w4a8", calibration=calibration, **recipe)
    quest.save(student, tmp_path / "w4a8.safetensors")

    again = quest.load(model.load(), tmp_path / "w4a8.safetensors", kernel="reference")
    fast = quest.load(model.load(), tmp_path / "w4a8.safetensors", kernel="integer")
    on_integers = [layer.kernel_name for _, layer in quant_layers(denoiser_of(fast))]
    assert on_integers.count("integer") > 0.8 * len(on_integers)
    here, there, kernel = (cell_of(p, model) for p in (student, again, fast))
    np.testing.assert_array_equal(there.latents, here.latents)
    rows = torch.arange(len(calibration) - 4 * model.halves, len(calibration))
    with torch.no_grad():
        exact, fused = (denoiser_of(p)(**calibration.inputs(rows)).sample for p in (again, fast))
    # A value at a tie may take the neighbouring code.
    assert (exact - fused).abs().mean() < 0.02 * exact.abs().mean()
    share = placement.realizable(denoiser_of(fast), cost.macs(denoiser_of(pipe), calibration.inputs(rows[:1])))
    assert (share < 1) == (family == "pixart")  # its attention to the masked prompt is the reference's

    errors, steps = eps_error(fast, collect(pipe, model, "evaluation", 2))
    assert 0 < errors.mean() < 0.5
    kernel = cell_of(fast, model, eps_error=errors.numpy(), timesteps=np.array(steps))
    found = measure(kernel, None, cell_of(pipe, model), extractor=model.extractor, protocol=model.protocol)
    values = {row["metric"]: row["value"] for row in found["rows"]}
    assert {"latent_mse", "psnr", "eps_error"} <= values.keys() and all(map(np.isfinite, values.values()))
    assert values["latent_mse"] > 0


def quest_method():
    from baselines import METHODS

    return METHODS["quest-suite"]


@pytest.mark.parametrize("family", SETTINGS)
def test_a_plan_reckons_with_a_declared_model(family, declare):
    """Sizes and work from the files of its folder, as those of the pipeline that it loads."""
    model = declare(family)
    pipe = model.load()
    denoiser, calibration = denoiser_of(pipe), collect(pipe, model, "calibration", 1)
    shape = shapes.shape(model)
    assert shape.parameters == sum(p.numel() for p in denoiser.parameters())
    assert shape.latent == calibration.sample[0].numel()
    assert shapes.work(model) == cost.macs(denoiser, calibration.inputs(torch.tensor([0])))
    settings = {"pipeline": str(model.origin.folder), "images": 4} | SETTINGS[family][0]
    config = {"name": "mine", "models": {"my-model": settings}, "methods": {"fp": {}, "rtn": {}}}
    config["grid"] = [{"model": ["my-model"], "method": ["rtn"], "bits": ["w4a8"]}]
    told = plan.report(config, [], "box")
    assert "| my-model | quantize | 1 | not measured: quantized call, start |" in told and "| my-model | w4a8 |" in told


@pytest.mark.parametrize("family", ["sd1", "ddpm", "dit", "pixart", "sd3", "sdxl", "inpainting"])
def test_guided_halves_come_without_the_condition_first(family, declare):
    """The halves of the set combine to what the sampler steps with: another order would guide away from the prompt."""
    model = declare(family)
    pipe = model.load()
    taken = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda output, *args, **kwargs: taken.append(output) or step(output, *args, **kwargs)
    calibration = collect(pipe, model, "calibration", 8)
    first = calibration.target[calibration.calls()[:8]]  # [8, halves, C, h, w]
    guided = first[:, 0] if model.halves == 1 else first[:, 0] + model.guidance * (first[:, 1] - first[:, 0])
    torch.testing.assert_close(guided[:, :3], taken[0][:8, :3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", SETTINGS)
def test_quantized_attention_with_32_bits_predicts_what_the_pipeline_does(family, declare):
    """Masks, joint streams, norms of queries: what the processors of diffusers compute of each family."""
    model = declare(family)
    pipe = model.load()
    calibration = collect(pipe, model, "calibration", 2)
    student = swap(pipe, 32, 32, keep={"*": 32}, softmax_bits=32)
    rows = calibration.calls()[:2].flatten()
    with torch.no_grad():
        prediction = denoiser_of(student)(**calibration.inputs(rows)).sample
    torch.testing.assert_close(prediction, calibration.target[rows], rtol=1e-3, atol=1e-4)


FAULTS = {
    "no folder": ("sd1", {"pipeline": "nowhere"}, "models.my-model.pipeline: no .*model_index.json"),
    "no steps": ("sd1", {"steps": None}, "models.my-model.steps"),
    "unknown sampler": ("sd1", {"sampler": "dpm"}, "models.my-model.sampler: 'dpm' is not one of ddim, .*dpmsolver"),
    "no prompts": ("sd1", {"prompts": None}, "models.my-model.prompts: missing"),
    "prompts of a model without text": ("ddpm", PROMPTS, "models.my-model.prompts: it takes no text"),
    "captions of a model of the suite": ("sd1", {"captions": "c.txt"}, "models.my-model.captions: .* takes none"),
    "no pictures": ("inpainting", {"pictures": None}, "models.my-model.pictures: name a folder"),
    "guidance of a model without condition": ("ddpm", {"guidance": 2.0}, "models.my-model.guidance"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_declaration_that_fits_no_pipeline(fault, declare, folder_of):
    family, changes, said = FAULTS[fault]
    settings = {"pipeline": str(folder_of(family)), "images": 4} | SETTINGS[family][0] | changes
    config = {"name": "mine", "models": {"my-model": {k: v for k, v in settings.items() if v is not None}}}
    config |= {"methods": {"rtn": {}}, "grid": [{"model": ["my-model"], "method": ["rtn"], "bits": ["w4a8"]}]}
    with pytest.raises(ConfigError, match=said):
        validate(config)


def test_names_and_protocols_of_the_suite_stay_its_own(folder_of):
    mine = {"pipeline": str(folder_of("ddpm")), "images": 4, "steps": 4}
    with pytest.raises(ValueError, match="models.scenes-text: a model of the suite has this name"):
        declared.of_config({"models": {"scenes-text": mine}})
    with pytest.raises(ValueError, match="models.scenes-text.steps: a model of the suite has its own protocol"):
        declared.of_config({"models": {"scenes-text": {"images": 4, "steps": 4}}})


def test_prompts_of_evaluation_and_calibration_differ_where_there_are_enough():
    lines = [f"line {i}" for i in range(10)]
    evaluation = declared._cycled(lines, "evaluation", 0, 6)
    assert evaluation == lines[:6] and not set(evaluation) & set(declared._cycled(lines, "calibration", 0, 4))
    assert declared._cycled(lines, "evaluation", 9, 12) == ["line 9", "line 0", "line 1"]


def test_three_lines_of_python_draw_their_calibration(folder_of, monkeypatch):
    """`calibration=None` follows the defaults of the pipeline's call, made few here."""
    monkeypatch.setitem(declared.SHARED, "trajectories", 2)
    monkeypatch.setitem(declared.SHARED, "batch_size", 2)
    pipe = declared.load_pipeline(folder_of("sd1"))
    drawn, again = (quest.quantize(pipe, "rtn", calibration=kind(["a cat", "a dog"])) for kind in (list, tuple))
    assert denoiser_of(drawn).quantization["cost"]["calibration"]["halves"] == 2
    assert denoiser_of(drawn).quantization["cost"]["calibration"]["timesteps"] == 50
    assert all(torch.equal(p, denoiser_of(again).state_dict()[n]) for n, p in denoiser_of(drawn).state_dict().items())


@pytest.mark.parametrize("calibration", ["a cat", ["a cat", 1], b"a cat", 7, {"a cat": 1}])
def test_what_is_no_calibration_is_refused_with_what_is(calibration, folder_of):
    pipe = declared.load_pipeline(folder_of("sd1"))
    with pytest.raises(TypeError, match="calibration: .+; valid: a CalibrationSet, a list of prompts, or None"):
        quest.quantize(pipe, "rtn", calibration=calibration)


def test_what_cannot_be_quantized_is_refused_by_name(folder_of, tmp_path):
    """An attention processor that is not known; and a pipeline that needs an image to begin with."""
    pipe = declared.load_pipeline(folder_of("sd1"))
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    kind = type("SlicedAttnProcessor", (), {"__call__": lambda self, attn, hidden_states, **_: hidden_states})
    attention.processor = kind()
    with pytest.raises(ValueError, match="mid_block.attentions.0.*attn1: its attention processor is a SlicedAttn"):
        guards.check(pipe)
    index = json.loads((folder_of("ddpm") / "model_index.json").read_text(encoding="utf-8"))
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "NoPipeline"}), encoding="utf-8")
    with pytest.raises(ValueError, match="a NoPipeline; valid: LatentDiffusionPipeline and the pipelines of diffusers"):
        declared.load_pipeline(tmp_path)


@pytest.mark.parametrize("family", ["dit", "sd3", "sdxl"])
def test_reconstruction_takes_transformers_and_nested_conditions(family, declare, monkeypatch):
    """Learned rounding and steps, on which QuEST and its rivals start; here the rows stream through in small parts."""
    monkeypatch.setattr(units, "CHUNK", 3)
    model = declare(family)
    pipe = model.load()
    calibration = collect(pipe, model, "calibration", 2)
    few = dict(weight_iterations=1, activation_iterations=1, rows=8, batch=2, samples=8)
    student = quest.quantize(pipe, "q-diffusion", "w4a8", calibration=calibration, **few)
    rows = calibration.calls()[:2].flatten()
    with torch.no_grad():
        error = (denoiser_of(student)(**calibration.inputs(rows)).sample - calibration.target[rows]).square().mean()
    assert 0 < error < 0.2 * calibration.target[rows].square().mean()


def test_methods_that_do_not_fit_a_denoiser_say_so(declare):
    model = declare("dit")
    pipe = model.load()
    calibration = collect(pipe, model, "calibration", 2)
    with pytest.raises(ValueError, match="a DiTTransformer2DModel: tfmq-dm takes U-Nets"):
        quest.quantize(pipe, "tfmq-dm", "w4a8", calibration=calibration)
    with pytest.raises(ValueError, match="clip_sample"):
        quest.quantize(pipe, "ptqd", "w4a8", calibration=calibration, guidance=3.0)
