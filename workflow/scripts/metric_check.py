"""Compare every metric with the function of a library on the same random features: values, difference, CPU seconds.

The variances of the features fall by six orders of magnitude, as those of Inception do. It prints a Markdown table.
"""

import os
import time
import warnings

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "threads")
    parser.add_argument("-n", type=int, default=6000, help="images per set (default %(default)s)")
    parser.add_argument("-d", type=int, default=2048, help="feature dimensions (default %(default)s)")
    bootstrap = "images of a timed resample (default %(default)s)"
    parser.add_argument("--bootstrap", type=int, default=50_000, help=bootstrap)
    arguments = parser.parse_args()

    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = str(arguments.threads)  # read when numpy is imported

    import numpy as np
    import torch
    from cleanfid.fid import frechet_distance as clean_fid
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import calculate_precision_recall_full
    from torchmetrics.image.fid import _compute_fid

    from quest.metrics.frechet import Statistics, frechet_distance
    from quest.metrics.inception_score import inception_score, partition
    from quest.metrics.intervals import resample_counts, resampled_frechet
    from quest.metrics.manifold import inside

    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    scales = np.exp(-np.linspace(0, 7, arguments.d))

    def features(n, shift):
        return ((rng.normal(size=(n, arguments.d)) + shift) * scales).astype(np.float32)

    def timed(function, *values):
        start = time.process_time()
        return function(*values), time.process_time() - start

    print("| metric | against | ours | theirs | relative difference | ours [CPU s] | theirs [CPU s] |", flush=True)
    print("|---|---|---:|---:|---:|---:|---:|")

    def row(metric, against, ours, theirs, seconds, their_seconds):
        difference = abs(ours - theirs) / abs(theirs)
        numbers = f"{ours:.8g} | {theirs:.8g} | {difference:.1e} | {seconds:.2f} | {their_seconds:.2f}"
        print(f"| {metric} | {against} | {numbers} |", flush=True)

    samples, real = features(arguments.n, 0.1), features(arguments.n, 0)
    a, b = Statistics.from_features(samples), Statistics.from_features(real)
    b.root  # noqa: B018, computed before the timing, because all cells share the root of the reference
    ours, seconds = timed(frechet_distance, a, b)
    of_torch = [torch.from_numpy(x) for x in (a.mean, a.cov, b.mean, b.cov)]
    of_fidelity = [{"mu": s.mean, "sigma": s.cov} for s in (a, b)]
    row("FID", "torchmetrics", ours, *_flat(timed(_compute_fid, *of_torch), seconds))
    theirs, their_seconds = timed(fid_statistics_to_metric, *of_fidelity, False)
    row("FID", "torch-fidelity", ours, theirs["frechet_inception_distance"], seconds, their_seconds)
    row("FID", "clean-fid", ours, *_flat(timed(clean_fid, a.mean, a.cov, b.mean, b.cov), seconds))

    logits = rng.normal(size=(arguments.n, 1008)) * 2
    ours, seconds = timed(lambda: inception_score(logits, partition(arguments.n, "torch-fidelity")))
    theirs, their_seconds = timed(isc_features_to_metric, torch.from_numpy(logits))
    row("IS", "torch-fidelity", ours, theirs["inception_score_mean"], seconds, their_seconds)

    few = min(arguments.n, 1000)
    ours, seconds = timed(lambda: inside(samples[:few], real[:few]).mean())
    pair = [torch.from_numpy(x[:few]).double() for x in (samples, real)]
    theirs, their_seconds = timed(calculate_precision_recall_full, *pair)
    row(f"precision, {few} images", "torch-fidelity", ours, theirs[0], seconds, their_seconds)

    many = np.concatenate([samples] * -(-arguments.bootstrap // arguments.n))[: arguments.bootstrap]
    _, once = timed(resampled_frechet, many, b, resample_counts(len(many), 1))
    _, seconds = timed(resampled_frechet, many, b, resample_counts(len(many), 3))
    each = (seconds - once) / 2
    print(f"\nBootstrap of FID, n = {len(many)}: {once - each:.1f} CPU s once and {each:.1f} per resample", flush=True)


def _flat(answer, seconds):
    value, their_seconds = answer
    return float(value), seconds, their_seconds


if __name__ == "__main__":
    main()
