"""Evaluate a model of scenes: error on held-out scenes, FID of samples, and whether samples show what was asked for.

The FID (scenes net) of real scenes after the autoencoder, at the same n, is a floor, because no sample can be better
than its decoder. For each attribute of a scene, such as its main object, the share of samples is counted in which the
classifier sees the requested value.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from quest.diffusion import scenes
from quest.diffusion.loading import load_pipeline
from quest.diffusion.models import MODELS
from quest.diffusion.sampling import generate
from quest.metrics.extractor import HEADS, load, outputs, targets
from quest.metrics.frechet import Statistics, frechet_distance, load_reference
from quest.runtime.files import atomic, dumps, write_text
from quest.runtime.provenance import provenance
from quest.zoo.latents import HELD_OUT, posterior_means
from quest.zoo.train_autoencoder import to_tensor
from quest.zoo.train_denoiser import Trainee, held_out_error
from quest.zoo.train_extractor import reconstruct


def error_of(name, pipe):
    """Mean squared error of the predicted noise on the latents of HELD_OUT validation scenes."""
    drawn = scenes.draw("validation", HELD_OUT)
    z = posterior_means(pipe.vae, drawn.images())
    trainee = Trainee(name)
    trainee.denoiser = pipe.unet
    if trainee.encoder is not None:
        trainee.encoder = pipe.text_encoder if name == "scenes-text" else pipe.class_embedder
    return held_out_error(trainee, z, trainee.conditions("validation", HELD_OUT))


def judge(name, folder, extractor, reference, n=1000):
    """Returns (numbers, images uint8 [n, 64, 64, 3]); every number is measured on n images of the evaluation split."""
    pipe, net, reference = load_pipeline(Path(folder)), load(extractor), load_reference(reference)
    numbers = {"model": name, "protocol": MODELS[name].protocol, "n": n}
    numbers["held-out error"] = error_of(name, pipe)
    images = np.concatenate([batch[2] for batch in generate(pipe, MODELS[name], "evaluation", n)])
    real = scenes.draw("evaluation", n)
    rebuilt = reconstruct(pipe.vae, real.images())
    results = {
        "samples": outputs(net, to_tensor(images)),
        "reconstructions": outputs(net, to_tensor(rebuilt)),
        "real": outputs(net, to_tensor(real.images())),
    }
    for what, features in results.items():
        found = Statistics.from_features(features["pool"].numpy())
        numbers[f"FID (scenes net), {what}"] = frechet_distance(found, reference.pool)
    # Only attributes that the condition names can be checked.
    heads = {"none": [], "class": ["logits"], "text": list(HEADS)}[MODELS[name].conditioning]
    wanted = targets(real)
    for head in heads:
        for what in ("samples", "reconstructions"):
            numbers[f"{head} right, {what}"] = (results[what][head].argmax(1) == wanted[head]).float().mean().item()
    return numbers, images


def grid(images):
    """A PIL image with uint8 images [n, H, W, 3], eight in a row, each pixel doubled."""
    rows = [np.concatenate(images[i : i + 8], 1) for i in range(0, len(images) - 7, 8)]
    return Image.fromarray(np.concatenate(rows, 0).repeat(2, 0).repeat(2, 1))


def write(numbers, images, output, picture):
    """Write and print the numbers with their provenance (JSON), and a picture of the first 64 samples."""
    with atomic(picture) as temporary:
        grid(images[:64]).save(temporary)
    text = dumps(numbers | {"provenance": provenance()}, indent=2) + "\n"
    write_text(output, text)
    print(text)
