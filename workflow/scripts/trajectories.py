"""Full-precision trajectories of one model: a calibration set with activation ranges over time, or a held-out set."""

import time
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "threads", "device")
    parser.add_argument("-n", type=int, help="trajectories of the calibration set")
    parser.add_argument("--draw", type=int, default=0, help="which ones: another number, other seeds")
    parser.add_argument("--calibration", type=Path, help="file to write, seeds of the calibration split")
    parser.add_argument("-e", type=int, default=16, help="trajectories of the held-out set")
    parser.add_argument("--evaluation", type=Path, help="file to write, seeds of the evaluation split")
    parser.add_argument("--ranges", type=Path, help="CSV to write: layer_class, timestep, low, high of the calibration")
    arguments = parser.parse_args()
    if (arguments.n is None) != (arguments.calibration is None):
        parser.error("-n and --calibration: give both, or neither")
    if not (arguments.calibration or arguments.evaluation) or arguments.ranges and not arguments.calibration:
        parser.error("--calibration or --evaluation: name a file to write; --ranges are those of a calibration set")

    with command_line.imports():
        import torch

        from quest.diffusion.calibration_set import collect
        from quest.diffusion.models import SEEDS, get
        from quest.properties.distributions import activation_ranges
        from quest.runtime import gpu_lock
        from quest.runtime.files import write_rows
        from quest.runtime.provenance import provenance

    torch.set_num_threads(arguments.threads)
    gpu_lock.take(arguments.device)
    model = get(arguments.model)
    pipe = model.load(device=arguments.device)

    def write(split, n, draw, path):
        start = time.perf_counter()
        trajectories = collect(pipe, model, split, n, draw)
        metadata = {
            "model": model.name,
            "seeds": [SEEDS[split] + int(trajectories.trajectory.min()), n],
            "seconds": round(time.perf_counter() - start, 1),
            "provenance": provenance(),
        }
        trajectories.save(path, metadata)
        print(f"{split}: {n} trajectories, {len(trajectories)} denoiser inputs, {metadata['seconds']} s", flush=True)
        return trajectories

    if arguments.calibration:
        calibration = write("calibration", arguments.n, arguments.draw, arguments.calibration)
    if arguments.evaluation:
        write("evaluation", arguments.e, 0, arguments.evaluation)
    if arguments.ranges:
        rows = activation_ranges(pipe, calibration.to(arguments.device))
        write_rows(arguments.ranges, rows, rows[0])


if __name__ == "__main__":
    main()
