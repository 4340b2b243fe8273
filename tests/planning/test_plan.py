"""Plans of the shipped configs, and the costs that they take from tables."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from baselines import METHODS
from quest.__main__ import main
from quest.config import ConfigError
from quest.diffusion.models import MODELS
from quest.planning import costs as table
from quest.planning import plan, shapes
from quest.planning.forecast import MOVED, REACHED, forecast
from quest.quantization import checkpoint, cost
from quest.quantization.layers import quant_layers
from quest.quantization.swapping import swap

CONFIGS = Path(__file__).parents[2] / "workflow" / "config"


def config(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))


def costs(model, machine="box", **values):
    return [
        {"model": model, "machine": machine, "what": what.replace("_", " "), "value": value, "unit": "s"}
        | {"batch": "50", "weights": "trained", "how": "measured", "date": "2026-11-22"}
        for what, value in values.items()
    ]


def test_jobs_of_the_smoke_config():
    # One model in two shards; full precision and two methods at one bit width.
    assert plan.jobs(config("smoke")) == {
        "trajectories": 1, "evaluation": 1, "quantize": 2, "sample": 6, "metrics": 3, "tables": 1, "curves": 1,
        "grid": 1, "all": 1,
    }  # fmt: skip


def test_starting_points_and_full_precision_are_made_though_the_grid_leaves_them_out():
    small = config("smoke") | {"grid": [{"model": ["scenes-class"], "method": ["quest-suite"], "bits": ["w4a4"]}]}
    sampled, made = plan.cells(small)
    assert [run.path for run in sampled] == ["scenes-class/fp/w32a32", "scenes-class/quest-suite/w4a4"]
    assert [run.path for run in made] == ["scenes-class/quest-suite/w4a4", "scenes-class/rtn/w4a4"]
    assert plan.jobs(small)["metrics"] == 1


def test_jobs_of_the_papers_grid():
    paper = config("paper")
    count = plan.jobs(paper)
    assert count["model"] == len(paper["models"]) and count["trajectories"] == len(paper["models"])
    named = [m for m, s in paper["models"].items() if s["reference"] != "none"]
    assert count["reference"] == len(named) and "tiny_checkpoint" not in count and "grid" not in count
    assert count["network"] == 2  # Inception and CLIP


def test_sizes_are_exact_without_weights():
    bedrooms, sd = shapes.shape(MODELS["lsun-bedrooms"]), shapes.shape(MODELS["sd14"])
    assert bedrooms.parameters == pytest.approx(274.06e6, rel=1e-4) and bedrooms.latent == 3 * 64 * 64
    assert sd.parameters == pytest.approx(859.52e6, rel=1e-4) and sd.latent == 4 * 64 * 64
    assert bedrooms.image == 3 * 256**2 and sd.image == 3 * 512**2 and sd.context == 77 * 768
    cifar = shapes.shape(MODELS["cifar10"])
    assert cifar.parameters == pytest.approx(143.2e6 / 4, rel=2e-3) and cifar.latent == cifar.image == 3 * 32**2
    shipped = shapes.shape(MODELS["scenes-class"])
    assert shipped.latent == 8 * 8 * 8 and shipped.parameters > 1e6


@pytest.mark.parametrize("name, gflops", [("lsun-bedrooms", 202.6), ("lsun-churches", 41.9), ("cifar10", 12.47)])
def test_work_is_that_which_q_diffusion_published(name, gflops):
    """Two operations to a multiply-accumulate there (arXiv:2302.04304, reckoned from its tables of bit operations)."""
    found = shapes.footprint(MODELS[name], "w32a32")
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
    assert shapes.footprint(model, "w32a32") == cost.footprint(pipe.unet, work)
    student = swap(pipe, 4, 8, keep=model.keep, softmax_bits=model.softmax_bits)
    for _, layer in quant_layers(student.unet):
        layer.choose_weight_range()
    assert shapes.footprint(model, "w4a8") == cost.footprint(student.unet, work)
    assert (
        sum(v.numel() * v.element_size() for v in checkpoint.state(student.unet).values())
        == (shapes.footprint(model, "w4a8")["bytes"])
    )


def test_hours_are_the_costs_times_the_work():
    small = config("smoke")  # 120 images, 8 + 4 trajectories in batches of 50, 20 steps, guided
    known = {"call": 0.002, "quantized_call": 0.003, "decode": 0.1, "features": 0.2, "start": 10}
    known |= {"ranges": 0.5, "ranges_row": 0.02, "temporal_alignment": 0.3, "temporal_alignment_row": 0.01}
    known |= {"critical_alignment": 0.4, "critical_alignment_row": 0.05}
    found = {part.kind: part for part in plan.parts(small, costs("scenes-class", **known), "box")}
    drawn = 120 * 20 * 2
    assert found["sample, full precision"].hours * 3600 == pytest.approx(drawn * 0.002 + 120 * 0.3 + 2 * 10)
    assert found["sample, quantized"].hours * 3600 == pytest.approx(2 * (drawn * 0.003 + 120 * 0.3) + 4 * 10)
    assert found["trajectories"].hours * 3600 == pytest.approx(
        (2 * 50 * 40 + 2 * 32 * 20) * 0.002 + 2 * 50 * 0.1 + 2 * 10
    )
    calibration = 8 * 40
    quest = 5 * (0.3 + 16 * 0.01 + 0.4 + 16 * 0.05) + calibration * 0.002
    quest += 20 * (0.5 + 32 * 0.02)  # the ranges of 20 time groups
    rtn = 256 * 0.003
    assert found["quantize"].hours * 3600 == pytest.approx(quest + rtn + 2 * 10)
    assert found["sample, full precision"].bytes == 120 * (4 * (64 + 112 + 48) + 4 * 512 + 3 * 64 * 64)


def test_work_of_the_rivals():
    """By hand from their presets: scenes-uncond is called 40 times, scenes-class 20 times on both halves."""
    uncond, clas = MODELS["scenes-uncond"], MODELS["scenes-class"]

    def count(method, bits, model=uncond, **recipe):
        return dict(plan.quantizing(method, recipe, bits, model, 50))

    assert count("rtn", "w4a4") == {"quantized call": 256}
    assert count("rtn-mse", "w4a4") == {"weight ranges": 1, "ranges": 1, "ranges row": 64}
    rounded = {"weight ranges": 1, "rounding": 1000, "rounding row": 16_000}
    # 20 of 40 calls, 1024 // 20 = 51 trajectories of which there are 50; both networks, and 256 rows twice.
    assert count("adaround", "w4a32") == rounded | {"call": 2 * 1000 + 2 * 256}
    assert count("adaround", "w4a32", clas) == rounded | {"call": 2 * 20 * 2 * (1024 // 40) + 2 * 256}
    full = {"weight ranges": 1, "rounding": 20_000, "rounding row": 20_000 * 32}
    assert count("adaround-ndtc", "w4a32", preset="full") == full | {"call": 2 * 1024 + 2 * 256}
    assert count("adaround", "w8a32") == {"weight ranges": 1}  # to the nearest code in the short preset
    learned = {"ranges": 1, "ranges row": 64, "step learning": 250, "step learning row": 4000}
    q_diffusion = learned | {"call": 1000, "quantized call": 512}
    assert count("q-diffusion", "w4a4", init="adaround") == q_diffusion
    running = q_diffusion | {"quantized call": 512 + 1000}  # at 8 bits, the model's running averages
    assert count("q-diffusion", "w4a8", init="adaround") == running
    assert count("ptqd", "w4a4", init="adaround") == q_diffusion | {"quantized call": 512 + 50 * 40}
    here = count("ptqd-as-released", "w4a4")
    assert here["rounding"] == 1000 and here["call"] == 2 * 1000 + 2 * 256 + 1000
    assert count("svdquant", "w4a4") == {"svdquant": 39, "svdquant row": 39 * 60}
    here = count("svdquant", "w4a4", dynamic="static", grid=1)
    assert here == {"svdquant": 1, "svdquant row": 60, "ranges": 1, "ranges row": 64}
    assert count("gptq", "w4a32") == {"gptq": 1, "gptq row": 640}
    assert count("gptq-mse", "w4a4", clas) == {"gptq": 1, "gptq row": 640, "ranges": 1, "ranges row": 64}
    assert count("gptq-mse", "w4a4", inputs="quantized")["ranges row"] == 128
    assert count("ptq4dm-as-released", "w8a8") == {"threshold search": 1, "threshold search row": 1024}
    assert count("tfmq-dm", "w4a8", init="adaround") == {"ranges": 1, "ranges row": 64, "temporal rounding": 1000}
    assert count("tfmq-dm-as-released", "w4a8", clas)["ranges row"] == 20 * 64
    distilled = {"ranges": 20, "ranges row": 20 * 32, "distillation": 1000, "distillation row": 16_000}
    assert count("efficient-dm", "w4a4", clas) == distilled
    assert count("efficient-dm", "w4a4", preset="full")["distillation row"] == 32_000
    tuned = {"call": 50 * 40, "ranges": 20, "ranges row": 20 * 32}
    stages = {"temporal alignment": 100, "critical alignment": 200}
    assert count("quest-suite", "w4a4", init="adaround") == tuned | stages | {
        f"{k} row": 16 * n for k, n in stages.items()
    }
    paper = count("quest-paper", "w4a4", init="adaround")
    assert (paper["ranges"], paper["ranges row"]) == (1, 256)
    shared = count("quest-suite", "w4a4", init="adaround", groups_per_step=4, dynamic="token")
    assert shared["critical alignment"] == 4 * 200 and shared["critical alignment row"] == 200 * 16
    assert "ranges" not in shared
    assert (paper["temporal alignment row"], paper["critical alignment row"]) == (2 * 1600, 4 * 640)
    assert count("full-finetune", "w4a4") == tuned | {
        "weight ranges": 1, "full finetuning": 300, "full finetuning row": 4800
    }  # fmt: skip


def test_every_method_s_work_is_counted():
    grid = config("all-methods")
    made = plan.cells(grid)[1]
    assert {run.method for run in made} == set(METHODS) - {"fp", "gptq"}  # no method starts from the weights of gptq
    for run in made:
        counted = plan.quantizing(run.method, grid["methods"][run.method], run.bits, MODELS[run.model], 50)
        assert set(counted) <= set(table.WHAT), run.method


def test_what_was_not_measured_is_said_and_never_guessed():
    known = costs("scenes-class", call=0.002, start=10)
    told = plan.report(config("smoke"), known, "box")
    assert "Forecasts" not in told
    assert "| scenes-class | sample, quantized | 4 | not measured: quantized call, decode, features |" in told
    found = {"memory_of_call": 1000, "memory_of_decode": 900, "memory_of_features": 2000}
    memory = costs("scenes-class", **found, **{f"{what}_row": 10 for what in found})
    told_of_memory = plan.report(config("smoke"), known + memory, "box")
    # 50 images of 100 samples in a call; an extractor takes 50 at a time.
    assert re.search(r"sample, full precision \| 2 \|.*\| 2.5 \|", told_of_memory)
    assert re.search(r"trajectories \| 2 \|.*\| 2.0 \|", told_of_memory)
    assert re.search(r"sample, quantized \| 4 \|.*\| not measured \|", told_of_memory)
    assert "so this is no total" in told and "memory not measured" in told
    elsewhere = plan.report(config("smoke"), known, "another box")
    assert "nothing measured here; `python -m quest measure scenes-class" in elsewhere
    assert "(measured on box)" in elsewhere and "Hours of one device, of what was measured: 0.0" in elsewhere
    dit = plan.report(config("dit"), known, "box")
    assert "photos-dit: nothing measured here; `python -m quest measure` takes U-Nets only." in dit
    parts = plan.parts(config("smoke") | {"methods": {"fp": {}, "rtn": {}, "quest-suite": {"init": "rtn"}}}, [], "box")
    assert all(math.isnan(part.hours) for part in parts)


def test_a_method_whose_work_is_not_written_down():
    other = config("smoke")
    other["methods"]["other"], other["grid"][1]["method"] = {}, ["other"]
    known = {what.replace(" ", "_"): 0.1 for what in table.WHAT}
    found = {part.kind: part for part in plan.parts(other, costs("scenes-class", **known), "box")}
    assert math.isnan(found["quantize"].hours) and found["quantize"].missing == ("what other does",)


def test_a_plan_refuses_to_keep_bits_of_layers_that_no_model_has():
    smoke, measured = config("smoke"), costs("scenes-class", call=0.002)
    recipes = smoke["methods"]
    recipes["rtn"]["keep"] = {"conv_in": 8, "*.conv_shortcut": 8}  # not every model has the second
    assert plan.report(smoke, measured, "box")
    recipes["rtn"]["keep"] = {"conv_inn": 8}
    with pytest.raises(
        ConfigError, match="rtn on scenes-.*: keep: no layer is named like 'conv_inn'; names are such as"
    ):
        plan.report(smoke, measured, "box")


def test_command(tmp_path, capsys):
    file = tmp_path / "costs.csv"
    table.record(costs("scenes-class", call=0.002, start=10), file)
    main(["plan", str(CONFIGS / "smoke.yaml"), "--machine", "box", "--costs", str(file)])
    told = capsys.readouterr().out
    assert "## Plan of `smoke` on box" in told and "| in all | 17 |" in told
    for arguments, error in {
        ("plan", "nowhere.yaml"): "plan: nowhere.yaml: no such file; valid: a config",
        (
            "plan",
            str(CONFIGS / "smoke.yaml"),
            "--machine",
            "H1",
            "--costs",
            str(file),
        ): "on 'H1'; valid: box, NVIDIA A100",
        ("measure", "sd15"): "measure: model: 'sd15' is not one of",
        (
            "rehearse",
            "scenes-text",
        ): "rehearse: model: scenes-text ships with its weights, use `measure`; valid: lsun-b",
    }.items():
        with pytest.raises(SystemExit, match=error):
            main(list(arguments))


def test_records_replace_those_of_the_same_kind(tmp_path):
    file = tmp_path / "costs.csv"
    table.record(costs("a", call=1, start=2) + costs("b", call=3), file)
    table.record(costs("a", call=5) + costs("a", "other box", call=6), file)
    found = {(row["model"], row["machine"], row["what"]): row["value"] for row in table.read(file)}
    kept = {("a", "box", "start"): 2, ("b", "box", "call"): 3}
    assert found == kept | {("a", "box", "call"): 5, ("a", "other box", "call"): 6}
    file.write_text(
        file.read_text(encoding="utf-8") + "a,box,speed,1,s,50,trained,measured,2026-11-22\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match="costs.csv, line 6: 'speed' is not one of call, quantized call"):
        table.read(file)
    file.write_text("model,value\n", encoding="utf-8")
    with pytest.raises(ValueError, match="needed: model, machine, what"):
        table.read(file)


def test_inputs_have_the_tokens_of_the_pipeline(class_pipe, class_model, text_pipe, text_model):
    for pipe, model, tokens in ((class_pipe, class_model, 2), (text_pipe, text_model, 32)):
        given = shapes.inputs(pipe.unet, model, 3, "cpu", pipe)
        assert given["encoder_hidden_states"].shape == (3, tokens, 32) and given["sample"].shape == (3, 4, 8, 8)
    assert [shapes.tokens(MODELS[name]) for name in ("scenes-class", "scenes-text", "imagenet", "sd14")] == [
        4,
        20,
        1,
        77,
    ]


def test_forecasts_follow_from_data_sheets():
    known = costs("m", call=2.0, rounding=8.0, rounding_row=3.0, start=10, copy=0.4)
    known += [row | {"unit": "MB"} for row in costs("m", memory_of_call=900)]
    gpu = "NVIDIA A100 80GB"
    found = {row["what"]: row["value"] for row in forecast(known, "box", gpu, {"m": 10**12})}
    faster = REACHED * 19.5e12 / 1e12  # the box computed 10^12 multiply-accumulates, two operations each, in 2 seconds
    wider = MOVED * 2039 / 5  # and read and wrote 1 GB in 0.4 seconds
    expected = {"call": 2 / faster, "rounding": 8 / wider, "rounding row": 3 / faster, "start": 10, "copy": 0.4 / wider}
    assert found == pytest.approx(expected | {"memory of call": 900})
    assert forecast(known, "box", gpu, {}) == forecast(known, "other box", gpu, {"m": 1}) == []


@pytest.mark.parametrize(
    "row, words",
    [
        ("m,x,call,nan,s,1,trained,measured,2026-01-01", "line 2: value nan"),
        ("m,x,call,-1,s,1,trained,measured,2026-01-01", "line 2: value -1"),
        ("m,x,call,inf,s,1,trained,measured,2026-01-01", "line 2: value inf"),
        ("m,x,call,fast,s,1,trained,measured,2026-01-01", "line 2: could not convert"),
        ("m,x,call,1,s,1.5,trained,measured,2026-01-01", "line 2: invalid literal"),
        ("m,x,call,1,s,1,trained", "line 2: 7 values for 9 columns"),
        (",x,call,1,s,1,trained,measured,2026-01-01", "line 2: model is missing"),
        ("m,x,call,1,s,1,trained,measured,2026-01-01,more", "line 2: 10 values for 9 columns"),
    ],
)
def test_a_cost_that_is_no_number_is_named(tmp_path, row, words):
    file = tmp_path / "costs.csv"
    file.write_text(f"{','.join(table.COLUMNS)}\n{row}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"costs.csv, {words}"):
        table.read(file)
