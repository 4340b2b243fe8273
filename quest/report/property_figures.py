"""Figures of what was measured on the denoisers themselves: sensitivity, time embeddings, distributions, Taylor steps.

Drawn from the tables of quest.report.properties and quest.report.questions. Needs no torch and no display.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from quest.report.style import COLOURS, DPI, INK, MARKERS, RULE, legend, log_axis, log_ticks, plain, save


def sensitivity(frame: pd.DataFrame, path: str | Path) -> None:
    """Noise-prediction error with one class of layers at few bits, a panel per model, beside the class's shares.

    `frame` has columns model, bits, layer_class, lowered, value, low, high, n, parameters, macs. Classes are in the
    order of their mean error over models.
    """
    frame = frame[frame["layer_class"] != "all"]
    models, kinds = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["lowered"]))
    order = np.log(frame[frame["lowered"] == "activations"].set_index("layer_class")["value"]).groupby(level=0).mean()
    classes = order.sort_values().index.tolist()
    figure = Figure(figsize=(2.2 + 3.6 * len(models), 1.4 + 0.36 * len(classes)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2 * len(models), squeeze=False, sharey=True, width_ratios=[3, 1.2] * len(models))[0]
    for column, model in enumerate(models):
        errors, shares = panels[2 * column : 2 * column + 2]
        of_model = frame[frame["model"] == model]
        for place, kind in enumerate(kinds):
            points = of_model[of_model["lowered"] == kind].set_index("layer_class").reindex(classes)
            y = np.arange(len(classes)) + 0.2 * (place - (len(kinds) - 1) / 2)
            low = points["low"].clip(lower=points["value"] / 10)
            style = dict(fmt=MARKERS[place], color=COLOURS[place], ms=4, lw=0, elinewidth=1.3, label=kind)
            errors.errorbar(points["value"], y, xerr=[points["value"] - low, points["high"] - points["value"]], **style)
        errors.set_xscale("log")
        errors.set_yticks(range(len(classes)), classes)
        errors.set_title(f"{model}, {of_model['bits'].iloc[0].upper()}, n = {of_model['n'].iloc[0]}", fontsize=9)
        share = of_model.drop_duplicates("layer_class").set_index("layer_class").reindex(classes)
        for place, (name, what) in enumerate((("parameters", "parameters"), ("macs", "multiply-accumulates"))):
            y = np.arange(len(classes)) + 0.2 * (2 * place - 1)
            shares.barh(y, 100 * share[name], 0.36, color=COLOURS[4 + place], label=f"share of {what}")
        shares.set_title("share [%]", fontsize=9)
        for axes in (errors, shares):
            plain(axes)
            axes.grid(axis="x", color=RULE, lw=0.6)
    figure.supxlabel(
        "relative squared error of the noise prediction, one class quantized, the rest in float", fontsize=9
    )
    legend(figure, panels, 2 * len(models))
    save(figure, path)


def temporal(errors: pd.DataFrame, embeddings: pd.DataFrame, path: str | Path) -> None:
    """What quantizing the time-embedding path does, a column per model.

    Above, noise-prediction errors with their intervals (columns model, bits, quantized, ranges, value, low, high, n);
    below, how far each timestep's embedding moves, against the distance to the next timestep's (model, ranges,
    timestep, error, apart).
    """
    models = list(dict.fromkeys(errors["model"]))
    what, kinds = list(dict.fromkeys(errors["quantized"])), list(dict.fromkeys(embeddings["ranges"]))
    figure = Figure(figsize=(1 + 3.2 * len(models), 5.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, len(models), squeeze=False, sharey="row")
    for column, model in enumerate(models):
        axes, of_model = panels[0, column], errors[errors["model"] == model]
        for place, kind in enumerate(dict.fromkeys(errors["ranges"])):
            points = of_model[of_model["ranges"] == kind].set_index("quantized").reindex(what)
            spread = [points["value"] - points["low"], points["high"] - points["value"]]
            style = dict(fmt=MARKERS[place], color=COLOURS[place], ms=5, lw=0, elinewidth=1.4, capsize=2.5)
            axes.errorbar(np.arange(len(what)) + 0.2 * place - 0.1, points["value"], spread, label=kind, **style)
        log_axis(axes, errors["value"])
        axes.set_xticks(range(len(what)), [text.replace(" time", "\ntime") for text in what])
        axes.set_xlim(-0.5, len(what) - 0.5)
        axes.set_title(f"{model}, {of_model['bits'].iloc[0].upper()}, n = {of_model['n'].iloc[0]}", fontsize=9)
        axes = panels[1, column]
        of_model = embeddings[embeddings["model"] == model]
        for place, kind in enumerate(kinds):
            points = of_model[of_model["ranges"] == kind]
            style = dict(color=COLOURS[place], marker=MARKERS[place], ms=3, lw=1.2)
            axes.plot(points["timestep"], points["error"], label=kind, **style)
        axes.plot(
            points["timestep"], points["apart"], color="black", lw=1.6, label="to the next timestep, full precision"
        )
        log_axis(axes, embeddings[["error", "apart"]].stack())
        axes.set_xlim(embeddings["timestep"].max() + 15, embeddings["timestep"].min() - 15)
        axes.set_xlabel("timestep (noise to image)", fontsize=8)
        for panel in panels[:, column]:
            plain(panel)
    panels[0, 0].set_ylabel("noise-prediction error", fontsize=9)
    panels[1, 0].set_ylabel("distance of embeddings", fontsize=9)
    legend(figure, panels.flat, 2 * len(models))
    save(figure, path)


DENOISERS = {"full precision": "black", "before finetuning": COLOURS[1], "after finetuning": COLOURS[0]}


def histograms(models: Sequence[dict], path: str | Path) -> None:
    """Distributions of the layers' inputs: a row per model, a panel per class of layers, a line per denoiser.

    models: contents of activations.json, {model, bits, edges, denoisers: {name: {class: {histogram, ...}}}}.
    """
    classes = list(dict.fromkeys(c for m in models for c in m["denoisers"]["full precision"]))
    figure = Figure(figsize=(0.8 + 2 * len(classes), 0.8 + 1.8 * len(models)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(models), len(classes), squeeze=False, sharex=True, sharey=True)
    for row, model in enumerate(models):
        for axes, layer_class in zip(panels[row], classes, strict=True):
            if layer_class not in model["denoisers"]["full precision"]:
                axes.set_axis_off()
                continue
            for name, colour in DENOISERS.items():
                shares = np.array(model["denoisers"][name][layer_class]["histogram"])
                axes.stairs(shares, model["edges"], color=colour, lw=1.1, label=name)
            axes.set_yscale("log")
            axes.set_ylim(1e-7, 1)
            axes.set_title(layer_class, fontsize=8)
            plain(axes)
        panels[row, 0].set_ylabel(f"{model['model']}\nshare of values", fontsize=8)
    figure.supxlabel(
        "input of a layer, in standard deviations of full precision (beyond 20: in the last bin)", fontsize=9
    )
    legend(figure, panels.flat)
    save(figure, path)


def imbalance(frame: pd.DataFrame, path: str | Path) -> None:
    """Statistics of the layers' inputs by class: a row per model, a column per statistic, a point per denoiser.

    `frame` has columns model, layer_class, denoiser, statistic, value, low, high, n.
    """
    models, names = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["statistic"]))
    classes = list(dict.fromkeys(frame["layer_class"]))[::-1]
    size = (2.2 + 3.1 * len(names), 0.9 + 0.3 * len(classes) * len(models))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    panels = figure.subplots(len(models), len(names), squeeze=False, sharey=True, sharex="col")
    for row, model in enumerate(models):
        for axes, name in zip(panels[row], names, strict=True):
            for place, (denoiser, colour) in enumerate(DENOISERS.items()):
                chosen = (frame["model"] == model) & (frame["statistic"] == name) & (frame["denoiser"] == denoiser)
                points = frame[chosen].set_index("layer_class").reindex(classes)
                spread = [points["value"] - points["low"], points["high"] - points["value"]]
                y = np.arange(len(classes)) - 0.2 * (place - 1)
                style = dict(fmt=MARKERS[place], color=colour, ms=4, lw=0, elinewidth=1.2, label=denoiser)
                axes.errorbar(points["value"], y, xerr=spread, **style)
            plain(axes)
            axes.set_xscale("log")
            log_ticks(axes.xaxis, (1, 2, 5))
            axes.grid(axis="x", color=RULE, lw=0.6)
            axes.set_yticks(range(len(classes)), classes)
            axes.set_title(f"{name}, {model}", fontsize=9)
    legend(figure, panels.flat)
    save(figure, path)


def taylor(frame: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """What Taylor steps leave over against bits: of the output on the left, of the loss on the right.

    `frame` has columns bits, what (see quest.properties.taylor.remainders), value, low, high.
    """
    panels_of = {
        "of the output's change": {"first": "first-order step", "second": "second-order step"},
        "of the loss": {"loss, 1 step": "one second-order step", "loss, 4 steps": "four, each with its gradient"},
    }
    figure = Figure(figsize=(7.2, 3.2), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (whole, names) in zip(panels, panels_of.items(), strict=True):
        for place, (what, label) in enumerate(names.items()):
            points = frame[frame["what"] == what].sort_values("bits")
            low = points["low"].clip(lower=points["value"] / 10)
            spread = [points["value"] - low, points["high"] - points["value"]]
            style = dict(marker=MARKERS[place], color=COLOURS[place], ms=4, lw=1.3, elinewidth=1.2, capsize=2)
            axes.errorbar(points["bits"], points["value"], spread, label=label, **style)
        log_axis(axes, frame["value"])
        axes.axhline(1, color=INK, lw=0.6)
        axes.invert_xaxis()
        axes.set_xlabel("bits of weights and layer inputs", fontsize=9)
        axes.set_title(f"left over, as a share {whole}", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
        plain(axes)
    if title:
        figure.suptitle(title, fontsize=9)
    save(figure, path)


def signals(rows: dict[str, Sequence], classes: Sequence[str], path: str | Path) -> None:
    """One-dimensional samples, {label: [signals, length]}: a row per label, a column per class.

    The first row is of data, the second of full precision, which stands thin behind the others, drawn from the same
    noise.
    """
    figure = Figure(figsize=(1.1 + 1.5 * len(classes), 0.5 + 0.95 * len(rows)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(rows), len(classes), squeeze=False, sharex=True, sharey=True)
    for place, (label, values) in enumerate(rows.items()):
        for axes, value, name in zip(panels[place], values, classes, strict=True):
            axes.plot(value, color="black" if place < 2 else COLOURS[(place - 2) % len(COLOURS)], lw=1)
            if place >= 2:
                exact = list(rows.values())[1][list(classes).index(name)]
                axes.plot(exact, color="black", lw=0.5, alpha=0.5)
            if place == 0:
                axes.set_title(name, fontsize=8)
            axes.set_xticks([])
            axes.set_yticks([])
            for side in ("top", "right", "bottom", "left"):
                axes.spines[side].set_visible(False)
        panels[place, 0].set_ylabel(label, fontsize=8)
    save(figure, path)
