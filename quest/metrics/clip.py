"""The image-text models that compute the CLIP score for the zoo; open_clip loads them from a local folder."""

import logging

import open_clip

from quest.runtime.sums import check_sums


def load(folder):
    """Return (model, preprocess, tokenizer), the model in float32 and eval mode.

    preprocess takes a PIL image, tokenizer a list of str. Raises ValueError if a file differs from its known hash.
    """
    check_sums(folder)
    name = f"local-dir:{folder}"
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # open_clip reports every step of loading on the root logger
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name)
        tokenizer = open_clip.get_tokenizer(name)
    finally:
        logger.setLevel(level)
    return model.eval().requires_grad_(False), preprocess, tokenizer
