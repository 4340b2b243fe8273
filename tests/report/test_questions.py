"""Verdicts and text from made-up results."""

import numpy as np
import pandas as pd
import pytest
from drawn import measured

from quest.report import properties, property_figures, questions
from quest.report.evidence import Evidence, comparisons_rows, inference_rows, qat_rows, taylor_rows, tunings_rows
from quest.report.properties import RANGE_KINDS
from quest.report.settle import ten
from quest.report.tables import SHOWN


def cell(method: str, shift: float) -> dict:
    """A row of a table whose latent MSE lies `shift` above the others', image by image, with a little noise."""
    rng = np.random.default_rng(list(method.encode()))
    noise, own = np.random.default_rng(0).normal(size=200), 0.01 * rng.normal(size=200)
    resampled = dict.fromkeys(SHOWN, 1 + shift + noise + own)
    values = dict.fromkeys(SHOWN, 1 + shift)
    return measured("m", method, "w4a4", resampled, values, half=0.1, images="0-49", footprint={"bytes": 1e6})


def tuning(error: float) -> dict:
    noise = np.random.default_rng(0).normal(size=16)
    errors = {name: (error + 0.01 * noise).tolist() for name in ("to_full_precision", "to_noise")}
    rest = {"model": "m", "bits": "w4a4", "recipe": {}, "data": "noise", "seconds": 1.0}
    return errors | rest | {"full_precision_to_noise": [0.1, 0.2]}


@pytest.fixture
def evidence() -> Evidence:
    share = {"lowered": "activations", "layers": 2, "parameters": 0.5, "macs": 0.25}
    classes = {"shortcut": 0.5, "time embedding": 0.1, "attention q, k, v": 0.01, "all": 0.6}
    lowered = [{"layer_class": name, "errors": [error, error]} | share for name, error in classes.items()]
    logs = {"layers": 3, "histogram": [1.0], "kurtosis": [1.0, 2.0]}
    denoisers = {name: {"shortcut": logs} for name in ("full precision", "before finetuning")}
    denoisers["after finetuning"] = {"shortcut": logs | {"kurtosis": [0.5, 1.5]}}
    errors = [{"quantized": q, "ranges": r, "errors": [0.1, 0.2]} for q in ("path", "rest", "all") for r in RANGE_KINDS]
    distances = [{"ranges": "static", "what": w, "values": [1, 1]} for w in ("error", "apart", "apart_quantized")]
    distances.append({"ranges": "static", "what": "nearest", "values": [0, 0]})
    temporal = [{"model": "m", "bits": "w4a4", "timesteps": [801, 1], "errors": errors, "distances": distances}]
    frames = {
        "temporal": properties.temporal_frame(temporal),
        "time_ranges": properties.range_frame(temporal),
        "embeddings": properties.embeddings_frame(temporal),
        "sensitivity": properties.sensitivity_frame([{"model": "m", "bits": "w4a4", "rows": lowered}]),
        "activation_changes": properties.change_frame([{"model": "m", "bits": "w4a4", "denoisers": denoisers}]),
    }
    whats = ("first", "second", "loss", "loss, 1 step", "loss, 4 steps")
    taylor = [{"bits": b, "what": w, "values": [1 / b, 2 / b]} for b in (8, 4, 2) for w in whats]
    calls = {"time groups": [1.2e-3, 1.3e-3, 1.4e-3], "one group": [1.0e-3, 1.1e-3, 1.2e-3], "lookup": [1e-5] * 3}
    rows = [{"kernel": "reference", "rows": 1, "same_output": True, "seconds": calls}]
    size = {"codes": 900, "weight scales": 50, "activation scales": 40, "float": 10}
    methods = {
        m: {"eps_error": [e, e], "latent_mse": [e, 2 * e], "seconds": 1.0}
        for m, e in (("rtn-mse", 2), ("quest-suite", 1))
    }
    return Evidence(
        model="m",
        bits="w4a4",
        cells={m: cell(m, s) for m, s in (("quest-suite", 0.0), ("quest-groups-1", 0.5), ("quest-joint", 0.001))},
        efforts={"quest-suite": {"seconds": 10.0, "seconds_before": 20.0, "peak_memory": 100, "iterations": 5}},
        properties=frames,
        taylor={"model": "m", "rows": taylor},
        tunings={"global-noise": tuning(0.5), "global-scenes": tuning(0.2), "quest-suite": tuning(0.1)},
        inference={"model": "m", "groups": 20, "bytes": size, "rows": rows},
        signals={"bits": "w4a4", "n": 2, "methods": methods, "classes": ["a"], "signals": {}},
    )


def test_rows_are_told_apart_by_their_paired_interval_or_said_not_to_have_run(evidence):
    assert "worse in log10 latent MSE" in questions.against(evidence, "quest-groups-1", "quest-suite")
    assert "better in log10 latent MSE" in questions.against(evidence, "quest-suite", "quest-groups-1")
    # Each alone is far wider than what parts the two; but the difference is smaller than its own interval.
    assert "not told apart in log10 latent MSE" in questions.against(evidence, "quest-joint", "quest-suite")
    assert (
        questions.against(evidence, "quest-wide", "quest-suite")
        == "quest-wide against quest-suite: NOT RUN (quest-wide)."
    )


def test_without_real_pictures_nothing_is_said_of_them(evidence):
    evidence.tunings = {"quest-suite": {key: v for key, v in tuning(0.1).items() if "to_noise" not in key}}
    text = questions.document(evidence)
    assert "NOT RUN (global-noise, global-scenes)" in text and "real pictures of m do not ship" in text
    assert len(tunings_rows(evidence)) == 1


def test_what_diverged_is_named_and_neither_wins_nor_ties(evidence):
    broken = cell("quest-joint", 0.001)
    broken["rows"][0]["value"] = float("nan")  # of latent MSE; the other metrics stay finite
    evidence.cells["quest-joint"] = broken
    assert questions.against(evidence, "quest-joint", "quest-suite") == (
        "quest-joint against quest-suite: diverged in log10 latent MSE to FP, diverged in KID-64w, diverged in "
        "FID to FP, diverged in noise-prediction error."
    )
    assert "quest-joint diverged in FID to FP" in questions.against(evidence, "quest-suite", "quest-joint")
    assert "| quest-joint | diverged | diverged | diverged |" in questions.document(evidence)
    compared = pd.DataFrame(comparisons_rows(evidence)).set_index(["row", "metric"])
    assert set(compared.loc["quest-joint", "verdict"]) == {"diverged"}
    evidence.tunings["global-noise"]["to_noise"][3] = float("inf")
    (line,) = [
        line
        for line in questions.document(evidence).split("\n")
        if "error against the true" in line and "global-noise ag" in line
    ]
    assert line.endswith("diverged.") and "inf" not in line and "nan" not in line


def test_a_run_in_which_quest_diverged_says_so_everywhere_and_nowhere_nan(evidence):
    """A header without stages, a tuning without a denoiser, and nothing to time."""
    nan, reason = float("nan"), "iteration 2: the loss is nan."
    evidence.efforts["quest-suite"] = {"seconds": nan, "seconds_before": nan, "peak_memory": nan, "iterations": nan}
    broken = {"model": "m", "bits": "w4a4", "recipe": {}, "data": "trajectories", "seconds": 1.0, "diverged": reason}
    evidence.tunings["quest-suite"] = broken | {name: [nan] * 16 for name in ("to_full_precision", "to_noise")}
    evidence.tunings["quest-suite"]["full_precision_to_noise"] = [0.1, 0.2]
    evidence.inference = {"model": "m", "groups": 0, "bytes": {}, "rows": [], "diverged": reason}
    changes = evidence.properties["activation_changes"]
    after = changes["denoiser"] == "after finetuning"
    changes.loc[after, ["value", "low", "high"]] = nan
    changes.loc[after, "note"] = f"diverged; {reason}"
    text = questions.document(evidence)
    assert text.count(reason) >= 5 and "nan" not in text.replace(reason, "")
    assert "learned (QuEST) | diverged | diverged | 1 |" in text
    assert [row["note"] for row in inference_rows(evidence)] == [f"diverged; {reason}"]
    assert {row["note"] for row in tunings_rows(evidence) if row["variant"] == "quest-suite"} == {f"diverged; {reason}"}


def test_the_document_answers_ten_questions_with_what_there_is(evidence):
    text = questions.document(evidence)
    assert text.count("\n## ") == 10 and "One calibration draw and one quantization seed" in " ".join(text.split())
    assert "quest-cma-tla against quest-suite: NOT RUN" in text and "nan" not in text
    (line,) = [
        line for line in text.split("\n") if "global-noise against global-scenes, error against the true" in line
    ]
    assert float(line.split(": ")[1].split()[0]) == pytest.approx(0.3) and line.endswith("worse.")
    assert "m, kurtosis: it is lower after finetuning in 1 of 1 classes of layers" in text
    assert "This holds for 1 of 2 (static)" in text
    assert "is largest for shortcut 0.5" in text
    assert "slower" in text and "| quest-suite | " in text and "10 + 20" in text
    tables = [line for line in text.split("\n") if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)
    assert "quest-wide against quest-suite: NOT RUN" in questions.findings(evidence)


def test_training_on_data_is_compared_by_seed_image_by_image(evidence):
    assert "training: all weights" not in questions.document(evidence) and qat_rows(evidence) == []
    errors = {"qat": 0.3, "full-finetune-global": 0.2, "full-finetune": 0.2, "quest-suite": 0.25}
    for at, shift in (("", 0.0), ("@1", 0.2)):
        for name, error in errors.items():
            evidence.tunings[name + at] = tuning(error + shift * (name == "full-finetune")) | {
                "log_latent_mse": [-1, -2]
            }
    text = questions.document(evidence)
    assert "qat against full-finetune-global, error against full precision: " in text
    assert "training: all weights, on noised real scenes, the true noise as target (seed 1)" in text
    rows = pd.DataFrame(qat_rows(evidence)).set_index(["seed", "versus", "error"])
    assert len(rows) == 2 * 3 * 3 and set(rows["model"]) == {"m"}
    assert rows.loc[(0, "full-finetune", "to_noise"), "difference"] == pytest.approx(0.1)
    assert rows.loc[(1, "full-finetune", "to_noise"), "difference"] == pytest.approx(-0.1)
    assert rows.loc[(0, "full-finetune", "to_noise"), "verdict"] == "worse"
    lines = ten.trained_on_data(ten.Sources({"qat.csv": rows.reset_index()}, ""))
    assert len(lines) == 3 and lines[0].startswith("*seeds 0 and 1: m at W4A4") and "(worse, better)" in lines[1]


def test_tables_are_tidy(evidence):
    taylor = pd.DataFrame(taylor_rows(evidence))
    assert len(taylor) == 15 and set(taylor["n"]) == {2}
    (inference,) = inference_rows(evidence)
    assert inference["difference"] == pytest.approx(2e-4) and inference["low"] > 0
    compared = pd.DataFrame(comparisons_rows(evidence)).set_index(["row", "metric"])
    assert compared.loc[("quest-groups-1", "log_latent_mse"), "verdict"] == "worse"
    assert {"variant", "error", "value", "low", "high"} <= set(pd.DataFrame(tunings_rows(evidence)))


def test_figures_are_drawn(evidence, tmp_path):
    property_figures.taylor(pd.DataFrame(taylor_rows(evidence)), tmp_path / "taylor.png")
    waves = {
        label: [np.sin(np.arange(64)), np.cos(np.arange(64))] for label in ("data", "full precision", "quest-suite")
    }
    property_figures.signals(waves, ["a", "b"], tmp_path / "signals.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("taylor", "signals"))
