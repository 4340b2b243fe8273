"""Tables that only the page has."""

import json

import numpy as np
import pandas as pd
import pytest

from quest.quantization.checkpoint import save_diverged
from quest.report.page_tables import cost_table, shards, speed_table


def test_the_table_of_costs_says_why_a_method_diverged(tmp_path):
    file = tmp_path / "scenes-class/efficient-dm/w4a4/model.safetensors"
    told = {"method": "efficient-dm", "bits": "w4a4", "seconds": 3.0, "peak_memory": 200}
    save_diverged(file, "distillation, iteration 7: the loss is nan", **told)
    main = pd.DataFrame({"model": ["scenes-class"], "method": ["efficient-dm"], "bits": ["w4a4"]})
    (row,) = cost_table(tmp_path, main).rows
    assert row[-1] == "diverged: distillation, iteration 7: the loss is nan"
    assert (row[3].text, row[4].text) == ("3.0", "200")


# What the two shards of a cell of 8 images say, and the seconds of 100 images.
@pytest.mark.parametrize(
    "told, shown",
    [
        ([{"seconds": 8.0, "drawn": 4}, {"seconds": 8.0, "drawn": 4}], "200.0"),
        ([{"seconds": 8.0, "drawn": 4}, {"seconds": 0.0}], "200.0"),  # the second one by an older version
        ([{"seconds": 0.0}, {"seconds": 0.0}], "–"),
        ([{"seconds": 0.0, "drawn": 4}, {"seconds": 0.0, "drawn": 4}], "–"),  # too fast to tell
    ],
)
def test_sampling_takes_the_seconds_of_the_images_they_belong_to(tmp_path, told, shown):
    main = pd.DataFrame({"model": "m", "method": ["fp", "rtn"], "bits": ["w32a32", "w4a4"]})
    for folder in (tmp_path / "m/fp/w32a32", tmp_path / "m/rtn/w4a4"):
        folder.mkdir(parents=True)
        for shard, one in enumerate(told):
            np.savez(folder / f"samples-{shard}.npz", metadata=json.dumps({"seeds": {"n": 8}} | one))
    full, quantized = speed_table(tmp_path, main).rows
    assert full[5].text == quantized[5].text == shown
    assert quantized[6].text == ("–" if shown == "–" else "1.00")


def test_files_of_another_number_of_shards_are_left_out(tmp_path):
    """Of a cell that was sampled in three shards, and again in two, of which the first is there."""
    for shard, parts in ((0, 2), (1, 3), (2, 3)):
        told = json.dumps({"seeds": {"shard": f"{shard}/{parts}"}})
        np.savez(tmp_path / f"samples-{shard}.npz", metadata=told)
    assert [file.name for file in shards(tmp_path, "samples")] == ["samples-0.npz"]
    np.savez(tmp_path / "samples-1.npz", metadata=json.dumps({"seeds": {"shard": "1/2"}}))
    assert [file.name for file in shards(tmp_path, "samples")] == ["samples-0.npz", "samples-1.npz"]
    assert shards(tmp_path, "features") == []
