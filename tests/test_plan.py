"""Plans of the shipped configs, and costs measured on a tiny pipeline."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from quest import checkpoint, cost, plan, timing
from quest.__main__ import main
from quest.layers import quant_layers, swap
from quest.metrics import features
from quest.models import MODELS

CONFIGS = Path(__file__).parents[1] / "workflow" / "config"


def config(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def costs(model, machine="box", **values):
    return [
        {"model": model, "machine": machine, "what": what.replace("_", " "), "value": value, "unit": "s"}
        | {"batch": "50", "weights": "trained", "date": "2026-11-22"}
        for what, value in values.items()
    ]


def test_jobs_of_the_smoke_config():
    # One model in two shards; full precision and two methods at one bit width.
    assert plan.jobs(config("smoke")) == {
        "trajectories": 1, "quantize": 2, "sample": 6, "metrics": 3, "tables": 1, "curves": 1, "grid": 1, "all": 1
    }  # fmt: skip


def test_starting_points_and_full_precision_are_made_though_the_grid_leaves_them_out():
    small = config("smoke") | {"grid": [{"model": ["scenes-class"], "method": ["quest"], "bits": ["w4a4"]}]}
    sampled, made = plan.cells(small)
    assert [run.path for run in sampled] == ["scenes-class/fp/w32a32", "scenes-class/quest/w4a4"]
    assert [run.path for run in made] == ["scenes-class/quest/w4a4", "scenes-class/rtn/w4a4"]
    assert plan.jobs(small)["metrics"] == 1


def test_jobs_of_the_papers_grid():
    paper = config("paper")
    count = plan.jobs(paper)
    assert count["model"] == len(paper["models"]) and count["trajectories"] == len(paper["models"])
    named = [m for m, s in paper["models"].items() if s["reference"] != "none"]
    assert count["reference"] == len(named) and "tiny_checkpoint" not in count and "grid" not in count
    assert count["network"] == 2  # Inception and CLIP


def test_sizes_are_exact_without_weights():
    bedrooms, sd = plan.shape(MODELS["lsun-bedrooms"]), plan.shape(MODELS["sd14"])
    assert bedrooms.parameters == pytest.approx(274.06e6, rel=1e-4) and bedrooms.latent == 3 * 64 * 64
    assert sd.parameters == pytest.approx(859.52e6, rel=1e-4) and sd.latent == 4 * 64 * 64
    assert bedrooms.image == 3 * 256**2 and sd.image == 3 * 512**2 and sd.context == 77 * 768
    cifar = plan.shape(MODELS["cifar10"])
    assert cifar.parameters == pytest.approx(143.2e6 / 4, rel=2e-3) and cifar.latent == cifar.image == 3 * 32**2
    shipped = plan.shape(MODELS["scenes-class"])
    assert shipped.latent == 8 * 8 * 8 and shipped.parameters > 1e6


@pytest.mark.parametrize("name, gflops", [("lsun-bedrooms", 202.6), ("lsun-churches", 41.9), ("cifar10", 12.47)])
def test_work_is_that_which_q_diffusion_published(name, gflops):
    """Two operations to a multiply-accumulate there (arXiv:2302.04304, reckoned from its tables of bit operations)."""
    found = plan.footprint(name, "w32a32")
    assert 2 * found["macs"] == pytest.approx(gflops * 1e9, rel=4e-3)
    assert found["bops"] == 1024 * found["macs"] and found["bytes"] == 4 * found["parameters"]


def test_footprints_of_shipped_models_are_those_of_the_models_themselves():
    """From the configuration alone, and from the loaded pipeline, quantized."""
    model = MODELS["scenes-text"]
    pipe = model.load()
    with torch.no_grad():
        text = pipe.encode_prompt(["a red circle"], "cpu", 1, False)[0]
    size = pipe.unet.config.sample_size
    sample = torch.zeros(1, pipe.unet.config.in_channels, size, size)
    work = cost.macs(pipe.unet, {"sample": sample, "timestep": torch.tensor([5]), "encoder_hidden_states": text})
    assert plan.footprint(model.name, "w32a32") == cost.footprint(pipe.unet, work)
    student = swap(pipe, 4, 8, keep=model.keep, softmax_bits=model.softmax_bits)
    for _, layer in quant_layers(student.unet):
        layer.choose_weight_range()
    assert plan.footprint(model.name, "w4a8") == cost.footprint(student.unet, work)
    assert (
        sum(v.numel() * v.element_size() for v in checkpoint.state(student.unet).values())
        == (plan.footprint(model.name, "w4a8")["bytes"])
    )


def test_hours_are_the_costs_times_the_work():
    small = config("smoke")  # 120 images, 8 + 4 trajectories in batches of 50, 20 steps, guided
    known = {"call": 0.002, "quantized_call": 0.003, "training_step": 0.01, "decode": 0.1, "features": 0.2, "start": 10}
    found = {part.kind: part for part in plan.parts(small, costs("scenes-class", **known), "box")}
    drawn = 120 * 20 * 2
    assert found["sample, full precision"].hours * 3600 == pytest.approx(drawn * 0.002 + 120 * 0.3 + 2 * 10)
    assert found["sample, quantized"].hours * 3600 == pytest.approx(2 * (drawn * 0.003 + 120 * 0.3) + 4 * 10)
    assert found["trajectories"].hours * 3600 == pytest.approx((50 * 40 + 32 * 20) * 0.002 + 10)
    calibration = 8 * 40
    quest = (5 + 5) * 16 * 0.01 + calibration * 0.002
    assert found["quantize"].hours * 3600 == pytest.approx(quest + 2 * 10)
    assert found["sample, full precision"].bytes == 120 * (4 * (64 + 112 + 48) + 4 * 512 + 3 * 64 * 64)


def test_what_was_not_measured_is_said_and_never_guessed():
    known = costs("scenes-class", call=0.002, start=10)
    told = plan.report(config("smoke"), known, "box")
    assert "| scenes-class | sample, quantized | 4 | not measured: quantized call, decode, features |" in told
    assert "so this is no total" in told and "memory not measured" in told
    elsewhere = plan.report(config("smoke"), known, "another box")
    assert "nothing measured here; `python -m quest measure scenes-class" in elsewhere
    assert "(measured on box)" in elsewhere and "Hours of one device, of what was measured: 0.0" in elsewhere
    parts = plan.parts(config("smoke") | {"methods": {"fp": {}, "rtn": {}, "quest": {"init": "rtn"}}}, [], "box")
    assert all(math.isnan(part.hours) for part in parts)


def test_a_method_whose_work_is_not_written_down():
    other = config("smoke")
    other["methods"]["other"], other["grid"][1]["method"] = {}, ["other"]
    known = {what.replace(" ", "_"): 0.1 for what in timing.WHAT}
    found = {part.kind: part for part in plan.parts(other, costs("scenes-class", **known), "box")}
    assert math.isnan(found["quantize"].hours) and found["quantize"].missing == ("what other does",)


def test_command(tmp_path, capsys):
    file = tmp_path / "costs.csv"
    timing.record(costs("scenes-class", call=0.002, start=10), file)
    main(["plan", str(CONFIGS / "smoke.yaml"), "--machine", "box", "--costs", str(file)])
    told = capsys.readouterr().out
    assert "## Plan of `smoke` on box" in told and "| in all | 16 |" in told
    for arguments, error in {
        ("plan", "nowhere.yaml"): "plan: nowhere.yaml: no such file; valid: a config",
        ("plan", str(CONFIGS / "smoke.yaml"), "--machine", "H100", "--costs", str(file)): "on 'H100'; valid: box",
        ("measure", "sd15"): "measure: model: 'sd15' is not one of",
    }.items():
        with pytest.raises(SystemExit, match=error):
            main(list(arguments))


def test_records_replace_those_of_the_same_kind(tmp_path):
    file = tmp_path / "costs.csv"
    timing.record(costs("a", call=1, start=2) + costs("b", call=3), file)
    timing.record(costs("a", call=5) + costs("a", "other box", call=6), file)
    found = {(row["model"], row["machine"], row["what"]): row["value"] for row in timing.read(file)}
    kept = {("a", "box", "start"): 2, ("b", "box", "call"): 3}
    assert found == kept | {("a", "box", "call"): 5, ("a", "other box", "call"): 6}
    file.write_text(file.read_text() + "a,box,speed,1,s,50,trained,2026-11-22\n")
    with pytest.raises(ValueError, match="costs.csv, line 6: 'speed' is not one of call, quantized call"):
        timing.read(file)
    file.write_text("model,value\n")
    with pytest.raises(ValueError, match="needed: model, machine, what"):
        timing.read(file)


def test_measured_costs_of_a_tiny_pipeline(text_model, monkeypatch):
    monkeypatch.setitem(features.EXTRACTORS, "scenes", lambda: lambda images: images.float().mean())
    rows = timing.measure(text_model, "cpu", batch=2, repeats=1)
    found = {row["what"]: float(row["value"]) for row in rows}
    assert set(found) == set(timing.WHAT)
    assert all(value > 0 for value in found.values()) and found["memory"] > 50
    assert {row["machine"] for row in rows} == {timing.machine("cpu")} and rows[0]["weights"] == "trained"


def test_measured_costs_without_weights_are_of_the_denoiser():
    def absent(device):
        raise FileNotFoundError("no weights")

    model = replace(MODELS["tiny-imagenet"], load=absent)
    rows = timing.measure(model, "cpu", batch=2, repeats=1)
    assert {row["what"] for row in rows} == {"start", "call", "memory"} and rows[0]["weights"] == "untrained"
