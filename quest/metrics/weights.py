"""The weights of the networks that the metrics use. This module needs no torch.

They are in the folder `resources/weights`, or in the folder that the environment variable QUEST_WEIGHTS names. A file
that is missing is downloaded once and checked. Without a network connection, the error says which file to put where.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from quest.runtime.download import fetch, sha256_of


@dataclass(frozen=True)
class Weights:
    file: str
    url: str
    sha256: str


WEIGHTS = {
    # torch-fidelity's conversion of the TensorFlow graph of 2015, which defines FID.
    "inception": Weights(
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    # OpenAI's CLIP, from the address that open_clip uses; the address contains the hash.
    "ViT-B-16": Weights(
        "ViT-B-16.pt",
        "https://openaipublic.azureedge.net/clip/models/"
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    ),
}


def folder() -> Path:
    return Path(os.environ.get("QUEST_WEIGHTS") or Path(__file__).parents[2] / "resources" / "weights")


def path(name: str) -> Path:
    """Return the file of a network in WEIGHTS; download it if it is missing, and check its hash.

    Raises OSError if the download fails and ValueError if the file has another hash; both name the file.
    """
    network = WEIGHTS[name]
    return fetch(network.url, folder() / network.file, network.sha256)


def sha256(name: str) -> str | None:
    """Return the SHA-256 of the weights of an extractor, CLIP or classifier, or None for a name without weights.

    Networks that ship with the project are hashed here. For the others it is the known hash, which `path` compares.
    """
    from quest.diffusion.models import ZOO
    from quest.metrics import RESIZE, SHIPPED_CLIPS
    from quest.metrics.lite0 import components_file

    if name in RESIZE:
        name = "inception"
    if name in WEIGHTS:
        return WEIGHTS[name].sha256
    shipped = {"scenes": ZOO / "scenes-extractor" / "model.safetensors"}
    shipped |= {"photos-classifier": ZOO / "photos-classifier" / "model.safetensors"}
    shipped |= {clip: ZOO / clip / "open_clip_model.safetensors" for clip in SHIPPED_CLIPS}
    shipped |= {f"lite0-{kind}": components_file(kind) for kind in ("photos", "emoji")}  # they name Lite0's hash
    return sha256_of(shipped[name]) if name in shipped else None
