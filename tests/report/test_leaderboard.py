"""The leaderboard takes what keeps its rules; each way to break them is refused by name."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from quest.diffusion.models import MODELS, SEEDS
from quest.metrics import METRICS, Cell, measure
from quest.metrics.frechet import load_reference
from quest.report import leaderboard
from quest.runtime.download import sha256_of
from quest.runtime.files import dumps, read_json
from workflow.scripts import leaderboard as script

ROOT = Path(__file__).parents[2]
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


@pytest.fixture
def submit_images(tmp_path, monkeypatch):
    """A function that writes a submission of six images in place of 500, and returns its folder.

    changed: calls with the folder of images, before or after the hash is taken, that break a rule.
    """
    monkeypatch.setattr(leaderboard, "IMAGES", 6)

    def write(images, told=None, name="pictures", changed=None):
        folder = tmp_path / "entries" / name
        (folder / "images").mkdir(parents=True)
        for index, image in enumerate(images, 500):
            Image.fromarray(image).save(folder / "images" / f"{index:05}.png")
        entry = {"name": name, "authors": "A. Person", "bits": "w4a4", "recipe": RECIPE, "images": "images"}
        entry |= {"sha256": leaderboard.images_hash(images), "calibration": [1_000_000, 1_000_063]}
        (folder / "entry.yaml").write_text(yaml.safe_dump(entry | (told or {})), encoding="utf-8")
        if changed:
            changed(folder / "images")
        return folder

    return write


def draw_images(seed, n=6, side=32):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


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


def test_images_are_taken_as_a_folder_or_a_file(submit_images, tmp_path, monkeypatch, capsys):
    images = draw_images(0)
    folder = submit_images(images)
    assert np.array_equal(leaderboard.judged_images(leaderboard.images_place(folder)), images)
    assert leaderboard.check(folder).origin == leaderboard.ONLY_IMAGES
    file = submit_images(images, {"images": "all.npz"}, name="file")
    np.savez(file / "all.npz", images=images)
    assert leaderboard.check(file).origin == leaderboard.ONLY_IMAGES
    for place in (folder / "images", file / "all.npz"):
        monkeypatch.setattr(sys, "argv", ["leaderboard", "--hash", str(place)])
        script.main()
        assert capsys.readouterr().out == leaderboard.images_hash(images) + "\n"
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(folder), "--checked", str(tmp_path / "checked.json")])
    script.main()  # nothing is loaded
    assert read_json(tmp_path / "checked.json")["refused"] is None


def save_image(name, side=32):
    return lambda folder: Image.fromarray(draw_images(9, 1, side)[0]).save(folder / name)


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda folder: (folder / "00503.png").unlink(), r"images: missing or unknown: 00503.png; valid: 00500.png to"),
        (save_image("00506.png"), "missing or unknown: 00506.png"),
        (save_image("more.jpg"), "missing or unknown: more.jpg"),
        (save_image("00502.png", 64), "00502.png: 64 x 64 pixels; needed: 32 x 32"),
        (save_image("00502.png"), "the SHA-256 of its images is .*, not the declared"),
        (lambda folder: (folder / "00502.png").write_bytes(b"GIF89a"), "00502.png: not an image that can be read"),
        (lambda folder: shutil.copy(folder / "00501.png", folder / "00504.png"), "images 501 and 504 are identical"),
        (shutil.rmtree, "images: no such file or folder"),
    ],
)
def test_images_that_break_a_rule_are_refused(submit_images, changed, message):
    folder = submit_images(draw_images(0), changed=changed)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        leaderboard.check(folder)


@pytest.mark.parametrize(
    "told, message",
    [
        ({"row": "rtn"}, "both row and images; valid: one of them"),
        ({"images": "../others"}, "images: '../others'; valid: a folder of images or an .npz file, beside entry.yaml"),
        ({"images": "five.npz"}, "five.npz: 5 images; valid: 6, the images 500 to 505"),
        ({"images": "large.npz"}, "large.npz: images of 64 x 64 pixels; needed: 32 x 32"),
        ({"calibration": [500, 563]}, "images of evaluation are not for calibration"),
    ],
)
def test_entries_of_images_that_are_told_wrongly_are_refused(submit_images, told, message):
    folder = submit_images(draw_images(0), told)
    np.savez(folder / "five.npz", arr_0=draw_images(0, 5))
    np.savez(folder / "large.npz", arr_0=draw_images(0, 6, 64))
    with pytest.raises(ValueError, match=message):
        leaderboard.check(folder)


def test_images_are_measured_like_those_that_are_sampled(submit_images, tmp_path, monkeypatch):
    """All but their latents and noise predictions: these are in no image."""
    images = {"mine": draw_images(0), "full": draw_images(1)}
    cells = {}
    for name, own in images.items():
        folder = submit_images(own, name=f"{name}-images")
        monkeypatch.setattr(sys, "argv", ["leaderboard", str(folder), "--images", str(tmp_path / name)])
        script.main()
        cells[name] = Cell.load([tmp_path / name / "features-images.npz"], [tmp_path / name / "samples-images.npz"])
    model = MODELS[leaderboard.MODEL]
    found = measure(cells["mine"], load_reference(model.reference), cells["full"], extractor=model.extractor)
    rows = {row["metric"]: row["value"] for row in found["rows"]}
    assert set(leaderboard.ENDPOINTS) - set(rows) == {"log_latent_mse"} and found["eps_error"] == []
    error = np.square(images["mine"].astype(float) - images["full"]).mean(axis=(1, 2, 3))
    assert rows["psnr"] == pytest.approx(np.mean(10 * np.log10(255**2 / error)))
    labels = model.conditions("evaluation", list(range(500, 506)))["class_labels"]
    assert rows["agreement"] == np.mean(cells["mine"].features["class_logits"].argmax(axis=1) == np.array(labels))


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


def test_fresh_images_are_drawn_by_who_scores_so_that_no_file_can_search_for_them(submit, tmp_path, monkeypatch):
    """The same submissions get other images in another draw. A draw reads no submission: there is none here."""
    for name in "ab":
        monkeypatch.setattr(sys, "argv", ["leaderboard", "--draw", str(tmp_path / name)])
        script.main()
    firsts = [int((tmp_path / name).read_text(encoding="utf-8")) for name in "ab"]
    assert firsts[0] != firsts[1]
    drawn = [*firsts, *(leaderboard.draw() for _ in range(1000))]
    assert all(leaderboard.FIRST + leaderboard.IMAGES < f < SEEDS["calibration"] - leaderboard.FRESH for f in drawn)
    assert len(set(drawn)) > 900
    assert not any(first % MODELS[leaderboard.MODEL].batch_size for first in drawn)  # sampling begins with a batch


# Of what `metrics` writes for a cell of photos-class.
MEASURED = ("kid_64w", "fd_64w", "psnr", "log_latent_mse", "agreement")


def draw_parts(folder, error, seed):
    """Samples and features of both parts; the latents differ from those of full precision by `error` of each part."""
    folder.mkdir(parents=True)
    for part, n in (("judged", 60), ("fresh", 40)):
        common = np.random.default_rng(len(part))
        latents = common.normal(size=(n, 2, 4, 4)) + error[part] * np.random.default_rng(seed).normal(size=(n, 2, 4, 4))
        features = {name: common.normal(size=(n, 4)) for name in ("pool", "spatial", "logits")}
        images = draw_images(100 + seed, n)
        np.savez(folder / f"samples-{part}.npz", index=np.arange(n), latents=latents, images=images)
        np.savez(folder / f"features-{part}.npz", index=np.arange(n), **features)


def write_scores(folder, distance, metrics=MEASURED):
    (folder / "checked.json").write_text(dumps({"refused": None}), encoding="utf-8")
    rows = [{"metric": m, "value": distance, "low": distance, "high": distance + 0.1} for m in metrics]
    (folder / "metrics.json").write_text(dumps({"rows": rows}), encoding="utf-8")


def test_the_table_ranks_entries_and_has_a_row_for_each_that_is_refused(submit, tmp_path, monkeypatch):
    scored, entries = tmp_path / "scored", []
    none = {"judged": 0.0, "fresh": 0.0}
    draw_parts(scored / "full", none, 0)
    (scored / "draw.txt").write_text("12345\n", encoding="utf-8")
    for place, (name, distance) in enumerate([("far", 0.3), ("near", 0.2)]):
        entries.append(submit({"name": name}, name=name))
        draw_parts(scored / name, {"judged": 0.1, "fresh": 0.1}, place)
        write_scores(scored / name, distance)
    entries += [submit({"bits": "w2a2"}, name="wide"), submit(name="other"), submit(name="a b")]
    (scored / "other").mkdir()
    (scored / "other" / "checked.json").write_text(
        dumps({"refused": "of ![another](http://example.org) <b>model"}), encoding="utf-8"
    )

    def rows():
        words = ["leaderboard", *map(str, entries), "--scored", str(scored), "-o", str(scored)]
        monkeypatch.setattr(sys, "argv", words)
        script.main()
        text = (scored / "leaderboard.md").read_text(encoding="utf-8")
        assert METRICS["kid_64w"].label in text and "Fresh images: 12345 to 12444." in text
        return {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| ")}

    found = rows()
    assert list(found)[2:] == ["near", "far", "a b", "other", "wide"]
    assert "| sent | 0.2" in found["near"] and "| refused: of " in found["other"]
    assert "refused: " in found["wide"] and "at most 2 are declared" in found["wide"]
    assert "the folder's name 'a b'" in found["a b"]
    assert "| refused: of !(another)(http://example.org) ‹b›model |" in found["other"]
    draw_parts(tmp_path / "cheat", {"judged": 0.01, "fresh": 0.1}, 3)
    for file in (tmp_path / "cheat").iterdir():
        file.replace(scored / "far" / file.name)
    found = rows()
    assert "refused: nearer to full precision on the judged images" in found["far"] and "| sent |" in found["near"]
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(tmp_path / "nobody")])
    with pytest.raises(SystemExit, match="nobody/entry.yaml: missing; valid: name, authors"):
        script.main()


def test_images_stand_below_checkpoints_and_copies_are_refused(submit, submit_images, tmp_path, monkeypatch):
    scored, entries = tmp_path / "scored", [submit(name="checked")]
    for seed, name in enumerate(["full", "checked"]):
        draw_parts(scored / name, {"judged": 0.1 * seed, "fresh": 0.1 * seed}, seed)
    write_scores(scored / "checked", 0.5)
    (scored / "draw.txt").write_text("12345\n", encoding="utf-8")
    pictures = {name: draw_images(seed) for seed, name in enumerate(["own", "w8", "of-full", "of-checked", "twin"])}
    pictures["of-full"] = pictures["own"].copy()  # it is refused, so it does not make "own" a copy
    pictures["of-full"][4] = draw_images(100, 60)[1]  # one image of full precision, at another place
    pictures["of-checked"] = draw_images(101, 60)[:6]
    pictures["other-twin"] = pictures["twin"]
    for name, images in pictures.items():
        entries.append(submit_images(images, {"bits": "w8a8" if name == "w8" else "w4a4"}, name))
        (scored / name).mkdir()
        np.savez(scored / name / "samples-images.npz", index=np.arange(500, 506), images=images)
        write_scores(scored / name, 0.1, ("kid_64w", "psnr", "agreement"))
    monkeypatch.setattr(sys, "argv", ["leaderboard", *map(str, entries), "--scored", str(scored), "-o", str(scored)])
    script.main()
    text = (scored / "leaderboard.md").read_text(encoding="utf-8")
    found = {line.split(" | ")[1]: line for line in text.splitlines() if line.startswith("| ")}
    assert list(found)[2:] == ["mine", "own", "w8", "of-checked", "of-full", "other-twin", "twin"]
    columns = found["own"].strip("| ").split(" | ")
    assert columns[3] == leaderboard.ONLY_IMAGES and columns[5] == "–" and columns[4].startswith("0.1")
    assert "its calibration and how its images were chosen are what its authors say" in text
    assert (
        "refused: 1 of its images are identical to images of full precision, the first of them 504" in found["of-full"]
    )
    assert "refused: 6 of its images are identical to images of checked" in found["of-checked"]
    assert "images of other-twin" in found["twin"] and "images of twin" in found["other-twin"]


def test_a_checkpoint_that_cannot_be_loaded_is_refused_before_it_is_sampled(submit, tmp_path, monkeypatch):
    """Its header keeps the rules, but it cannot be loaded. Sampling would fail, and the table with it."""
    monkeypatch.setattr(sys, "argv", ["leaderboard", str(submit()), "--checked", str(tmp_path / "checked.json")])
    script.main()
    told = read_json(tmp_path / "checked.json")["refused"]
    assert "model.safetensors is corrupted: its tensor x" in told


def test_a_row_of_the_default_run_is_sent_without_its_file(submit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = submit({"row": "quest-suite"})
    sent = folder / "model.safetensors"
    made = tmp_path / "results/default/photos-class/quest-suite/w4a4/model.safetensors"
    with pytest.raises(FileNotFoundError, match="quest-suite/w4a4/model.safetensors: missing; `snakemake leaderboard`"):
        leaderboard.check(folder)
    made.parent.mkdir(parents=True)
    sent.replace(made)
    assert leaderboard.check(folder).origin == "made here, other tensors than declared"
    text = yaml.safe_load((folder / "entry.yaml").read_text(encoding="utf-8"))
    text |= {"sha256": leaderboard.tensors_hash(made)}
    (folder / "entry.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    assert leaderboard.check(folder).origin == "made here, as declared"
    (folder / "entry.yaml").write_text(yaml.safe_dump(text | {"row": "../x"}), encoding="utf-8")
    with pytest.raises(ValueError, match="row: '../x'; valid: a row of"):
        leaderboard.check(folder)


def test_our_own_entries_are_rows_of_the_default_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing was made yet
    config = yaml.safe_load((ROOT / "workflow/config/default.yaml").read_text(encoding="utf-8"))
    folders = sorted((ROOT / "results/leaderboard").iterdir())
    assert len(folders) == 3
    for folder in folders:
        bits, row = leaderboard.declared(folder, "bits"), leaderboard.declared(folder, "row")
        cells = [part for part in config["grid"] if leaderboard.MODEL in part["model"] and bits in part["bits"]]
        assert any(row in part["method"] for part in cells)
        with pytest.raises(FileNotFoundError, match="missing; `snakemake leaderboard` makes it"):
            leaderboard.check(folder)


def test_the_declared_fields_of_a_plan_are_checked(submit):
    folder = submit()
    assert leaderboard.declared(folder, "bits") == "w4a4"
    (folder / "entry.yaml").write_text("bits: 5", encoding="utf-8")
    with pytest.raises(ValueError, match="bits: 5; valid"):
        leaderboard.declared(folder, "bits")
