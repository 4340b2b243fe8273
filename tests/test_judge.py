"""`python -m quest judge`: verdicts on pairs with known answers, and what input it refuses."""

import numpy as np
import pytest
from PIL import Image

from quest.__main__ import main
from quest.diffusion import scenes
from quest.judge import EXIT, blurred, decide, generated, judge


def drawn(start, n):
    return scenes.draw("evaluation", n, start=start).images()


def saved(path, images):
    np.savez(path, arr_0=images)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Files of 60 scenes, of the same with noise that nobody sees, after a blur, and of 60 other scenes."""
    folder = tmp_path_factory.mktemp("judge")
    images = drawn(0, 60)
    grain = np.random.default_rng(0).integers(-1, 2, images.shape)
    others = {"grain": (images + grain).clip(0, 255).astype(np.uint8), "blur": blurred(blurred(blurred(images)))}
    others |= {"scenes": images, "others": drawn(60, 60)}
    return {name: saved(folder / f"{name}.npz", x) for name, x in others.items()}


def test_the_same_images_are_as_good(sets):
    verdict = judge(sets["scenes"], sets["scenes"])
    assert verdict.verdict == "same or better" and verdict.paired and abs(verdict.estimate) < 1e-9


def test_a_blur_is_worse_and_the_page_shows_the_pairs(sets, tmp_path):
    verdict = judge(sets["blur"], sets["scenes"], page=tmp_path / "judged.html")
    assert verdict.verdict == "worse" and verdict.estimate > verdict.margin > 0 and verdict.low > 0
    page = (tmp_path / "judged.html").read_text(encoding="utf-8")
    assert page.count("<img") == 16 and "A is worse" in page and "PSNR of pairs" in page


def test_a_blur_is_farther_from_real_images(sets):
    verdict = judge(sets["blur"], sets["scenes"], sets["others"])
    assert verdict.verdict == "worse" and verdict.reference == 60
    assert judge(sets["scenes"], sets["blur"], sets["others"]).verdict == "same or better"


def test_a_second_draw_of_the_same_generator_is_not_worse(sets):
    verdict = judge(sets["others"], sets["scenes"])
    assert verdict.verdict != "worse"
    assert (verdict.needed or 0) > 60 if verdict.verdict == "cannot tell" else verdict.needed is None


@pytest.mark.parametrize("paired", [True, False])
def test_verdicts_on_features_are_right_as_often_as_promised(paired):
    """Equal distributions are called worse in 5 % of trials at most; a shift is found, and a smaller one is not."""
    rng, basis = np.random.default_rng(0), np.random.default_rng(1).normal(size=(20, 200)) / 4

    def features(n, shift=0.0):
        return np.maximum(rng.normal(size=(n, 20)) @ basis + 0.3 + shift, 0)

    found = []
    for _ in range(40):
        b = features(80)
        a = np.where(rng.random((80, 1)) < 0.5, b, features(80)) if paired else features(80)
        found.append(decide(a, b, 1e-4, paired).verdict)
    assert found.count("worse") <= 5  # 2 expected; more than 5 in 40 have a probability of 1 %
    b = features(80)
    assert decide(b + 0.5 if paired else features(80, 0.5), b, 1e-4, paired).verdict == "worse"
    assert decide(features(80, 0.5), b, 1e3, False).verdict == "same or better"  # a margin beyond any distance


def test_the_number_of_images_that_would_decide_decides():
    rng = np.random.default_rng(0)

    def features(n, shift=0.0):
        return np.maximum(rng.normal(size=(n, 50)) + 0.5 + shift, 0)

    first = decide(features(40, 0.06), features(40), 1e-9, False)
    while first.verdict != "cannot tell" or first.estimate < 1e-3:
        first = decide(features(40, 0.06), features(40), 1e-9, False)
    more = 4 * first.needed  # the estimate from 40 images may be twice the true distance
    assert decide(features(more, 0.06), features(more), 1e-9, False).verdict == "worse"


def test_folders_are_pairs_by_their_names(tmp_path, sets):
    images = drawn(0, 20)
    for name, names in (("a", range(20)), ("b", range(20)), ("c", range(1, 21))):
        (tmp_path / name).mkdir()
        for i, image in zip(names, images, strict=True):
            Image.fromarray(image).save(tmp_path / name / f"{i:03}.png")
    assert judge(tmp_path / "a", tmp_path / "b").paired
    assert not judge(tmp_path / "a", tmp_path / "c").paired


def code(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["judge", *map(str, arguments)])
    return stop.value.code


def test_exit_codes(sets, tmp_path, capsys):
    page = ("--output", tmp_path / "page.html")
    assert code(sets["scenes"], sets["scenes"], *page) == EXIT["same or better"] == 0
    assert code(sets["blur"], sets["scenes"], *page) == EXIT["worse"] == 1
    assert "images: 60 of A, 60 of B, in pairs" in capsys.readouterr().out


@pytest.mark.parametrize("bad, said", [
    ("nowhere", "nowhere: no such file"), ("few.npz", "few.npz: 5 images; at least 20"),
    ("float.npz", "needs arr_0 or images, uint8"), ("text.npz", "text.npz"), ("empty", "empty: no images in it"),
])  # fmt: skip
def test_bad_input_is_named_and_has_its_own_code(sets, tmp_path, capsys, bad, said):
    saved(tmp_path / "few.npz", drawn(0, 5))
    saved(tmp_path / "float.npz", drawn(0, 5) / 255)
    (tmp_path / "text.npz").write_text("no archive", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    assert code(tmp_path / bad, sets["scenes"]) == 3
    assert said in capsys.readouterr().err
    assert code(sets["scenes"]) == 3  # B is missing
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    assert code(tmp_path / "nowhere", sets["scenes"], "--prompts", tmp_path / "prompts.txt") == 3
    assert "prompts.txt: 1 prompts; at least 20" in capsys.readouterr().err  # before a pipeline is even opened


def test_a_pipeline_is_sampled_with_its_own_settings(class_pipe, text_pipe, tmp_path):
    for name, pipe in (("class", class_pipe), ("text", text_pipe)):
        pipe.save_pretrained(tmp_path / name)
    first, again = (generated(tmp_path / "class", None, count) for count in (3, 2))
    assert first.shape[0] == 3 and first.dtype == np.uint8 and np.array_equal(first[:2], again)
    assert len(generated(tmp_path / "text", ["a red circle", "a blue square"], 200)) == 2
    with pytest.raises(ValueError, match="text: a StableDiffusionPipeline needs a file of --prompts"):
        generated(tmp_path / "text", None, 2)
    with pytest.raises(ValueError, match="class: a LatentDiffusionPipeline needs no prompts"):
        generated(tmp_path / "class", ["a red circle"], 2)
