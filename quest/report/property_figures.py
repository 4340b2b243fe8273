"""Figures of the properties of denoisers: sensitivity, time embeddings, distributions and Taylor steps.

They are drawn from the tables of quest.report.properties and quest.report.evidence. This module needs no torch.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from quest.report.style import COLOURS, INK, RULE, error_bars, legend, log_axis, log_ticks, look, plain, save, subplots


def sensitivity(frame: pd.DataFrame, path: str | Path) -> None:
    """Draw the noise-prediction error with one class of layers at few bits, beside the shares of that class.

    Each model has a panel. frame: columns model, bits, layer_class, lowered, value, low, high, n, parameters, macs. The
    classes are sorted by their mean error over models.
    """
    frame = frame[frame["layer_class"] != "all"]
    models, kinds = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["lowered"]))
    order = np.log(frame[frame["lowered"] == "activations"].set_index("layer_class")["value"]).groupby(level=0).mean()
    classes = order.sort_values().index.tolist()
    size, widths = (2.2 + 3.6 * len(models), 1.4 + 0.36 * len(classes)), [3, 1.2] * len(models)
    figure, ((*panels,),) = subplots(1, 2 * len(models), size, sharey=True, width_ratios=widths)
    for column, model in enumerate(models):
        errors, shares = panels[2 * column : 2 * column + 2]
        of_model = frame[frame["model"] == model]
        for place, kind in enumerate(kinds):
            points = of_model[of_model["lowered"] == kind].set_index("layer_class").reindex(classes)
            y = np.arange(len(classes)) + 0.2 * (place - (len(kinds) - 1) / 2)
            error_bars(errors, y, points, horizontal=True, floor=True, capsize=0, label=kind, **look(place))
        errors.set_xscale("log")
        errors.set_yticks(range(len(classes)), classes)
        errors.set_title(f"{model}, {of_model['bits'].iloc[0].upper()}, n = {of_model['n'].iloc[0]}", fontsize=9)
        share = of_model.drop_duplicates("layer_class").set_index("layer_class").reindex(classes)
        for place, (name, label) in enumerate((("parameters", "parameters"), ("macs", "multiply-accumulates"))):
            y = np.arange(len(classes)) + 0.2 * (2 * place - 1)
            shares.barh(y, 100 * share[name], 0.36, color=COLOURS[4 + place], label=f"share of {label}")
        shares.set_title("share [%]", fontsize=9)
        for axes in (errors, shares):
            plain(axes)
            axes.grid(axis="x", color=RULE, lw=0.6)
    label = "relative squared error of the noise prediction, one class quantized, the rest in float"
    figure.supxlabel(label, fontsize=9)
    legend(figure, panels, 2 * len(models))
    save(figure, path)


def temporal(errors: pd.DataFrame, embeddings: pd.DataFrame, path: str | Path) -> None:
    """Draw the effect of quantizing the time-embedding path, a column per model.

    The upper panels show noise-prediction errors with their intervals; errors: columns model, bits, quantized, ranges,
    value, low, high, n. The lower panels show how far the embedding of each timestep moves, and its distance to the
    embedding of the next timestep; embeddings: columns model, ranges, timestep, error, apart.
    """
    models, parts = (list(dict.fromkeys(errors[column])) for column in ("model", "quantized"))
    figure, panels = subplots(2, len(models), (1 + 3.2 * len(models), 5.6), sharey="row")
    for column, model in enumerate(models):
        axes, of_model = panels[0, column], errors[errors["model"] == model]
        for place, kind in enumerate(dict.fromkeys(errors["ranges"])):
            points = of_model[of_model["ranges"] == kind].set_index("quantized").reindex(parts)
            x, style = np.arange(len(parts)) + 0.2 * place - 0.1, look(place) | {"label": kind}
            error_bars(axes, x, points, ms=5, elinewidth=1.4, capsize=2.5, **style)
        log_axis(axes, errors["value"])
        axes.set_xticks(range(len(parts)), [text.replace(" time", "\ntime") for text in parts])
        axes.set_xlim(-0.5, len(parts) - 0.5)
        axes.set_title(f"{model}, {of_model['bits'].iloc[0].upper()}, n = {of_model['n'].iloc[0]}", fontsize=9)
        axes = panels[1, column]
        of_model = embeddings[embeddings["model"] == model]
        for place, kind in enumerate(dict.fromkeys(embeddings["ranges"])):
            points = of_model[of_model["ranges"] == kind]
            axes.plot(points["timestep"], points["error"], label=kind, ms=3, lw=1.2, **look(place))
        style = dict(color="black", lw=1.6, label="to the next timestep, full precision")
        axes.plot(points["timestep"], points["apart"], **style)
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
    """Draw distributions of the layers' inputs: a row per model, a column per class of layers, a line per denoiser.

    models: the contents of activations.json, {model, bits, edges, denoisers: {name: {class: {histogram, ...}}}}.
    """
    classes = list(dict.fromkeys(c for m in models for c in m["denoisers"]["full precision"]))
    size = (0.8 + 2 * len(classes), 0.8 + 1.8 * len(models))
    figure, panels = subplots(len(models), len(classes), size, sharex=True, sharey=True)
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
    label = "input of a layer, in standard deviations of full precision (beyond 20: in the last bin)"
    figure.supxlabel(label, fontsize=9)
    legend(figure, panels.flat)
    save(figure, path)


def imbalance(frame: pd.DataFrame, path: str | Path) -> None:
    """Draw statistics of the layers' inputs by class: a row per model, a column per statistic, a point per denoiser.

    frame: columns model, layer_class, denoiser, statistic, value, low, high, n.
    """
    models, names = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["statistic"]))
    classes = list(dict.fromkeys(frame["layer_class"]))[::-1]
    size = (2.2 + 3.1 * len(names), 0.9 + 0.3 * len(classes) * len(models))
    figure, panels = subplots(len(models), len(names), size, sharey=True, sharex="col")
    for row, model in enumerate(models):
        for axes, name in zip(panels[row], names, strict=True):
            for place, (denoiser, colour) in enumerate(DENOISERS.items()):
                chosen = (frame["model"] == model) & (frame["statistic"] == name) & (frame["denoiser"] == denoiser)
                points = frame[chosen].set_index("layer_class").reindex(classes)
                y, style = np.arange(len(classes)) - 0.2 * (place - 1), look(place) | {"color": colour}
                error_bars(axes, y, points, horizontal=True, elinewidth=1.2, capsize=0, label=denoiser, **style)
            plain(axes)
            axes.set_xscale("log")
            log_ticks(axes.xaxis, (1, 2, 5))
            axes.grid(axis="x", color=RULE, lw=0.6)
            axes.set_yticks(range(len(classes)), classes)
            axes.set_title(f"{name}, {model}", fontsize=9)
    legend(figure, panels.flat)
    save(figure, path)


def taylor(frame: pd.DataFrame, path: str | Path, title: str = "") -> None:
    """Draw the remainder of Taylor steps against bits: that of the output on the left, that of the loss on the right.

    frame: columns bits, what (see quest.properties.taylor.remainders), value, low, high.
    """
    panels_of = {
        "of the output's change": {"first": "first-order step", "second": "second-order step"},
        "of the loss": {"loss, 1 step": "one second-order step", "loss, 4 steps": "four, each with its gradient"},
    }
    figure, ((*panels,),) = subplots(1, 2, (7.2, 3.2), sharey=True)
    for axes, (whole, names) in zip(panels, panels_of.items(), strict=True):
        for place, (remainder, label) in enumerate(names.items()):
            points = frame[frame["what"] == remainder].sort_values("bits")
            style = look(place) | {"lw": 1.3, "ls": "-", "elinewidth": 1.2, "label": label}
            error_bars(axes, points["bits"], points, floor=True, **style)
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
    """Draw one-dimensional samples, {label: [signals, length]}: a row per label, a column per class.

    The first row shows data and the second one full precision. In the other rows a thin line repeats full precision,
    which started from the same noise.
    """
    size = (1.1 + 1.5 * len(classes), 0.5 + 0.95 * len(rows))
    figure, panels = subplots(len(rows), len(classes), size, sharex=True, sharey=True)
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
            axes.spines[:].set_visible(False)
        panels[place, 0].set_ylabel(label, fontsize=8)
    save(figure, path)
