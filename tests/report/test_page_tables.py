"""Tables that only the page has."""

import pandas as pd

from quest.quantization.checkpoint import save_diverged
from quest.report.page_tables import cost_table


def test_the_table_of_costs_says_why_a_method_diverged(tmp_path):
    file = tmp_path / "scenes-class/efficient-dm/w4a4/model.safetensors"
    told = {"method": "efficient-dm", "bits": "w4a4", "seconds": 3.0, "peak_memory": 200}
    save_diverged(file, "distillation, iteration 7: the loss is nan", **told)
    main = pd.DataFrame({"model": ["scenes-class"], "method": ["efficient-dm"], "bits": ["w4a4"]})
    (row,) = cost_table(tmp_path, main).rows
    assert row[-1] == "diverged: distillation, iteration 7: the loss is nan"
    assert (row[3].text, row[4].text) == ("3.0", "200")
