"""Sample the images of one cell and their features; a quantized cell also gets its noise-prediction errors.

The images of a method that diverged are black, its latents and errors NaN.
"""

import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "evaluation", "threads", "device")
    parser.add_argument("--checkpoint", type=Path, nargs="?", help="quantized denoiser; without it, full precision")
    parser.add_argument("-n", type=int, required=True, help="number of images of the whole cell")
    parser.add_argument("--first", type=int, default=0, help="index of the first image (default %(default)s)")
    parser.add_argument("--shard", default="0/1", help="K/N: the K-th of N parts, from 0")
    parser.add_argument("--samples", type=Path, required=True, help="file to write: index, images, latents")
    parser.add_argument("--features", type=Path, required=True, help="file to write: index, features of the images")
    parser.add_argument("--drop-images", action="store_true", help="keep latents and features only")
    parser.add_argument("--kernel", default="auto", help="a name in quest.kernels.KERNELS; auto: the fastest here")
    parser.add_argument("--null", help="a null control, of quest.diffusion.nulls: full precision in another way")
    arguments = parser.parse_args()

    from quest.diffusion import nulls

    if arguments.null and (arguments.null not in nulls.KINDS or arguments.checkpoint):
        parser.error(f"--null {arguments.null}: one of {', '.join(nulls.KINDS)}, of full precision, so no --checkpoint")
    if arguments.null == "isa":
        os.environ.update(nulls.environment())
    if arguments.null == "threads":
        arguments.threads = nulls.threads(arguments.threads)

    with command_line.imports():
        import numpy as np
        import torch

        import quest
        from quest.diffusion.denoisers import denoiser_of
        from quest.diffusion.drawn import Collected, earlier, joined
        from quest.diffusion.models import EMOJI_CAPTIONS, SEEDS
        from quest.diffusion.sampling import batches, generate, nothing, timed
        from quest.kernels.cpu.core import identity
        from quest.metrics import weights
        from quest.metrics.features import class_logits, loaded, of_networks
        from quest.metrics.noise_prediction import eps_errors
        from quest.quantization import cost, placement
        from quest.quantization.header import read as read_header
        from quest.runtime import sums
        from quest.runtime.files import atomic, dumps
        from quest.runtime.provenance import provenance
        from quest.runtime.resume import digest
        from workflow.scripts import opened

    shard, shards = map(int, arguments.shard.split("/"))
    model, pipe, evaluation = opened(arguments)
    work = cost.macs(denoiser_of(pipe), evaluation.inputs(torch.tensor([0])))
    header = read_header(arguments.checkpoint, diverged=True) if arguments.checkpoint else {}
    diverged = header.get("diverged")
    if arguments.checkpoint and not diverged:
        pipe = quest.load(pipe, arguments.checkpoint, arguments.kernel)
        placed = denoiser_of(pipe).placement
        kernel = placed._asdict() | {"deviation": placement.deviation(denoiser_of(pipe), evaluation)}
        placed_work = {"kernel": placed.kernel, "realizable": placement.realizable(denoiser_of(pipe), work)}
        footprint = denoiser_of(pipe).quantization["cost"]["footprint"] | placed_work
    else:
        footprint = cost.footprint(denoiser_of(pipe), work)
        kernel = {}
    if arguments.null:
        model = nulls.altered(pipe, model, arguments.null)

    # What an image and its features depend on: of a file of an equal job nothing is drawn again, and a file of any
    # other is drawn anew as a whole, so that its rows are always of one code, one set of weights and one version of
    # each package. Captions of other models than those of emoji are drawn by the code, or lie in the model's folder.
    files = [*Path(quest.__file__).parent.rglob("*.py"), model.folder / sums.NAME, EMOJI_CAPTIONS]
    files += model.pictures.iterdir() if model.pictures else []
    packages = ("diffusers", "transformers", "torchvision", "open-clip-torch", "timm", "pillow", "numpy")
    job = {
        "model": [model.name, model.protocol, arguments.kernel, arguments.drop_images, arguments.device],
        "checkpoint": header.get("hash"),
        "files": digest(*(file for file in files if file.is_file())),
        "networks": {one: weights.sha256(one) for one in (model.extractor, model.clip, model.classifier) if one},
        "packages": {name: version(name) for name in packages},
        "machine": identity() | {"threads": arguments.threads, "torch version": torch.__version__},
        "gpu": torch.cuda.get_device_name() if arguments.device != "cpu" else None,
        **({"null": arguments.null} if arguments.null else {}),
    }
    first, outputs = arguments.first, [arguments.samples, arguments.features]
    wanted = batches(model, arguments.n, (shard, shards), first)
    there, (samples, features), before = earlier(outputs, job, wanted, model.batch_size, first + arguments.n)
    start, made = time.perf_counter(), Collected()
    some = (arguments.n, (shard, shards), first, there)
    with timed(denoiser_of(pipe)) as calls:
        drawing = nothing(pipe, model, *some) if diverged else generate(pipe, model, "evaluation", *some)
        for index, latents, images in drawing:
            made.add({"index": index, "latents": latents.cpu().numpy(), "images": images})
    seconds = round(time.perf_counter() - start, 1)
    new = made.arrays()
    drawn = len(new["index"]) if new else 0
    if drawn:
        found, networks = Collected(), loaded(model.extractor, model.clip)
        for place in range(0, drawn, model.batch_size):
            rows = slice(place, place + model.batch_size)
            captions = model.conditions("evaluation", new["index"][rows].tolist()).get("prompt") if model.clip else None
            found.add(of_networks(new["images"][rows], *networks, captions, arguments.device, model.batch_size))
        kept = {"index": new["index"]} | found.arrays()
        if model.classifier:
            kept["class_logits"] = class_logits(new["images"], model.classifier, arguments.device, model.batch_size)
            kept["labels"] = np.array(model.conditions("evaluation", new["index"].tolist())["class_labels"])
        if arguments.drop_images:
            del new["images"]
        samples, features = joined(samples, new), joined(features, kept)
    else:  # one call more, which says how long it takes
        rows = evaluation.rows_of_call(0)[: model.batch_size]
        with timed(denoiser_of(pipe)) as calls, torch.no_grad():
            denoiser_of(pipe)(**evaluation.inputs(rows))
    if (arguments.checkpoint or arguments.null) and shard == 0:
        errors, guided, timesteps = eps_errors(pipe, evaluation, model.guidance)
        measured = {"eps_error": errors} | ({} if guided is None else {"guided_eps_error": guided})
        factor = np.nan if diverged else 1
        features |= {name: factor * values.cpu().numpy() for name, values in measured.items()}
        features["timesteps"] = np.array(timesteps)

    # The number of rows of one denoiser call on a whole batch; guidance doubles it.
    rows = model.batch_size * model.halves
    footprint |= {"latency_ms": 1e3 * statistics.median(calls), "batch": rows, "threads": arguments.threads}
    seeds = {"split": "evaluation", "first": SEEDS["evaluation"] + first, "n": arguments.n, "shard": arguments.shard}
    metadata = {"seeds": seeds, "job": job, "provenance": provenance()}
    if diverged:
        metadata |= {"diverged": diverged}
    else:
        # The seconds are those of all images in this file; older files have no `drawn`, and may tell of fewer.
        metadata |= {"seconds": round(before + seconds, 1), "drawn": len(samples["index"])}
        metadata |= {"footprint": footprint, "kernel": kernel}
    for output, arrays in zip(outputs, (samples, features), strict=True):
        with atomic(output) as file:
            np.savez(file, **arrays, metadata=dumps(metadata))
    print(f"{drawn} images in {seconds} s, {len(samples['index']) - drawn} were there", flush=True)
    if diverged:
        print(f"black images: {diverged}", flush=True)


if __name__ == "__main__":
    main()
