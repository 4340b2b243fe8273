"""The tokenizer of the text-conditional model and of the image-text model."""

import pytest
from transformers import CLIPTokenizer

from quest.diffusion import scenes
from quest.zoo.vocabulary import MAX_LENGTH, build_tokenizer, encode


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def test_every_word_is_one_token(tokenizer):
    words = scenes.vocabulary()
    assert {w for c in scenes.draw("train", 2000).captions() for w in c.split()} == set(words)
    ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
    assert all(len(i) == 1 for i in ids) and len({i[0] for i in ids}) == len(words)


def test_longest_caption_fits_and_reads_back(tokenizer):
    longest = "a large striped red circle left of a small blue square on a night background"
    ids = tokenizer(longest).input_ids
    assert len(ids) <= MAX_LENGTH["scenes"]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == longest


def test_unknown_text_falls_apart_but_does_not_fail(tokenizer):
    assert tokenizer.unk_token_id not in tokenizer("a zebra", add_special_tokens=False).input_ids
    assert encode(tokenizer, ["crème brûlée", ""]).shape == (2, MAX_LENGTH["scenes"])


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    captions = scenes.draw("evaluation", 50).captions()
    assert encode(CLIPTokenizer.from_pretrained(tmp_path), captions).equal(encode(tokenizer, captions))
