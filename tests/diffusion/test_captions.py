import json

import pytest

from quest.diffusion.captions import enough, load, sha256


def test_lines(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a cat\ntwo dogs \r\nun café\n", encoding="utf-8")
    assert load(file) == ["a cat", "two dogs", "un café"]
    file.write_text("a cat\ntwo dogs", encoding="utf-8")  # no newline at the end is no caption less
    assert load(file) == ["a cat", "two dogs"]


def test_first_caption_of_every_coco_image(tmp_path):
    rows = [(9, 30, "later"), (4, 12, " first\nof 4 "), (9, 20, "first of 9"), (4, 15, "second of 4")]
    content = {"annotations": [{"image_id": image, "id": id, "caption": text} for image, id, text in rows]}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content), encoding="utf-8")
    assert load(tmp_path / "captions_val2014.json") == ["first of 4", "first of 9"]


def test_one_line_too_few(tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a cat\n" * 9, encoding="utf-8")
    enough(file, load(file), 9)
    with pytest.raises(ValueError, match=r"captions.txt: 9 captions, 10 needed \(1 too few\); give one per image"):
        enough(file, load(file), 10)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="captions.txt: no such file; put captions there, one per line"):
        load(tmp_path / "captions.txt")
    (tmp_path / "captions.txt").write_text("a cat\n\ntwo dogs\n", encoding="utf-8")
    with pytest.raises(ValueError, match="captions.txt: line 2 is empty"):
        load(tmp_path / "captions.txt")
    rows = ('{"image_id": "7", "id": 1, "caption": "a"}', '{"image_id": 7, "id": 1, "caption": "\\ud800"}', "3")
    for content in (
        "{",
        "[]",
        *(f'{{"annotations": [{row}, {{"image_id": 1, "id": 2, "caption": "b"}}]}}' for row in rows),
    ):
        (tmp_path / "other.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="other.json: not COCO's caption annotations"):
            load(tmp_path / "other.json")
    (tmp_path / "empty.json").write_text(
        '{"annotations": [{"image_id": 7, "id": 1, "caption": " "}]}', encoding="utf-8"
    )
    with pytest.raises(ValueError, match="empty.json: the caption of image 7 is empty"):
        load(tmp_path / "empty.json")


def test_hash_is_of_order_and_content():
    assert sha256(["a", "b"]) != sha256(["b", "a"]) != sha256(["b", "a "])
    assert len(sha256([])) == 64
