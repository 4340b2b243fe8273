"""Images of one cell, their features and, if quantized, noise-prediction errors on held-out trajectories."""

import statistics
import time
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "evaluation", "threads", "device")
    parser.add_argument("--checkpoint", type=Path, nargs="?", help="quantized denoiser; without it, full precision")
    parser.add_argument("-n", type=int, required=True, help="images of the whole cell")
    parser.add_argument("--shard", default="0/1", help="K/N: the K-th of N parts, from 0")
    parser.add_argument("--samples", type=Path, required=True, help="file to write: index, images, latents")
    parser.add_argument("--features", type=Path, required=True, help="file to write: index, features of the images")
    parser.add_argument("--drop-images", action="store_true", help="keep latents and features only")
    parser.add_argument("--kernel", default="auto", help="a name in quest.kernels.KERNELS; auto: the fastest here")
    arguments = parser.parse_args()

    import numpy as np
    import torch

    import quest
    from quest.diffusion.calibration_set import CalibrationSet
    from quest.diffusion.models import MODELS, SEEDS
    from quest.diffusion.sampling import generate, timed
    from quest.metrics.features import extract
    from quest.metrics.noise_prediction import eps_error
    from quest.quantization import cost, placement
    from quest.runtime import gpu_lock
    from quest.runtime.files import atomic, dumps
    from quest.runtime.provenance import provenance

    torch.set_num_threads(arguments.threads)
    gpu_lock.take(arguments.device)
    shard, shards = map(int, arguments.shard.split("/"))
    model = MODELS[arguments.model]
    pipe = model.load(device=arguments.device)
    evaluation = CalibrationSet.load(arguments.evaluation).to(arguments.device)
    work = cost.macs(pipe.unet, evaluation.inputs(torch.tensor([0])))
    if arguments.checkpoint:
        pipe = quest.load(pipe, arguments.checkpoint, arguments.kernel)
        placed = pipe.unet.placement
        kernel = placed._asdict() | {"deviation": placement.deviation(pipe.unet, evaluation)}
        placed_work = {"kernel": placed.kernel, "realizable": placement.realizable(pipe.unet, work)}
        footprint = pipe.unet.quantization["cost"]["footprint"] | placed_work
    else:
        footprint = cost.footprint(pipe.unet, work)
        kernel = {}

    start = time.perf_counter()
    with timed(pipe.unet) as calls:
        batches = list(generate(pipe, model, "evaluation", arguments.n, (shard, shards)))
    index, images = (np.concatenate([batch[i] for batch in batches]) for i in (0, 2))
    latents = torch.cat([batch[1] for batch in batches]).cpu().numpy()
    seconds = round(time.perf_counter() - start, 1)
    captions = model.conditions("evaluation", index.tolist()).get("prompt") if model.clip else None
    features = extract(images, model.extractor, model.clip, captions, arguments.device, model.batch_size)
    if arguments.checkpoint and shard == 0:
        errors, timesteps = eps_error(pipe, evaluation)
        features |= {"eps_error": errors.cpu().numpy(), "timesteps": np.array(timesteps)}

    # One denoiser call on a whole batch: its samples, twice as many under guidance.
    rows = model.batch_size * (2 if model.guidance > 1 else 1)
    footprint |= {"latency_ms": 1e3 * statistics.median(calls), "batch": rows, "threads": arguments.threads}
    seeds = {"split": "evaluation", "first": SEEDS["evaluation"], "n": arguments.n, "shard": arguments.shard}
    metadata = {"seeds": seeds, "seconds": seconds, "footprint": footprint, "kernel": kernel}
    metadata = dumps(metadata | {"provenance": provenance()})
    with atomic(arguments.samples) as file:
        kept = {"latents": latents} if arguments.drop_images else {"images": images, "latents": latents}
        np.savez(file, index=index, **kept, metadata=metadata)
    with atomic(arguments.features) as file:
        np.savez(file, index=index, **features, metadata=metadata)
    print(f"{len(index)} images in {seconds} s", flush=True)


if __name__ == "__main__":
    main()
