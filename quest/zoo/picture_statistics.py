"""Statistics of photographs or emoji under EfficientNet-Lite0: whitened components and reference statistics.

The components come from pictures of the training split; the reference from those of the reference split. Both files
hold features and moments only, no pictures. A third file has captions of the training split, for sampling.
"""

from pathlib import Path

import numpy as np
import torch

from quest.diffusion.models import EMOJI_LINES
from quest.metrics import lite0
from quest.metrics.frechet import Statistics, save_reference
from quest.runtime import command_line
from quest.runtime.download import sha256_of
from quest.runtime.files import atomic, write_lines
from quest.runtime.provenance import provenance
from quest.zoo import pictures

FITTED = 5000  # training pictures that the components are fitted to
SOURCES = {"photos": "CIFAR-10", "emoji": "Noto Emoji, Twemoji and Fluent Emoji"}


def components(kind, shown):
    """Fit the components to FITTED random training pictures; returns (Whitening, what they were fitted to)."""
    rows = shown.rows("train")
    rows = np.sort(np.random.default_rng(0).permutation(rows)[:FITTED])
    said = f"{len(rows)} pictures of the training split of {SOURCES[kind]}"
    return lite0.Whitening.fit(lite0.computed(shown.images[rows], "features")[0]), said


def reference(kind, shown, components_file, path):
    """Write the reference statistics, which belong to the components in a file."""
    features, spatial = lite0.computed(shown.images[shown.rows("reference")], "features", "spatial")
    whitening = lite0.Whitening.load(components_file)
    pool = whitening(features)
    metadata = {
        "data": f"{len(pool)} pictures of the reference split of {SOURCES[kind]}; features only",
        "extractor": f"lite0-{kind}",
        "extractor_sha256": sha256_of(components_file),
        "provenance": provenance(),
    }
    with atomic(path) as temporary:
        save_reference(temporary, *map(Statistics.from_features, (pool, spatial)), metadata, pool)


def captions(shown):
    """Captions to sample with: of the training split, drawn without repetition, concepts evenly; [] for photographs."""
    if not shown.captions:
        return []
    rows = shown.rows("train")
    weights = pictures.concept_weights([shown.concepts[i] for i in rows])
    count = max(end for _, end in EMOJI_LINES.values())
    return [shown.captions[i] for i in np.random.default_rng(0).choice(rows, count, replace=False, p=weights)]


def main():
    parser = command_line.parser(__doc__, "file", "threads")
    parser.add_argument("kind", choices=pictures.LOADERS)
    parser.add_argument("--data", type=Path, required=True, help="data file (.npz), or folder of CIFAR-10")
    parser.add_argument("--components", type=Path, required=True, help="file of the whitened components to write")
    parser.add_argument("--captions", type=Path, required=True, help="text file of captions to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shown = pictures.load(arguments.kind, arguments.data)
    with atomic(arguments.captions) as temporary:
        write_lines(temporary, captions(shown))
    whitening, said = components(arguments.kind, shown)
    with atomic(arguments.components) as temporary:
        whitening.save(temporary, {"data": said, "network_sha256": lite0.SHA256})
    reference(arguments.kind, shown, arguments.components, arguments.output)


if __name__ == "__main__":
    main()
