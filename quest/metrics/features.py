"""Images to the features the metrics are made of. The only part of the metrics that needs torch."""

import numpy as np

BATCH = 250  # images per pass of a network


def _scenes():
    from quest.zoo import extractor

    return extractor.load()


def _scenes_clip():
    from quest.zoo import clip

    return clip.load()


# Name -> loader of a module: x [N, 3, H, W] in [-1, 1] -> dict with pool [N, D], spatial [N, E], logits [N, K].
EXTRACTORS = {"scenes": _scenes}
# Name -> loader of (model, preprocess, tokenizer) as open_clip has them.
CLIPS = {"scenes-clip": _scenes_clip}


def extract(
    images: np.ndarray, extractor: str, clip: str | None = None, captions: list[str] | None = None
) -> dict[str, np.ndarray]:
    """Features of images, uint8 [N, H, W, 3]: float32 arrays pool, spatial and logits.

    With `clip`, also clip_image and clip_text, the normalised embeddings of images and of the captions they were drawn
    for (one each, in order).

    Raises ValueError for an unknown network, images of another dtype or shape, or captions that are not one per image.
    """
    if extractor not in EXTRACTORS:
        raise ValueError(f"extractor: {extractor!r} is not one of {', '.join(EXTRACTORS)}")
    if clip is not None and clip not in CLIPS:
        raise ValueError(f"clip: {clip!r} is not one of {', '.join(CLIPS)}")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"images must be a uint8 array [N, H, W, 3], got {got}")
    if clip is not None and len(captions or []) != len(images):
        raise ValueError(f"clip needs one caption per image: {len(captions or [])} captions for {len(images)} images")

    features = _image_features(images, EXTRACTORS[extractor]())
    return features | _clip_features(images, captions, *CLIPS[clip]()) if clip else features


def _image_features(images, network):
    import torch

    parts = []
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(images[start : start + BATCH]).permute(0, 3, 1, 2).float()  # [B, 3, H, W]
            outputs = network(batch / 127.5 - 1)
            parts.append({name: outputs[name].float().cpu().numpy() for name in ("pool", "spatial", "logits")})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _clip_features(images, captions, model, preprocess, tokenizer):
    import torch
    from PIL import Image

    image_parts, text_parts = [], []
    with torch.no_grad():
        for start in range(0, len(images), BATCH):
            batch = torch.stack([preprocess(Image.fromarray(image)) for image in images[start : start + BATCH]])
            image_parts.append(model.encode_image(batch, normalize=True).float().cpu().numpy())
            tokens = tokenizer(captions[start : start + BATCH])
            text_parts.append(model.encode_text(tokens, normalize=True).float().cpu().numpy())
    return {"clip_image": np.concatenate(image_parts), "clip_text": np.concatenate(text_parts)}
