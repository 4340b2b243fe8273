"""The leaderboard takes what keeps its rules; each way to break them is refused by name."""

import sys

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import save_file

from quest.metrics import METRICS
from quest.report import leaderboard
from quest.runtime.download import sha256_of
from quest.runtime.files import dumps
from workflow.scripts import leaderboard as script

W4 = {"bits": 4, "symmetric": False, "axis": 0, "wide": False}
A4 = W4 | {"axis": None}
END = [W4 | {"bits": 8}, A4 | {"bits": 8}]
LAYERS = {"conv_in": END, "mid.attn.to_q": [W4, A4], "mid.linear": [W4, A4], "conv_out": END}
ATTENTIONS = {"mid.attn": [A4, A4 | {"bits": 8}]}
RECIPE = "python -m baselines.mine, at commit 0123abc"


@pytest.fixture
def submit(tmp_path, write_checkpoint):
    """A function that writes a submission, by default one that keeps the rules, and returns its folder."""

    def write(told=None, tensors=None, name="mine", **header):
        folder = tmp_path / "entries" / name
        folder.mkdir(parents=True)
        file = folder / "model.safetensors"
        layers = header.get("layers", LAYERS)
        given = {"model": "photos-class", "layers": LAYERS, "attentions": ATTENTIONS}
        given |= {"shapes": {name: [8, 8] for name in layers}} | header
        write_checkpoint(file, **given)
        if tensors:
            with safe_open(file, "numpy") as opened:
                metadata = opened.metadata()
            save_file(tensors, file, metadata)
        entry = {"name": "mine", "authors": "A. Person", "bits": "w4a4", "recipe": RECIPE}
        entry |= {"sha256": sha256_of(file), "calibration": [1_000_000, 1_000_063]} | (told or {})
        (folder / "entry.yaml").write_text(yaml.safe_dump(entry), encoding="utf-8")
        return folder

    return write


def test_what_keeps_the_rules_is_taken(submit):
    entry = leaderboard.check(submit())
    assert (entry.name, entry.bits, entry.calibration) == ("mine", "w4a4", (1_000_000, 1_000_063))
    scales = {"mid.linear.weight_quantizer.scale": np.ones((1, 8, 1), np.float32)}
    leaderboard.check(submit(name="split", splits={"up_blocks.0.resnets.1.conv_shortcut": 8}))
    leaderboard.check(submit(tensors=scales | {"conv_in.weight_quantizer.scale": np.ones((1, 1, 1))}, name="scaled"))
    assert leaderboard.check(submit({"bits": "w8a8"}, name="modest")).bits == "w8a8"  # fewer bits than declared


@pytest.mark.parametrize(
    "header, message",
    [
        ({"layers": LAYERS | {"mid.linear": [W4 | {"bits": 8}, A4]}}, "mid.linear: its weight has 8 bits, at most 4"),
        ({"layers": LAYERS | {"mid.linear": [W4, A4 | {"bits": 5}]}}, "mid.linear: its input has 5 bits"),
        ({"layers": LAYERS | {"mid.linear": [W4, A4 | {"bits": 32}]}}, "mid.linear: its input has float"),
        ({"layers": LAYERS | {"mid.linear": [W4, A4, A4 | {"bits": 16}]}}, "mid.linear: its input has 16 bits"),
        ({"layers": LAYERS | {"mid.linear": [W4, A4 | {"symmetric": True, "wide": True}]}}, "4 bits, wide"),
        ({"layers": LAYERS | {"mid.linear": [W4, A4 | {"axis": 1}]}}, "a scale for each channel"),
        ({"layers": LAYERS | {"conv_in": [W4 | {"bits": 16}, A4]}}, "conv_in: its weight has 16 bits, at most 8"),
        ({"attentions": {"mid.attn": [A4 | {"bits": 8}, A4]}}, "mid.attn: its query, key or value has 8 bits"),
        ({"attentions": {"mid.attn": [A4, A4, A4 | {"bits": 8}, A4]}}, "mid.attn: its query, key or value has 8 bits"),
        ({"attentions": {"mid.attn": [A4, A4 | {"bits": 32}]}}, "mid.attn: its softmax has float"),
        ({"attentions": {}}, "mid.attn: its products are computed in float"),
        ({"weights": "float"}, "its weights are floats"),
        ({"model": "scenes-class"}, "of the model 'scenes-class'"),
        (
            {"splits": {"up_blocks.0.resnets.1.conv1": 8, "up_blocks.0.resnets.1.conv1.hidden": 4}},
            "hidden: its input is",
        ),
        ({"splits": {"conv_out": 4}}, "conv_out: its input is split"),
        ({"branches": {"mid.linear": {"rank": 8, "channels": False}}}, "mid.linear: it has a branch"),
        (
            {"prologues": {"mid.linear": {"scaled": True, "block": 1, "form": "regular", "single": False}}},
            "mid.linear: it has a prologue",
        ),
        ({"layers": LAYERS | {"mid.linear": [W4 | {"group": 1}, A4]}}, "its weight has a scale for each group"),
        ({"layers": LAYERS | {"mid.linear": [W4, A4 | {"axis": 1, "rows": "token"}]}}, "computed while it runs"),
        (
            {"tensors": {"mid.linear.weight_quantizer.scale": np.ones((1, 8, 8), np.float32)}},
            r"mid.linear: its weight has scales \[1, 8, 8\]; one for each output channel",
        ),
        ({"tensors": {"mid.other.weight": np.zeros((2, 2), np.float32)}}, "mid.other: its weight is kept in float"),
    ],
)
def test_more_bits_than_declared_are_seen(submit, header, message):
    with pytest.raises(ValueError, match=message):
        leaderboard.check(submit(**header))


@pytest.mark.parametrize(
    "told, message",
    [
        ({"sha256": "0" * 64}, "not the declared 0000"),
        ({"calibration": [500, 563]}, "images of evaluation are not for calibration"),
        ({"calibration": [999_999, 1_000_063]}, "images of evaluation are not for calibration"),
        ({"calibration": [1_999_000, 2_000_000]}, "not all of the calibration split"),
        ({"calibration": [3, 2]}, "valid: .first seed, last seed."),
        ({"bits": "w4"}, "bits: 'w4'; valid: weight and activation bits"),
        ({"recipe": "short"}, "recipe: 'short'"),
        ({"authors": "![](http://example.org/a.png)"}, "authors: .*; valid: who made it, without links and markup"),
        ({"score": 1}, "missing or unknown: score"),
    ],
)
def test_what_is_told_wrongly_is_refused(submit, told, message):
    with pytest.raises(ValueError, match=message):
        leaderboard.check(submit(told))


@pytest.mark.parametrize("name", ["full", "leaderboard.csv", "a b", "x{y}"])
def test_a_folder_whose_scores_would_be_those_of_something_else_is_refused(submit, name):
    with pytest.raises(ValueError, match="the folder's name .*; valid: letters"):
        leaderboard.check(submit(name=name))


def test_a_checkpoint_that_knows_the_images_is_seen():
    draw = np.random.default_rng(0)
    wrong = sum(
        leaderboard.knows_the_images(draw.normal(-1.2, 0.2, 500), draw.normal(-1.2, 0.2, 100)) for _ in range(500)
    )
    assert wrong <= 4  # LEVEL is 0.001
    assert leaderboard.knows_the_images(draw.normal(-1.35, 0.2, 500), draw.normal(-1.2, 0.2, 100))
    assert not leaderboard.knows_the_images(
        draw.normal(-1.05, 0.2, 500), draw.normal(-1.2, 0.2, 100)
    )  # worse is no fraud


def test_fresh_images_follow_from_the_hash_and_are_not_those_that_are_judged():
    firsts = {leaderboard.fresh_first(f"{number:064x}") for number in (0, 2**255, 2**256 - 1)}
    assert len(firsts) == 3
    assert all(leaderboard.FIRST + leaderboard.IMAGES < first < 1_000_000 - leaderboard.FRESH for first in firsts)


def draw_parts(folder, error, seed):
    """Samples and features of both parts; the latents differ from those of full precision by `error` of each part."""
    folder.mkdir(parents=True)
    for part, n in (("judged", 60), ("fresh", 40)):
        common = np.random.default_rng(len(part))
        latents = common.normal(size=(n, 2, 4, 4)) + error[part] * np.random.default_rng(seed).normal(size=(n, 2, 4, 4))
        features = {name: common.normal(size=(n, 4)) for name in ("pool", "spatial", "logits")}
        np.savez(folder / f"samples-{part}.npz", index=np.arange(n), latents=latents)
        np.savez(folder / f"features-{part}.npz", index=np.arange(n), **features)


def test_the_table_ranks_entries_and_refuses_one_that_knows_the_images(submit, tmp_path, monkeypatch):
    scored, entries = tmp_path / "scored", []
    none = {"judged": 0.0, "fresh": 0.0}
    draw_parts(scored / "full", none, 0)
    for place, (name, distance) in enumerate([("far", 0.3), ("near", 0.2)]):
        entries.append(submit({"name": name}, name=name))
        draw_parts(scored / name, {"judged": 0.1, "fresh": 0.1}, place)
        draw_parts(scored / name / "full", none, 0)
        rows = [
            {"metric": m, "value": distance, "low": distance, "high": distance + 0.1} for m in leaderboard.ENDPOINTS
        ]
        (scored / name / "metrics.json").write_text(dumps({"rows": rows}), encoding="utf-8")
    words = ["leaderboard", *map(str, entries), "--scored", str(scored), "-o", str(scored)]
    monkeypatch.setattr(sys, "argv", words)
    script.main()
    text = (scored / "leaderboard.md").read_text(encoding="utf-8")
    assert text.index("| near |") < text.index("| far |") and METRICS["kid_64w"].label in text
    draw_parts(tmp_path / "cheat", {"judged": 0.01, "fresh": 0.1}, 3)
    for file in (tmp_path / "cheat").iterdir():
        file.replace(scored / "far" / file.name)
    with pytest.raises(SystemExit, match="^leaderboard: .*far: nearer to full precision on the judged images"):
        script.main()
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(tmp_path / "nobody")])
    with pytest.raises(SystemExit, match="nobody/entry.yaml: missing; valid: name, authors"):
        script.main()


def test_the_declared_fields_of_a_plan_are_checked(submit):
    folder = submit()
    assert leaderboard.declared(folder, "bits") == "w4a4"
    (folder / "entry.yaml").write_text("sha256: 5", encoding="utf-8")
    with pytest.raises(ValueError, match="sha256: 5; valid"):
        leaderboard.declared(folder)
