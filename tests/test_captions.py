import json

import pytest

from quest.captions import coco


def test_first_caption_of_every_image_by_id(tmp_path):
    rows = [(9, 30, "later"), (4, 12, " first\nof 4 "), (9, 20, "first of 9"), (4, 15, "second of 4")]
    content = {"annotations": [{"image_id": image, "id": id, "caption": text} for image, id, text in rows]}
    (tmp_path / "captions_val2014.json").write_text(json.dumps(content))
    assert coco(tmp_path / "captions_val2014.json") == ["first of 4", "first of 9"]


@pytest.mark.parametrize("content", ["{", "[]", '{"annotations": [{"id": 1}]}', '{"annotations": [3]}'])
def test_other_files(content, tmp_path):
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(ValueError, match="other.json: not COCO's caption annotations"):
        coco(tmp_path / "other.json")


def test_empty_caption(tmp_path):
    content = {"annotations": [{"image_id": 7, "id": 1, "caption": " "}]}
    (tmp_path / "captions.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="captions.json: the caption of image 7 is empty"):
        coco(tmp_path / "captions.json")
