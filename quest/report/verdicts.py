"""What the paired intervals of a run say, in sentences. Needs no torch."""

from collections.abc import Iterable

import pandas as pd

from quest.metrics import METRICS
from quest.metrics.comparison import outcome
from quest.report import tables

# What verdicts speak of, where a run has it. All of these judge images. The noise-prediction error is left out: it is
# what QuEST's global loss minimizes, and a guided sampler uses another combination of the two predictions.
HEADLINE = ("latent_mse", "psnr", "fid_to_fp", "fid", "clip")
OUTCOMES = ("better", "worse", "neither", "diverged", "rival diverged")  # of a method against a rival on one model


def verdict_sentences(paired: pd.DataFrame, focus: str, over_seeds: bool = False) -> list[dict]:
    """One method against every other and against full precision, fewest bits first.

    over_seeds: whether the intervals hold the spread over quantization seeds. Only then does a sentence speak of
    methods; otherwise it speaks of the checkpoint that one seed made.
    Returns [{bits, sentences}]. One is called better on a model where the paired interval of the difference excludes
    0. Otherwise the two are called "not told apart", which does not mean that they are equal. Who has
    diverged is named.
    """
    models, by_bits = _of(focus, paired)
    found = []
    for bits, rows in by_bits:
        alike: dict[tuple, dict[str, list]] = {}
        for (versus, metric), cell in rows.groupby(["versus", "metric"], sort=False):
            if metric not in HEADLINE:
                continue
            better = cell.set_index("model")["better"].reindex(models).dropna()
            found_on = {model: outcome(name, focus) for model, name in better.items()}
            outcomes = tuple(tuple(model for model, one in found_on.items() if one == word) for word in OUTCOMES)
            group = alike.setdefault((outcomes, versus == "fp"), {})
            group.setdefault(versus, []).append(metric)
        sentences = []
        for (outcomes, _), by_rival in alike.items():
            same: dict[tuple, list] = {}
            for versus, metrics in by_rival.items():
                same.setdefault(tuple(metrics), []).append(versus)
            for metrics, rivals in same.items():
                metrics = sorted(metrics, key=HEADLINE.index)
                sentences.append(_sentence(focus, rivals, metrics, outcomes, over_seeds))
        found.append({"bits": bits, "sentences": sorted(sentences, key=lambda said: said["order"])})
    return found


def verdict_matrix(paired: pd.DataFrame, focus: str) -> list[dict]:
    """The same at a glance, fewest bits first: [{bits, models, metrics, rows}], a row for every other method.

    A row is {versus, cells}, a cell the outcome on each model, one of OUTCOMES, or None where there is none.
    """
    models, by_bits = _of(focus, paired)
    found = []
    for bits, rows in by_bits:
        metrics = [name for name in HEADLINE if name in set(rows["metric"])]
        winner = {
            tuple(key): name for *key, name in rows[["versus", "metric", "model", "better"]].itertuples(index=False)
        }
        against = [
            {
                "versus": "full precision" if versus == "fp" else versus,
                "cells": [
                    [
                        outcome(name, focus) if (name := winner.get((versus, metric, model))) else None
                        for model in models
                    ]
                    for metric in metrics
                ],
            }
            for versus in dict.fromkeys(rows["versus"])
        ]
        labels = [METRICS[name].label for name in metrics]
        found.append({"bits": bits, "focus": focus, "models": models, "metrics": labels, "rows": against})
    return found


def _of(focus, paired):
    """The models of a method, and its rows by bits, fewest first."""
    rows = paired[paired["method"] == focus]
    widths = sorted(set(rows["bits"]), key=tables.by_bits, reverse=True)
    return list(dict.fromkeys(rows["model"])), [(bits, rows[rows["bits"] == bits]) for bits in widths]


def _sentence(focus, rivals, metrics, outcomes, over_seeds):
    on = dict(zip(OUTCOMES, outcomes, strict=True))
    total = sum(map(len, outcomes))
    owner = "{}" if over_seeds else "{}'s"
    against = listed(["full precision" if rival == "fp" else owner.format(rival) for rival in rivals])
    subject = focus if over_seeds else f"{focus}'s checkpoint"
    measured = listed([METRICS[name].label.partition(" [")[0] for name in metrics])
    said = []
    for word, text in {"better": "better than", "worse": "worse than", "neither": "not told apart from"}.items():
        if on[word]:
            compared = text.rpartition(" ")[0] if said else f"{subject} is {text} {against}"
            said.append(f"{compared} {_on(on[word], total)}")
    for word, who in {"diverged": focus, "rival diverged": listed(rivals)}.items():
        said += [f"{who} diverged {_on(on[word], total)}"] if on[word] else []
    lost, won = on["worse"] or on["diverged"], on["better"] or on["rival diverged"]
    kind = "mixed" if won and lost else "better" if won else "worse" if lost else "same"
    return {
        "text": f"In {measured}, {'; '.join(said)}.",
        "kind": kind,
        "order": (rivals == ["fp"], -len(won), len(lost)),
    }


def _on(names, total):
    if total == 1:
        return f"on {names[0]}"
    if len(names) == total:
        return f"on all {total} models" if total > 2 else "on both models"
    return f"on {len(names)} of {total} models ({listed(names)})"


def listed(words: Iterable[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def seed_sentences(seeds: pd.DataFrame) -> list[dict]:
    """What holds over quantization seeds, of the pairs of methods in seeds.csv, as `verdict_sentences` has it."""
    pairs, focused = _pairs_of_seeds(seeds)
    return [verdict for focus in focused for verdict in verdict_sentences(pairs, focus, over_seeds=True)]


def seed_matrix(seeds: pd.DataFrame) -> list[dict]:
    """The last method against the others over quantization seeds, as `verdict_matrix` has it."""
    pairs, focused = _pairs_of_seeds(seeds)
    return verdict_matrix(pairs, focused[0]) if focused else []


def _pairs_of_seeds(seeds):
    pairs = seeds[seeds["versus"] != ""]
    return pairs, [name for name in reversed(dict.fromkeys(seeds["method"])) if name in set(pairs["method"])]


def comparisons(paired: pd.DataFrame) -> dict[str, int]:
    """How many pairs of quantized methods were compared, and how many of their intervals exclude 0."""
    rivals = paired[paired["versus"] != "fp"]
    outcomes = [outcome(better, method) for better, method in zip(rivals["better"], rivals["method"], strict=True)]
    told_apart = sum(found in ("better", "worse") for found in outcomes)
    return {"rows": len(rivals), "told_apart": told_apart}
