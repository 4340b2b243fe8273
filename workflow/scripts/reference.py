"""Compute statistics of real images for FID, sFID and precision, from a folder of images or an .npz.

SOURCE is a folder (with its subfolders, in the order of paths), an .npz with uint8 images `arr_0` [N, H, W, 3], or an
.npz of the guided-diffusion evaluator, whose `mu`, `sigma`, `mu_s` and `sigma_s` are copied.
"""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "file", "threads", "device")
    parser.add_argument("source", type=Path)
    parser.add_argument("--extractor", default="adm", help="network and protocol (default %(default)s)")
    parser.add_argument("--size", type=int, default=256, help="side of the images of a folder (default %(default)s)")
    parser.add_argument("-n", type=int, help="the first N images only")
    parser.add_argument("--features", type=int, default=10_000, help="images kept for precision (default %(default)s)")
    arguments = parser.parse_args()

    import torch

    from quest.metrics.reference import build
    from quest.runtime import gpu_lock

    torch.set_num_threads(arguments.threads)
    gpu_lock.take(arguments.device)
    reference = build(
        arguments.source,
        arguments.output,
        arguments.extractor,
        size=arguments.size,
        n=arguments.n,
        keep=arguments.features,
        device=arguments.device,
    )
    print(f"{arguments.output}: {reference.metadata['data']}", flush=True)


if __name__ == "__main__":
    main()
