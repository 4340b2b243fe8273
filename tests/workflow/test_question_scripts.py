"""Where QuEST diverged, the jobs of `snakemake questions` say so and why, instead of failing."""

import json
import math
from dataclasses import replace

import pytest

from quest.quantization.checkpoint import save_diverged
from quest.report import properties
from workflow.scripts import activations, inference, temporal, tuning

REASON = "critical modules alignment, iteration 2: the loss is nan"


@pytest.fixture
def job(tmp_path, monkeypatch, class_model, class_calibration, first_calls):
    """job(script, *arguments): what it writes, run on two steps of the tiny class-conditional model.

    QuEST diverged on it.
    """
    monkeypatch.setattr("quest.diffusion.models.get", lambda name: replace(class_model, steps=2, time_groups=2))
    file, broken, output = (tmp_path / name for name in ("set.safetensors", "broken.safetensors", "out.json"))
    first_calls(class_calibration).save(file, {})
    save_diverged(broken, REASON, method="quest-suite", bits="w4a4", recipe={})

    def run(script, *arguments):
        words = {"{set}": file, "{broken}": broken}
        words = [script.__name__, *(str(words.get(word, word)) for word in arguments), "-o", str(output)]
        monkeypatch.setattr("sys.argv", words)
        script.main()
        return json.loads(output.read_text(encoding="utf-8"))

    return run


def test_activations_of_a_denoiser_that_diverged_are_rows_with_the_reason(job):
    files = ["--calibration", "{set}", "--evaluation", "{set}", "--init", "{broken}", "--finetuned", "{broken}"]
    found = job(activations, "tiny-class", "w4a4", *files)
    assert REASON in found["diverged"]["before finetuning"] and REASON in found["diverged"]["after finetuning"]
    frame = properties.activation_frame([_with_nan(found)])
    broken = frame[frame["denoiser"] != "full precision"]
    assert broken["value"].isna().all() and all(REASON in note for note in broken["note"])
    assert frame.loc[frame["denoiser"] == "full precision", "value"].notna().all()
    changes = properties.change_frame([_with_nan(found)])
    assert changes["value"].isna().all() and all(REASON in note for note in changes["note"])


def test_embeddings_are_measured_without_it(job):
    found = job(
        temporal, "tiny-class", "w4a4", "--calibration", "{set}", "--evaluation", "{set}", "--finetuned", "{broken}"
    )
    assert REASON in found["diverged"] and len(found["errors"]) == 6
    assert {row["ranges"] for row in found["distances"]} == set(properties.RANGE_KINDS)


def test_a_tuning_that_diverges_has_no_errors(job, class_calibration):
    """Also where it is the start that diverged."""
    found = job(tuning, "tiny-class", "w4a4", "--calibration", "{set}", "--evaluation", "{set}", "--init", "{broken}")
    assert REASON in found["diverged"]
    assert found["to_full_precision"] == [None] * len(class_calibration.trajectory.unique())


def test_a_tuning_takes_the_method_and_its_keywords(job, monkeypatch, class_pipe):
    """Here of a method that changes nothing, so that every error is 0."""
    asked = []
    monkeypatch.setattr("quest.quantize", lambda pipe, *words, **recipe: asked.append((*words, recipe)) or class_pipe)
    monkeypatch.setattr(tuning, "IMAGES", 4)
    files = ["--calibration", "{set}", "--evaluation", "{set}", "--init", "{broken}"]
    recipe = ["--method", "full-finetune", "--recipe", '{"local_cma": false}']
    found = job(tuning, "tiny-class", "w4a4", *files, *recipe)
    (method, bits, keywords) = asked[0]
    assert (method, bits, keywords["local_cma"], keywords["time_groups"]) == ("full-finetune", "w4a4", False, 2)
    assert found["method"] == "full-finetune" and set(found["to_full_precision"]) == {0.0}
    assert found["log_latent_mse"] == [None] * 4  # the logarithm of 0 is not finite


def test_training_and_held_out_scenes_have_noise_of_their_own():
    seeds = [tuning.noise_seed(seed) for seed in range(5)]
    assert len({*seeds, tuning.HELD_OUT}) == 6 and seeds[0] == 0


def test_nothing_is_timed(job):
    found = job(inference, "tiny-class", "--evaluation", "{set}", "--checkpoint", "{broken}")
    assert found["diverged"] == REASON and found["rows"] == []


def _with_nan(value):
    """As `quest.runtime.files.loads` reads it: null is NaN."""
    if isinstance(value, dict):
        return {key: _with_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_nan(one) for one in value]
    return math.nan if value is None else value
