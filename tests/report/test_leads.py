"""The lead of a method at three settings of the outlier dial."""

import numpy as np
import pytest
from drawn import measured

from quest.metrics import intervals
from quest.report import outliers

# Errors by factor: the rival gets worse and the method does not.
ERRORS = {"rtn": {1: 0.0, 4: 0.3, 16: 0.6}, "quest": {1: -0.2, 4: -0.2, 16: -0.2}}


def cell(method, factor, value):
    """A cell whose images share nearly all of their noise with those of all others."""
    common = np.random.default_rng(0).normal(size=intervals.RESAMPLES)
    own = np.random.default_rng([len(method), factor]).normal(size=intervals.RESAMPLES)
    resampled = {"log_latent_mse": value + 0.5 * common + 0.01 * own}
    model = "photos-class" + (f"-x{factor}" if factor > 1 else "")
    return measured(model, method, "w4a4", resampled, {"log_latent_mse": value})


@pytest.fixture
def cells():
    return [cell(method, factor, value) for method, of in ERRORS.items() for factor, value in of.items()]


def test_a_lead_that_grows_with_outliers_is_found(cells):
    found = outliers.frame(cells).set_index("factor")
    assert found["lead"].tolist() == pytest.approx([-0.2, -0.5, -0.8])
    assert np.isnan(found["growth"][1]) and found["growth"][[4, 16]].tolist() == pytest.approx([-0.3, -0.6])
    assert found["grows"][[4, 16]].tolist() == ["grows", "grows"]
    text = outliers.table(outliers.frame(cells)).markdown()
    assert text.count("| grows |") == 2 and "| x16 |" in text and "nan" not in text


def test_the_interval_of_the_growth_is_paired(cells):
    """The spread of each cell is 0.5, fifty times that of their difference."""
    row = outliers.frame(cells).set_index("factor").loc[16]
    assert 0.01 < row["growth_high"] - row["growth"] < 0.1


def test_a_lead_that_shrinks_and_one_that_stays(cells):
    for one in cells:
        if one["method"] == "rtn":
            one["rows"][0]["value"] = {"photos-class": 0.3, "photos-class-x4": 0.0}.get(one["model"], 0.3)
    assert outliers.frame(cells).set_index("factor")["grows"][[4, 16]].tolist() == ["shrinks", "neither"]


def test_a_model_without_the_setting_one_is_an_error(cells):
    with pytest.raises(ValueError, match="photos-class w4a4: no cell of quest and rtn without outliers"):
        outliers.frame([one for one in cells if one["model"] != "photos-class"])


@pytest.mark.parametrize(
    "name, parts", [("a-b-x4", ("a-b", 4)), ("a-b", ("a-b", 1)), ("a-xy", ("a-xy", 1)), ("x4", ("x4", 1))]
)
def test_names_have_a_base_and_a_factor(name, parts):
    assert outliers.split(name) == parts
