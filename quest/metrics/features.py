"""Extract from images the features that the metrics use."""

from functools import partial
from pathlib import Path

import numpy as np

from quest.metrics import SHIPPED_CLIPS
from quest.runtime.sums import check_archive

BATCH = 250  # images per pass of a network


def _scenes():
    import torch.nn.functional as F

    from quest.diffusion.scenes import SIZE
    from quest.metrics import extractor

    network = extractor.load()

    def features(images):
        images = images.float()
        if images.shape[2:] != (SIZE, SIZE):  # of a model that a config declares
            images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", antialias=True)
        return network(images / 127.5 - 1)

    return features


def _lite0(kind):
    import torch

    from quest.metrics import lite0

    whitening = lite0.Whitening.load(lite0.components_file(kind))
    mean, basis = map(torch.from_numpy, (whitening.mean, whitening.basis))

    def features(images):
        found = lite0.outputs(images)
        centred = found.pop("features") - mean.to(images.device)
        return found | {"pool": centred @ basis.to(images.device)}

    return features


def _inception(protocol):
    from quest.metrics import weights
    from quest.metrics.inception import Inception

    return Inception(weights.path("inception"), protocol)


def _shipped_clip(name):
    from quest.diffusion.models import ZOO
    from quest.metrics import clip

    return clip.load(ZOO / name)


def _clip(architecture, name):
    from quest.metrics import weights

    return load_clip(architecture, weights.path(name))


def load_clip(architecture: str, weights: str | Path) -> tuple:
    """Return (model, preprocess, tokenizer) of open_clip's `architecture` in float32, with the weights of a file.

    The file is a TorchScript archive, as OpenAI published its models, or tensors (.safetensors or a state dict). Raises
    ValueError, which names the file, for anything else and for tensors of another architecture.
    """
    import open_clip

    state = _tensors(Path(weights))
    for setting in ("input_resolution", "context_length", "vocab_size"):  # numbers among OpenAI's tensors
        state.pop(setting, None)
    model, _, preprocess = open_clip.create_model_and_transforms(architecture, load_weights=False)
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        raise ValueError(f"{weights}: not weights of {architecture}: {' '.join(str(error).split())[:300]}") from error
    return model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(architecture)


def _tensors(path):
    import torch
    from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    check_archive(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)  # executes no code from the file
        except RuntimeError:  # torch.load refuses a TorchScript archive with weights_only
            return torch.jit.load(path, map_location="cpu").state_dict()
    except FileNotFoundError:
        raise
    except Exception as error:  # each kind of wrong file raises another type
        raise ValueError(f"{path}: neither tensors nor a TorchScript archive") from error


# Name -> loader of a function or module that maps uint8 images [B, 3, H, W] to a dict with pool [B, D], spatial [B, E],
# logits [B, K] and perhaps more of OUTPUTS. The names for Inception are its protocols, see inception.py.
OUTPUTS = ("pool", "spatial", "logits", "maps")
EXTRACTORS = {
    "scenes": _scenes,
    "lite0-photos": partial(_lite0, "photos"),
    "lite0-emoji": partial(_lite0, "emoji"),
    "adm": partial(_inception, "adm"),
    "torch-fidelity": partial(_inception, "torch-fidelity"),
    "clean": partial(_inception, "clean"),
}
# Name -> loader of open_clip's (model, preprocess, tokenizer). OpenAI's models use the activation that open_clip calls
# quickgelu.
CLIPS = {name: partial(_shipped_clip, name) for name in SHIPPED_CLIPS}
CLIPS["ViT-B-16"] = partial(_clip, "ViT-B-16-quickgelu", "ViT-B-16")


def _photos_classifier():
    from quest.metrics import classifier

    return classifier.load()


CLASSIFIERS = {"photos-classifier": _photos_classifier}


def class_logits(images: np.ndarray, classifier: str, device: str = "cpu", batch: int | None = None) -> np.ndarray:
    """Return the logits [N, K] of a network of CLASSIFIERS, float32, for images, uint8 [N, H, W, 3].

    Each row is the mean of those of an image and of its mirror image. batch: as for `extract`. Raises ValueError for an
    unknown network, or images of another size than the network takes.
    """
    import torch

    from quest.metrics.classifier import logits

    if classifier not in CLASSIFIERS:
        raise ValueError(f"classifier: {classifier!r} is not one of {', '.join(CLASSIFIERS)}")
    network, parts = _on(CLASSIFIERS[classifier](), device), []
    for rows, count in _passes(len(images), batch):
        inputs = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).to(device)
        parts.append(logits(network, inputs)[:count].cpu().numpy())
    return np.concatenate(parts)


def extract(
    images: np.ndarray,
    extractor: str,
    clip: str | None = None,
    captions: list[str] | None = None,
    device: str = "cpu",
    batch: int | None = None,
) -> dict[str, np.ndarray]:
    """Return features of images, uint8 [N, H, W, 3], as float32 arrays: pool [N, D], spatial [N, E] and logits [N, K].

    Lite0's extractors also return maps [N, M] in float16, see `quest.metrics.lite0.outputs`.

    With `clip`, the result also holds clip_image and clip_text, the normalized embeddings [N, D] of the images and of
    the N captions.

    batch: number of images per pass of a network; the last pass is padded to it. The last bits of a row may depend on
    the size of its pass and its position in the pass. With the batch size of sampling, they do not depend on the shard.
    Without it, a pass has BATCH images, and the last one may be shorter.

    Raises ValueError for an unknown network, images of another dtype or shape, or another number of captions.
    """
    if extractor not in EXTRACTORS:
        raise ValueError(f"extractor: {extractor!r} is not one of {', '.join(EXTRACTORS)}")
    if clip is not None and clip not in CLIPS:
        raise ValueError(f"clip: {clip!r} is not one of {', '.join(CLIPS)}")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        actual = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"images must be a uint8 array [N, H, W, 3], got {actual}")
    if clip is not None and len(captions or []) != len(images):
        raise ValueError(f"clip needs one caption per image: {len(captions or [])} captions for {len(images)} images")

    return of_networks(images, *loaded(extractor, clip), captions, device, batch)


def loaded(extractor: str, clip: str | None) -> tuple:
    """The networks of a name in EXTRACTORS and of one in CLIPS or None, for `of_networks`."""
    return EXTRACTORS[extractor](), CLIPS[clip]() if clip else None


def untrained(extractor: str, clip: str | None) -> tuple:
    """The same, with random weights where those of a network do not ship: features cost what they cost."""
    from quest.metrics import inception

    network = inception.Inception(None, extractor) if extractor in inception.RESIZE else EXTRACTORS[extractor]()
    if clip in (None, *SHIPPED_CLIPS):
        return network, CLIPS[clip]() if clip else None
    import open_clip

    architecture = CLIPS[clip].args[0]
    model, _, preprocess = open_clip.create_model_and_transforms(architecture, load_weights=False)
    return network, (model.eval().requires_grad_(False), preprocess, open_clip.get_tokenizer(architecture))


def of_networks(images, network, clip, captions=None, device="cpu", batch=None) -> dict[str, np.ndarray]:
    """`extract` by networks that are there already."""
    found = _image_features(images, _on(network, device), device, batch)
    if clip is None:
        return found
    model, preprocess, tokenizer = clip
    return found | clip_features(images, captions, _on(model, device), preprocess, tokenizer, device, batch)


def _on(network, device):
    return network.to(device) if hasattr(network, "to") else network


def _passes(n, batch):
    """Yield the image indices of each pass of a network, and how many rows of the pass are not padding."""
    size = batch or BATCH
    for start in range(0, n, size):
        count = min(size, n - start)
        padded = size if batch else count
        yield (start + np.arange(padded)).clip(max=n - 1), count


def _image_features(images, network, device, batch):
    import torch

    parts = []
    with torch.no_grad():
        for rows, count in _passes(len(images), batch):
            inputs = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).to(device)  # [B, 3, H, W]
            outputs = network(inputs)
            found = {name: outputs[name][:count].cpu() for name in OUTPUTS if name in outputs}
            parts.append({name: (x if name == "maps" else x.float()).numpy() for name, x in found.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def clip_features(images, captions, model, preprocess, tokenizer, device="cpu", batch=None):
    """Return clip_image and clip_text, the normalized embeddings [N, D] of images (uint8 [N, H, W, 3]) and captions."""
    import torch
    from PIL import Image

    image_parts, text_parts = [], []
    with torch.no_grad():
        for rows, count in _passes(len(images), batch):
            inputs = torch.stack([preprocess(Image.fromarray(images[row])) for row in rows])
            image_parts.append(model.encode_image(inputs.to(device), normalize=True)[:count].float().cpu().numpy())
            tokens = tokenizer([captions[row] for row in rows])
            text_parts.append(model.encode_text(tokens.to(device), normalize=True)[:count].float().cpu().numpy())
    return {"clip_image": np.concatenate(image_parts), "clip_text": np.concatenate(text_parts)}
