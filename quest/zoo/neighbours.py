"""Does a model copy its training pictures? The nearest training picture of each sample, by two measures.

`rms` is the root mean square difference of pixels at 16x16, from 0 to 1; `cosine` is the cosine of EfficientNet-Lite0's
1,280 features. Held-out pictures, which no model has seen, have neighbours, too. A model that does not copy has no more
samples with a very near neighbour than held-out pictures have. `rms` is compared with all training pictures, `cosine`
with KNOWN random ones.
"""

import numpy as np
import torch
from torch.nn import functional as F

from quest.metrics import lite0

SIDE = 16
KNOWN = 10_000
NEAR = 0.01  # share of held-out pictures whose neighbour counts as very near


def small(images):
    """Pictures uint8 [N, S, S, 3] averaged to 16x16, as float32 [N, 768] in [0, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return F.adaptive_avg_pool2d(x, SIDE).flatten(1)


def nearest_rms(images, training, flips=False):
    """Distance of each picture to its nearest training picture, and that one's index: float32 [N], int64 [N].

    flips: whether mirror images of training pictures count, too.
    """
    known = small(training)
    best = [torch.cdist(small(x), known).min(1) for x in ([images, images[:, :, ::-1]] if flips else [images])]
    distance, index = (torch.stack(values) for values in zip(*best, strict=True))  # [1 or 2, N] each
    first = distance.argmin(0, keepdim=True)
    return (distance.gather(0, first)[0] / known.shape[1] ** 0.5).numpy(), index.gather(0, first)[0].numpy()


def nearest_cosine(features, training):
    """Cosine of features [N, D] and those of the nearest training picture [M, D], and its index: [N] each."""
    a, b = (F.normalize(torch.from_numpy(np.asarray(x, np.float32)), dim=1) for x in (features, training))
    cosine, index = (a @ b.T).max(1)
    return cosine.numpy(), index.numpy()


def compare(images, features, shown, flips=False):
    """Compare the neighbours of samples with those of held-out pictures.

    images [N, S, S, 3] and features [N, 1280] are of samples, `shown` are the Pictures. Returns
    {measure: {samples, held out: median and the nearest of all; limit, share}}: `limit` is what the nearest 1 % of
    held-out pictures reach, and `share` is the share of samples that come nearer. Without copies, `share` is about .01.
    """
    training, unseen = shown.images[shown.rows("train")], shown.images[shown.rows("evaluation")]
    known = np.random.default_rng(0).permutation(shown.rows("train"))[:KNOWN]
    known = lite0.computed(shown.images[known], "features")[0].astype(np.float16)
    values = {
        "rms": [nearest_rms(x, training, flips)[0] for x in (images, unseen)],
        "cosine": [nearest_cosine(x, known)[0] for x in (features, lite0.computed(unseen, "features")[0])],
    }
    found = {}
    for measure, (of_samples, of_unseen) in values.items():
        sign = 1 if measure == "rms" else -1  # so that small means near
        limit = sign * np.quantile(sign * of_unseen, NEAR)
        said = {
            name: {"median": float(np.median(x)), "nearest": float(sign * (sign * x).min())}
            for name, x in (("samples", of_samples), ("held out", of_unseen))
        }
        found[measure] = said | {"limit": float(limit), "share": float((sign * of_samples < sign * limit).mean())}
    return found
