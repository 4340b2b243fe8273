"""Sentences say no more than the paired intervals do."""

import pandas as pd
import pytest

from quest.report import verdicts


def paired_rows(outcomes):
    rows = [
        {"model": model, "bits": "w4a4", "metric": metric, "method": "quest", "versus": versus, "better": better}
        for (versus, metric), by_model in outcomes.items()
        for model, better in zip("abc", by_model, strict=True)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    "outcomes, sentences",
    [
        (
            {("rtn", "fid"): ["quest"] * 3, ("rtn-mse", "fid"): ["quest"] * 3},
            [("better", "In FID, quest's checkpoint is better than rtn's and rtn-mse's on all 3 models.")],
        ),
        (
            {("rtn", "fid"): ["quest", "rtn", "neither"]},
            [("mixed", "In FID, quest's checkpoint is better than rtn's on 1 of 3 models (a); worse on 1 of 3 models "
              "(b); not told apart on 1 of 3 models (c).")],
        ),
        (
            {("rtn", "fid"): ["neither"] * 3, ("rtn", "log_latent_mse"): ["neither"] * 3},
            [
                (
                    "same",
                    "In log10 latent MSE to FP and FID, quest's checkpoint is not told apart from rtn's on all 3 "
                    "models.",
                )
            ],
        ),
        (
            {("rtn", "fid"): ["quest", "rtn diverged", "quest diverged"],
             ("rtn", "log_latent_mse"): ["quest diverged"] * 3},
            [("mixed", "In FID, quest's checkpoint is better than rtn's on 1 of 3 models (a); quest diverged on 1 of 3 "
              "models (c); rtn diverged on 1 of 3 models (b)."),
             ("worse", "In log10 latent MSE to FP, quest diverged on all 3 models.")],
        ),
        (
            {("rtn", "fid"): ["rtn diverged", "neither (both diverged)", "rtn diverged"]},
            [("better", "In FID, quest's checkpoint is not told apart from rtn's on 1 of 3 models (b); rtn diverged on "
              "2 of 3 models (a and c).")],
        ),
        (
            {("fp", "fid"): ["fp", "fp", "neither"], ("rtn", "fid"): ["quest"] * 3},
            [("better", "In FID, quest's checkpoint is better than rtn's on all 3 models."),
             ("worse", "In FID, quest's checkpoint is worse than full precision on 2 of 3 models (a and b); "
              "not told apart on 1 of 3 models (c).")],
        ),
        (
            {("fp", "fid"): ["neither (beyond full precision)", "fp", "neither (below the floor)"]},
            [("worse", "In FID, quest's checkpoint is worse than full precision on 1 of 3 models (b); not told apart "
              "on 1 of 3 models (c); beyond on 1 of 3 models (a), which says that the metric errs.")],
        ),
    ],
)  # fmt: skip
def test_verdicts_say_what_the_intervals_say(outcomes, sentences):
    ((found),) = verdicts.verdict_sentences(paired_rows(outcomes), "quest")
    assert [(said["kind"], said["text"]) for said in found["sentences"]] == sentences


def test_only_intervals_over_seeds_speak_of_methods():
    """And never by the noise-prediction error, which is QuEST's own loss."""
    seeds = paired_rows({("rtn", "psnr"): ["quest"] * 3, ("rtn", "eps_error"): ["quest"] * 3})
    ((found,),) = (verdict["sentences"] for verdict in verdicts.seed_sentences(seeds))
    assert found["text"] == "In PSNR to FP, quest is better than rtn on all 3 models."
    (matrix,) = verdicts.seed_matrix(seeds)
    assert matrix["metrics"] == ["PSNR to FP [dB]"]


def test_the_matrix_has_an_outcome_for_each_model():
    rows = paired_rows(
        {
            ("rtn", "fid"): ["quest", "rtn", "neither"],
            ("rtn", "log_latent_mse"): ["quest"] * 3,
            ("fp", "fid"): ["fp", "fp", "neither"],
        }
    )
    rows = rows[~((rows["metric"] == "log_latent_mse") & (rows["model"] == "b"))]
    (found,) = verdicts.verdict_matrix(rows, "quest")
    assert (found["bits"], found["models"]) == ("w4a4", ["a", "b", "c"])
    assert found["metrics"] == ["log10 latent MSE to FP", "FID"]
    assert found["rows"] == [
        {"versus": "rtn", "cells": [["better", None, "better"], ["better", "worse", "neither"]]},
        {"versus": "full precision", "cells": [[None, None, None], ["worse", "worse", "neither"]]},
    ]
