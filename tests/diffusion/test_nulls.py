"""Null controls change how full precision is computed, and hardly what it computes."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest

from quest.diffusion import nulls, sampling


@pytest.mark.parametrize("of", ["uncond", "text"])
@pytest.mark.parametrize("kind, apart", [("batches", 1e-4), ("threads", 1e-4), ("bf16", 0.5)])
def test_a_null_control_samples_nearly_the_same_images(request, of, kind, apart):
    pipe, model = request.getfixturevalue(f"{of}_pipe"), request.getfixturevalue(f"{of}_model")

    def latents(pipe, model):
        made = list(sampling.generate(pipe, model, "evaluation", 4))
        assert {len(index) for index, *_ in made} == {model.batch_size}
        return np.concatenate([batch[1].numpy() for batch in made])

    other = copy.copy(pipe)
    other.unet = copy.deepcopy(pipe.unet)
    altered = nulls.altered(other, model, kind)
    assert altered.batch_size == (2 if kind == "batches" else 4)
    exact, null = latents(pipe, model), latents(other, altered)
    assert null.dtype == np.float32 and np.square(null - exact).mean() < apart * np.square(exact).mean()
    if kind == "bf16":
        assert not np.array_equal(null, exact)


@pytest.mark.parametrize("size, smaller", [(50, 25), (9, 3), (3, 1), (2, 1)])
def test_batches_become_smaller_and_begin_at_the_same_images(uncond_pipe, uncond_model, size, smaller):
    assert nulls.altered(uncond_pipe, replace(uncond_model, batch_size=size), "batches").batch_size == smaller


def test_a_batch_of_one_has_no_smaller_ones(uncond_pipe, uncond_model):
    with pytest.raises(ValueError, match="tiny-uncond: a batch is one image; .* needs 2 or more"):
        nulls.altered(uncond_pipe, replace(uncond_model, batch_size=1), "batches")


def test_instruction_sets_are_lesser_ones_where_there_are(tmp_path):
    asked = {}
    for name, flags in (("avx512", "avx2 avx512f"), ("avx2", "sse4_1 avx2"), ("arm", "asimd")):
        (tmp_path / name).write_text(f"flags : {flags}\n", encoding="utf-8")
        asked[name] = nulls.environment(tmp_path / name).get("ATEN_CPU_CAPABILITY")
    assert asked == {"avx512": "avx2", "avx2": "default", "arm": None}
    assert nulls.environment(tmp_path / "missing") == {}
    assert all(re.fullmatch("[A-Z0-9_]+", name) for name in nulls.environment(tmp_path / "avx2"))


@pytest.mark.parametrize("count", [1, 2, 8])
def test_another_number_of_threads(count):
    assert nulls.threads(count) != count
