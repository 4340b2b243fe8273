import pandas as pd
import pytest

from quest.report import figures, speed


def row(kernel, ms, part="step", note="", **given):
    made = dict.fromkeys(speed.COLUMNS) | {"part": part, "model": "sd14", "layer": "", "batch": 1, "threads": 1}
    made |= {"machine": "Some CPU, 2 cores", "isa": "avx2", "versions": "torch 2", "load": 0.1, "others": 0.02}
    made |= {"kernel": kernel, "note": note}
    if ms is not None:
        made |= {"ms": ms, "ms_low": ms, "ms_high": ms, "speedup": 100 / ms, "speedup_low": 90 / ms, "rounds": 5}
        made |= {"speedup_high": 110 / ms}
    return made | given


ROWS = [
    row("integer", None, "peak", model="", batch=0, gops=100.0),
    row("fp32", None, "peak", model="", batch=0, gops=50.0),
    row("memory", None, "peak", model="", batch=0, gbs=10.0),
    row("fp32", 100.0),
    row("integer w8a8", 60.0, in_layers=0.5, in_attention=0.2, in_norms=0.1, in_rest=0.2),
    row("integer w4a8", 40.0, others=0.7, error=0.0123, ours=1.25),
    row("bf16", 50.0),
    row("OpenVINO int8", None, note="not measured: openvino is not installed"),
    row("fp32", 10.0, "layer", layer="conv", gops=40.0, intensity=30.0),
    row("integer w8a8", 5.0, "layer", layer="conv", gops=80.0, intensity=60.0),
]


def test_tables_for_people(tmp_path):
    path = tmp_path / "some-cpu.csv"
    speed.write(speed.merge(None, ROWS), path)
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| 1 | avx2 | 100 | 50 | 10.0 |" in text
    assert "1.67 [1.50, 1.83] | 2.50 [2.25, 2.75]* |" in text  # the star: others were busy
    assert "| sd14 | integer w8a8 | 1 | 1 | 60 | 50 | 20 | 10 | 20 |" in text
    assert "| sd14 | integer w4a8 | 1 | 1 | 40 | 2.50 [2.25, 2.75]* | 1.25 | 0.012 |" in text
    slower = text.partition("## Slower than half precision")[2].partition("##")[0]
    assert "integer w8a8: 60 ms, 50 in bf16" in slower and "w4a8" not in slower
    assert "OpenVINO int8 (steps): 1 — openvino is not installed" in text
    pd.testing.assert_frame_equal(speed.read(path), speed.read(path).reindex(columns=speed.COLUMNS))
    figures.roofline(speed.read(path), tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 10_000
    path.write_text("model,ms\nsd14,1\n", encoding="utf-8")
    with pytest.raises(ValueError, match="some-cpu.csv: columns are model, ms"):
        speed.read(path)


def test_without_half_precision_nothing_is_said_to_be_faster():
    text = speed.markdown(speed.merge(None, [r for r in ROWS if r["kernel"] != "bf16"]))
    assert "Half precision was not measured" in text


def test_a_later_run_replaces_what_it_measures_and_nothing_else(tmp_path):
    path = tmp_path / "some-cpu.csv"
    speed.write(speed.merge(None, ROWS), path)
    later = [row("fp32", 90.0), row("integer w8a8", None, note="not measured: the 5 minutes of this run were over")]
    later += [row("OpenVINO int8", 30.0), row("torchao int8", None, note="not measured: not installed")]
    later += [row("integer", None, "peak", model="", batch=0, gops=80.0)]
    later += [row("memory", None, "peak", model="", batch=0, gbs=12.0)]
    frame = speed.merge(speed.read(path), later)
    peaks = frame[frame["part"] == "peak"].set_index("kernel")
    assert peaks.loc["integer", "gops"] == 100 and peaks.loc["memory", "gbs"] == 12  # the best ever measured
    found = frame[frame["part"] == "step"].set_index("kernel")["ms"]
    assert found.to_dict() == pytest.approx(
        {"fp32": 90.0, "integer w8a8": 60.0, "integer w4a8": 40.0, "bf16": 50.0, "OpenVINO int8": 30.0}
        | {"torchao int8": float("nan")},
        nan_ok=True,
    )
    assert len(frame) == len(ROWS) + 1


def test_names_of_files():
    assert speed.slug("AMD EPYC 9B45, 2 cores", "avx512vnni") == "amd-epyc-9b45-2-cores-avx512vnni"
