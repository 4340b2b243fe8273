"""Sentences and a matrix that state the verdicts of a run's paired intervals. Needs no torch."""

from collections.abc import Iterable

import pandas as pd

from quest.metrics import METRICS
from quest.metrics.comparison import outcome
from quest.report import tables

# The metrics of the verdicts; all of them judge images. The noise-prediction error is left out, because QuEST's global
# loss minimizes it, and because a guided sampler uses another combination of the two predictions.
HEADLINE = ("kid_64w", "log_latent_mse", "psnr", "fid_to_fp", "fid", "agreement", "retrieval", "clip")
# For a method and a rival on one model; "flag": it seems better than full precision, so the metric errs.
OUTCOMES = ("better", "worse", "neither", "flag", "diverged", "rival diverged")


def verdict_sentences(paired: pd.DataFrame, focus: str, over_seeds: bool = False) -> list[dict]:
    """Compare the method `focus` with every other method and with full precision, fewest bits first.

    paired: the frame of paired.csv. over_seeds: whether its intervals contain the spread over quantization seeds. Only
    then do the sentences speak about methods; otherwise they speak about the checkpoint of one seed.
    Returns [{bits, sentences}], where a sentence is {text, kind, order}. A method is better on a model if the paired
    interval of the difference excludes 0. Otherwise the two are "not told apart", which does not mean that they are
    equal. A sentence names the methods that diverged.
    """
    models, by_bits = _rows_of(focus, paired)
    verdicts = []
    for bits, rows in by_bits:
        alike: dict[tuple, dict[str, list]] = {}
        for (versus, metric), cell in rows.groupby(["versus", "metric"], sort=False):
            if metric not in HEADLINE:
                continue
            better = cell.set_index("model")["better"].reindex(models).dropna()
            outcome_on = {model: outcome(name, focus) for model, name in better.items()}
            outcomes = tuple(tuple(model for model, one in outcome_on.items() if one == word) for word in OUTCOMES)
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
        verdicts.append({"bits": bits, "sentences": sorted(sentences, key=lambda sentence: sentence["order"])})
    return verdicts


def verdict_matrix(paired: pd.DataFrame, focus: str) -> list[dict]:
    """Return the same verdicts as a matrix, [{bits, focus, models, metrics, rows}], fewest bits first.

    There is a row {versus, cells} for every other method, and a cell for every metric. A cell is a list: for each model
    the outcome, one of OUTCOMES, or None if nothing was measured.
    """
    models, by_bits = _rows_of(focus, paired)
    matrices = []
    for bits, rows in by_bits:
        metrics = [name for name in HEADLINE if name in set(rows["metric"])]
        better = rows.set_index(["versus", "metric", "model"])["better"]
        outcomes = {key: outcome(name, focus) for key, name in better.items()}
        rivals = []
        for versus in dict.fromkeys(rows["versus"]):
            cells = [[outcomes.get((versus, metric, model)) for model in models] for metric in metrics]
            rivals.append({"versus": "full precision" if versus == "fp" else versus, "cells": cells})
        labels = [METRICS[name].label for name in metrics]
        matrices.append({"bits": bits, "focus": focus, "models": models, "metrics": labels, "rows": rivals})
    return matrices


def _rows_of(focus, paired):
    """Return the models of a method, and its rows by bits, fewest bits first."""
    rows = paired[paired["method"] == focus]
    widths = sorted(set(rows["bits"]), key=tables.by_bits, reverse=True)
    return list(dict.fromkeys(rows["model"])), [(bits, rows[rows["bits"] == bits]) for bits in widths]


def _sentence(focus, rivals, metrics, outcomes, over_seeds):
    models_with = dict(zip(OUTCOMES, outcomes, strict=True))
    total = sum(map(len, outcomes))
    owner = "{}" if over_seeds else "{}'s"
    against = listed(["full precision" if rival == "fp" else owner.format(rival) for rival in rivals])
    subject = focus if over_seeds else f"{focus}'s checkpoint"
    measured = listed([METRICS[name].label.partition(" [")[0] for name in metrics])
    clauses = []
    for word, text in {"better": "better than", "worse": "worse than", "neither": "not told apart from"}.items():
        if models_with[word]:
            predicate = text.rpartition(" ")[0] if clauses else f"{subject} is {text} {against}"
            clauses.append(f"{predicate} {_on(models_with[word], total)}")
    if models_with["flag"]:
        predicate = "beyond" if clauses else f"{subject} is beyond full precision"
        clauses.append(f"{predicate} {_on(models_with['flag'], total)}, which says that the metric errs")
    for word, who in {"diverged": focus, "rival diverged": listed(rivals)}.items():
        clauses += [f"{who} diverged {_on(models_with[word], total)}"] if models_with[word] else []
    lost = models_with["worse"] or models_with["diverged"]
    won = models_with["better"] or models_with["rival diverged"]
    kind = "mixed" if won and lost else "better" if won else "worse" if lost else "same"
    return {
        "text": f"In {measured}, {'; '.join(clauses)}.",
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
    """Join words to "a", "a and b" or "a, b and c"."""
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def seed_sentences(seeds: pd.DataFrame) -> list[dict]:
    """Return `verdict_sentences` of all pairs of methods in seeds.csv, which hold over quantization seeds."""
    pairs, focused = _pairs_of_seeds(seeds)
    return [verdict for focus in focused for verdict in verdict_sentences(pairs, focus, over_seeds=True)]


def seed_matrix(seeds: pd.DataFrame) -> list[dict]:
    """Return the `verdict_matrix` of the last method in seeds.csv, which holds over quantization seeds."""
    pairs, focused = _pairs_of_seeds(seeds)
    return verdict_matrix(pairs, focused[0]) if focused else []


def _pairs_of_seeds(seeds):
    pairs = seeds[seeds["versus"] != ""]
    return pairs, [name for name in reversed(dict.fromkeys(seeds["method"])) if name in set(pairs["method"])]


def comparisons(paired: pd.DataFrame) -> dict[str, int]:
    """Count the comparisons of two quantized methods, and those whose interval excludes 0."""
    rivals = paired[paired["versus"] != "fp"]
    outcomes = [outcome(better, method) for better, method in zip(rivals["better"], rivals["method"], strict=True)]
    return {"rows": len(rivals), "told_apart": sum(one in ("better", "worse") for one in outcomes)}
