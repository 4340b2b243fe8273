"""One-dimensional signals, drawn by numpy alone: data for a denoiser of something other than images.

A signal of 64 values belongs to one of eight classes, kind x pace: a chirp, a train of pulses, a sum of tones, or
steps; slow or fast. Its phase, position and size are random, and a weak slow wave is added. Signal i of a split does
not depend on how many are drawn.
"""

from dataclasses import dataclass

import numpy as np

WAVEFORMS = ("chirp", "pulses", "tones", "steps")
PACES = ("slow", "fast")
CLASSES = tuple(f"{pace} {kind}" for kind in WAVEFORMS for pace in PACES)
LENGTH = 64
SPLITS = ("train", "validation", "calibration", "evaluation")


@dataclass
class Signals:
    labels: np.ndarray  # [n], an index into CLASSES
    values: np.ndarray  # [n, LENGTH] float32, about zero mean and unit variance over all classes


def draw(split: str, n: int, start: int = 0) -> Signals:
    """Signals start .. start + n - 1 of a split; classes take turns. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    labels = np.arange(start, start + n) % len(CLASSES)
    values = [_signal(label, np.random.default_rng([SPLITS.index(split), start + i])) for i, label in enumerate(labels)]
    return Signals(labels, np.array(values, np.float32).reshape(n, LENGTH))


def _signal(label, rng):
    t = np.arange(LENGTH) / LENGTH
    kind, fast = WAVEFORMS[label // len(PACES)], label % len(PACES)
    phase, size = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.2)
    if kind == "chirp":
        low = rng.uniform(4, 5) if fast else rng.uniform(1, 2)
        high = low + (rng.uniform(6, 8) if fast else rng.uniform(2, 3))
        wave = np.sqrt(2) * np.sin(2 * np.pi * (low * t + (high - low) * t**2 / 2) + phase)
    elif kind == "pulses":
        count, width = (8, 0.02) if fast else (3, 0.05)
        places = (np.arange(count) + rng.uniform(0, 1)) / count
        distance = np.abs(t[:, None] - places)
        distance = np.minimum(distance, 1 - distance)
        wave = 2.5 * np.exp(-((distance / width) ** 2) / 2).sum(1) - 0.8
    elif kind == "tones":
        first = rng.uniform(6, 7) if fast else rng.uniform(2, 3)
        wave = np.sin(2 * np.pi * first * t + phase) + np.sin(2 * np.pi * 1.5 * first * t + rng.uniform(0, 2 * np.pi))
    else:
        edges = np.sort(rng.uniform(0, 1, 9 if fast else 3))
        wave = np.where(np.searchsorted(edges, t) % 2, 1.0, -1.0) * rng.choice([-1, 1])
    return size * wave + 0.2 * np.sin(2 * np.pi * t + rng.uniform(0, 2 * np.pi))
