"""Figures of a run, drawn from its tables and samples. Needs no torch and no display."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from quest.files import atomic
from quest.metrics import METRICS
from quest.report.tables import by_bits

# Okabe and Ito's palette, told apart with any colour vision; shapes say it a second time. Full precision is black.
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442"]
MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
GLYPHS = "●■◆▲▼✚✖"  # the same in a line of text
DPI = 150
INK = "#333333"
RULE = "#dddddd"
AGAINST = {"bits": "bits", "size_mb": "size of the denoiser [MB]", "tbops": "TBOPs per denoiser call"}


def sample_grid(rows: Sequence[tuple[str, np.ndarray]], path: str | Path, title: str = "", scale: int = 2) -> None:
    """Rows of (label, images uint8 [N, H, W, 3]): column i is one seed, so what changes down a column is the method.

    Every pixel is drawn as scale x scale pixels, without smoothing.
    """
    shapes = {images.shape for _, images in rows}
    if len(shapes) != 1:
        raise ValueError(f"rows of a sample grid need images of one shape, got {sorted(shapes)}")
    n, height, width, _ = rows[0][1].shape
    gap, margin, head = 4, 12, 44 if title else 12
    label = 24 + max(12 * max(len(line) for line in text.split("\n")) for text, _ in rows)
    full = label + n * (width * scale + gap) + margin
    tall = head + len(rows) * (height * scale + gap) + margin
    figure = Figure(figsize=(full / DPI, tall / DPI), dpi=DPI)
    for row, (text, images) in enumerate(rows):
        bottom = tall - head - (row + 1) * (height * scale + gap)
        middle = (bottom + height * scale / 2) / tall
        figure.text((label - 14) / full, middle, text, ha="right", va="center", fontsize=8, color=INK)
        for column, image in enumerate(images):
            left = label + column * (width * scale + gap)
            axes = figure.add_axes((left / full, bottom / tall, width * scale / full, height * scale / tall))
            axes.imshow(image, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
    if title:
        figure.text(label / full, 1 - head / 2 / tall, title, ha="left", va="center", fontsize=9, color=INK)
    _save(figure, path)


def metric_vs_bits(main: pd.DataFrame, metric: str, path: str | Path) -> None:
    """A metric with its 95 % intervals against bits, a panel per model, from the frame of main.csv.

    Full precision, where it has the metric, is a line with its interval as a band.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: {metric!r} is not one of {', '.join(METRICS)}")
    frame = main[main["metric"] == metric]
    if frame.empty:
        raise ValueError(f"no row of metric {metric!r} to draw")
    models = list(dict.fromkeys(frame["model"]))
    methods = [method for method in dict.fromkeys(frame["method"]) if method != "fp"]
    bits = sorted(set(frame.loc[frame["method"] != "fp", "bits"]), key=by_bits)
    figure = Figure(figsize=(1.2 + 2.9 * len(models), 3.3), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    logarithmic = _spans_decades(frame["value"])
    for axes, model in zip(panels, models, strict=True):
        of_model = frame[frame["model"] == model]
        for row in of_model[of_model["method"] == "fp"].itertuples():
            axes.axhspan(row.low, row.high, color="black", alpha=0.12, lw=0)
            axes.axhline(row.value, color="black", lw=1, label="full precision")
        for place, method in enumerate(methods):
            points = of_model[of_model["method"] == method].set_index("bits").reindex(bits)
            x = np.arange(len(bits)) + 0.18 * (place - (len(methods) - 1) / 2)
            error = [points["value"] - points["low"], points["high"] - points["value"]]
            axes.errorbar(
                x,
                points["value"],
                error,
                fmt=MARKERS[place % len(MARKERS)],
                color=COLOURS[place % len(COLOURS)],
                ms=5,
                lw=0,
                elinewidth=1.4,
                capsize=2.5,
                label=method,
            )
        axes.set_xticks(range(len(bits)), [text.upper() for text in bits])
        axes.set_xlim(-0.5, len(bits) - 0.5)
        if logarithmic:
            _log_axis(axes, of_model["value"])
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        sizes = ", ".join(str(n) for n in sorted(set(of_model["n"])))
        axes.set_title(f"{model}, n = {sizes}", fontsize=9)
        _plain(axes)
    panels[0].set_ylabel(_axis_label(metric, frame), fontsize=9)
    _legend(figure, panels)
    _save(figure, path)


def quality(main: pd.DataFrame, model: str, metric: str, against: str) -> str:
    """A metric of one model with its 95 % intervals against `against` (a key of AGAINST), as an <svg> element.

    It is drawn in `currentColor` and the property `--rule`, so it takes the colours of the page it stands in; its text
    stays text. `main` is the frame of main.csv; of full precision there is a line with its interval as a band, against
    bits, and a point elsewhere. Raises ValueError for a metric that the model lacks.
    """
    frame = main.assign(tbops=main["bops"] / 1e12)
    methods = [method for method in dict.fromkeys(frame["method"]) if method != "fp"]
    bits = sorted(set(frame.loc[frame["method"] != "fp", "bits"]), key=by_bits)
    frame = frame[(frame["model"] == model) & (frame["metric"] == metric)]
    if frame.empty:
        raise ValueError(f"{model} has no row of metric {metric!r} to draw")
    figure = Figure(figsize=(3.5, 2.6))
    axes = figure.add_axes((0.14, 0.1, 0.84, 0.8) if against == "bits" else (0.14, 0.18, 0.84, 0.72))
    for row in frame[frame["method"] == "fp"].itertuples():
        if against == "bits":
            axes.axhspan(row.low, row.high, color="black", alpha=0.12, lw=0)
            axes.axhline(row.value, color="black", lw=1)
        else:
            error = [[row.value - row.low], [row.high - row.value]]
            axes.errorbar(getattr(row, against), row.value, error, fmt="_", color="black", capsize=2.5)
    for place, method in enumerate(methods):
        points = frame[frame["method"] == method].set_index("bits").reindex(bits)
        x = np.arange(len(bits)) + 0.15 * (place - (len(methods) - 1) / 2) if against == "bits" else points[against]
        error = [points["value"] - points["low"], points["high"] - points["value"]]
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        axes.errorbar(x, points["value"], error, fmt=marker, color=colour, ms=4.5, lw=0, elinewidth=1.2, capsize=2)
        if against == "tbops":  # weights alone make the size, so a line there would go straight down
            axes.plot(x, points["value"], color=colour, lw=0.8, alpha=0.6)
    if against == "bits":
        axes.set_xticks(range(len(bits)), [text.upper() for text in bits])
        axes.set_xlim(-0.5, len(bits) - 0.5)
    else:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, (1, 2, 5))
        axes.set_xlabel(AGAINST[against], fontsize=8, color=INK)
    if frame["value"].min() > 0 and frame["value"].max() / frame["value"].min() > 4:
        _log_axis(axes, frame["value"])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    _plain(axes)
    axes.minorticks_off()  # and fixed margins: measuring every tick would take seconds a page
    axes.set_title(model, fontsize=9, color=INK)
    return _svg(figure, f"{model}-{metric}-{against}")


def _svg(figure, name):
    """An <svg> element for a page: its colours, fonts and ids are such that several live in one document."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = text.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>\s*", "", drawing, flags=re.DOTALL)
    for side in ("width", "height"):
        drawing = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", drawing, count=1)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', drawing))
    for identity in re.findall(r' id="([^"]+)"', drawing):
        kept = f' id="{name}-{identity}"' if identity in used else ""
        drawing = drawing.replace(f' id="{identity}"', kept)
    drawing = re.sub(r'(url\(|href=")#', rf"\1#{name}-", drawing)
    drawing = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", drawing, flags=re.DOTALL)  # holds for a whole page
    drawing = re.sub(r" font-family: [^;]*;", "", drawing)
    for colour in (INK, "#000000"):
        drawing = drawing.replace(colour, "currentColor")
    return drawing.replace(RULE, "var(--rule)")


def activation_ranges(frame: pd.DataFrame, path: str | Path) -> None:
    """Range of a layer's input against timestep: a row per model, a panel per class of layers.

    `frame` has columns model, layer_class, timestep, low, high. Sampling runs from left to right, from noise to image.
    """
    models, classes = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["layer_class"]))
    figure = Figure(figsize=(0.8 + 2.1 * len(classes), 0.6 + 1.8 * len(models)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(models), len(classes), squeeze=False, sharex="row")
    for row, model in enumerate(models):
        for column, layer_class in enumerate(classes):
            axes = panels[row, column]
            chosen = (frame["model"] == model) & (frame["layer_class"] == layer_class)
            points = frame[chosen].sort_values("timestep")
            if points.empty:
                axes.set_axis_off()
                continue
            axes.fill_between(points["timestep"], points["low"], points["high"], color=COLOURS[0], alpha=0.25, lw=0)
            for edge in ("low", "high"):
                axes.plot(points["timestep"], points[edge], color=COLOURS[0], lw=1.4)
            axes.axhline(0, color=INK, lw=0.5)
            axes.set_xlim(frame["timestep"].max(), frame["timestep"].min())
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_title(layer_class, fontsize=8)
            _plain(axes)
        panels[row, 0].set_ylabel(model, fontsize=9)
    figure.supxlabel("timestep (noise to image)", fontsize=9)
    figure.suptitle("Activation range: smallest to largest input of a layer", fontsize=9)
    _save(figure, path)


def eps_error_curves(frame: pd.DataFrame, path: str | Path) -> None:
    """Noise-prediction error against timestep with its 95 % band: a row per model, a column per bits.

    `frame` is that of eps_error.csv. Sampling runs from left to right.
    """
    models = list(dict.fromkeys(frame["model"]))
    bits = sorted(set(frame["bits"]), key=by_bits)
    methods = list(dict.fromkeys(frame["method"]))
    figure = Figure(figsize=(0.9 + 2.6 * len(bits), 0.8 + 2.1 * len(models)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(models), len(bits), squeeze=False, sharey="row")
    for row, model in enumerate(models):
        for column, width in enumerate(bits):
            axes = panels[row, column]
            cell = frame[(frame["model"] == model) & (frame["bits"] == width)]
            if cell.empty:
                axes.set_axis_off()
                continue
            for place, method in enumerate(methods):
                points = cell[cell["method"] == method].sort_values("call")
                if points.empty:
                    continue
                colour = COLOURS[place % len(COLOURS)]
                # On a logarithmic axis a band that reaches below zero ends at the axis.
                low = points["low"].clip(lower=points["value"] / 10)
                axes.fill_between(points["timestep"], low, points["high"], color=colour, alpha=0.2, lw=0)
                marker = MARKERS[place % len(MARKERS)]
                axes.plot(points["timestep"], points["value"], color=colour, lw=1.3, marker=marker, ms=3, label=method)
            _log_axis(axes, frame.loc[frame["model"] == model, "value"])
            axes.set_xlim(frame["timestep"].max() + 15, frame["timestep"].min() - 15)
            sizes = ", ".join(str(n) for n in sorted(set(cell["n"])))
            axes.set_title(f"{model}, {width.upper()}, n = {sizes} trajectories", fontsize=8)
            _plain(axes)
    figure.supxlabel("timestep (noise to image)", fontsize=9)
    figure.supylabel("relative squared error of the noise prediction", fontsize=9)
    _legend(figure, panels.flat)
    _save(figure, path)


def roofline(frame: pd.DataFrame, path: str | Path) -> None:
    """Operations a second of layers against operations per byte, under what the machine allows: a panel per threads.

    `frame` is that of results/kernels/*.csv. Convolutions by Winograd's algorithm multiply less than is counted, so
    they can lie above.
    """
    layers = frame[(frame["part"] == "layer") & frame["gops"].notna()]
    threads = sorted(set(layers["threads"]))
    if not threads:
        raise ValueError("no layer was measured: nothing to draw")
    figure = Figure(figsize=(1 + 4 * len(threads), 3.6), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(threads), squeeze=False, sharey=True)[0]
    for axes, number in zip(panels, threads, strict=True):
        peaks = frame[(frame["part"] == "peak") & (frame["threads"] == number)].set_index("kernel")
        intensity = np.geomspace(layers["intensity"].min(), layers["intensity"].max(), 100)
        for place, (kernel, peak) in enumerate({"fp32": "fp32", "integer w8a8": "integer"}.items()):
            points = layers[(layers["threads"] == number) & (layers["kernel"] == kernel)]
            look = {"marker": MARKERS[place], "color": COLOURS[place]}
            axes.scatter(points["intensity"], points["gops"], s=14, alpha=0.6, lw=0, label=kernel, **look)
            if {peak, "memory"} <= set(peaks.index):
                roof = np.minimum(peaks.loc[peak, "gops"], peaks.loc["memory", "gbs"] * intensity)
                axes.plot(intensity, roof, color=COLOURS[place], lw=1.2, label=f"what the machine allows, {peak}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"{number} thread{'s' if number > 1 else ''}", fontsize=9)
        _plain(axes)
    figure.supxlabel("operations per byte moved at least", fontsize=9)
    panels[0].set_ylabel("1e9 operations a second", fontsize=9)
    _legend(figure, panels)
    _save(figure, path)


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
            _plain(axes)
            axes.grid(axis="x", color=RULE, lw=0.6)
    figure.supxlabel(
        "relative squared error of the noise prediction, one class quantized, the rest in float", fontsize=9
    )
    _legend(figure, panels, 2 * len(models))
    _save(figure, path)


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
        _log_axis(axes, errors["value"])
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
        _log_axis(axes, embeddings[["error", "apart"]].stack())
        axes.set_xlim(embeddings["timestep"].max() + 15, embeddings["timestep"].min() - 15)
        axes.set_xlabel("timestep (noise to image)", fontsize=8)
        for panel in panels[:, column]:
            _plain(panel)
    panels[0, 0].set_ylabel("noise-prediction error", fontsize=9)
    panels[1, 0].set_ylabel("distance of embeddings", fontsize=9)
    _legend(figure, panels.flat, 2 * len(models))
    _save(figure, path)


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
            _plain(axes)
        panels[row, 0].set_ylabel(f"{model['model']}\nshare of values", fontsize=8)
    figure.supxlabel(
        "input of a layer, in standard deviations of full precision (beyond 20: in the last bin)", fontsize=9
    )
    _legend(figure, panels.flat)
    _save(figure, path)


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
            _plain(axes)
            axes.set_xscale("log")
            _log_ticks(axes.xaxis, (1, 2, 5))
            axes.grid(axis="x", color=RULE, lw=0.6)
            axes.set_yticks(range(len(classes)), classes)
            axes.set_title(f"{name}, {model}", fontsize=9)
    _legend(figure, panels.flat)
    _save(figure, path)


def paired_differences(frame: pd.DataFrame, against: str, metric: str, path: str | Path) -> None:
    """A line for every row: its difference to `against` in a metric, with its 95 % interval; frame of ablations.csv.

    Colour and shape say whether the interval excludes 0, and to which side.
    """
    found = frame[(frame["metric"] == metric) & (frame["versus"] == against)]
    if found.empty:
        raise ValueError(f"no difference to {against!r} in {metric!r} to draw")
    spec, place = METRICS[metric], np.arange(len(found))
    figure = Figure(figsize=(7.5, 1.4 + 0.19 * len(found)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    verdicts = {"better": found["better"] == found["row"], "worse": found["better"] == against}
    verdicts["not told apart"] = ~(verdicts["better"] | verdicts["worse"])
    styles = {"better": (COLOURS[0], "o"), "worse": (COLOURS[1], "s"), "not told apart": ("#888888", "D")}
    for verdict, chosen in verdicts.items():
        points, (colour, marker) = found[chosen], styles[verdict]
        if points.empty:
            continue
        error = [points["difference"] - points["difference_low"], points["difference_high"] - points["difference"]]
        style = dict(fmt=marker, color=colour, ms=4, lw=0, elinewidth=1.4, capsize=2)
        axes.errorbar(points["difference"], place[chosen], xerr=error, label=verdict, **style)
    axes.axvline(0, color=INK, lw=0.8)
    label = f"{spec.label}, minus that of {against} ({spec.better} is better)"
    # Differences of good rows are small beside those of rows that fail: linear around zero, logarithmic outside.
    sizes = found["difference"].abs()
    linear = float(f"{2 * sizes.median():.0e}")
    if sizes.max() > 10 * linear > 0:
        axes.set_xscale("symlog", linthresh=linear, linscale=2)
        decades = 10.0 ** np.arange(np.ceil(np.log10(linear)), np.log10(sizes.max()) + 0.3)
        ends = found["difference_low"].min(), found["difference_high"].max()
        ticks = np.concatenate([[linear / 2, linear], decades[decades > 1.5 * linear]])
        axes.set_xticks([t for t in (*-ticks[::-1], 0, *ticks) if 1.5 * ends[0] <= t <= 1.5 * ends[1]])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        label += f"\nlinear to ±{linear:g}, logarithmic beyond"
    axes.set_yticks(place, found["row"])
    axes.set_ylim(len(found) - 0.5, -0.5)
    model, bits, n = (found[column].iloc[0] for column in ("model", "bits", "n"))
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(f"{model}, {bits.upper()}, n = {n}: paired differences, 95 % intervals", fontsize=9)
    _plain(axes)
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.tick_params(axis="y", labelsize=7)
    _legend(figure, [axes])
    _save(figure, path)


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
        _log_axis(axes, frame["value"])
        axes.axhline(1, color=INK, lw=0.6)
        axes.invert_xaxis()
        axes.set_xlabel("bits of weights and layer inputs", fontsize=9)
        axes.set_title(f"left over, as a share {whole}", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
        _plain(axes)
    if title:
        figure.suptitle(title, fontsize=9)
    _save(figure, path)


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
    _save(figure, path)


def _axis_label(metric, frame):
    spec = METRICS[metric]
    networks = ", ".join(frame["extractor"].unique()) if spec.network else ""
    name = {"extractor": f" ({networks} net)", "clip": f" ({networks})", None: ""}[spec.network]
    return f"{spec.label}{name}, {spec.better} is better"


def _spans_decades(values):
    values = values[np.isfinite(values)]
    return len(values) > 0 and values.min() > 0 and values.max() / values.min() > 20


def _log_axis(axes, values):
    values = values[np.isfinite(values) & (values > 0)]
    decades = np.log10(values.max() / values.min()) if len(values) else 0
    axes.set_yscale("log")
    _log_ticks(axes.yaxis, (1, 2, 5) if decades < 2.5 else (1,))


def _log_ticks(axis, digits):
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _plain(axes):
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color=RULE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK)


def _legend(figure, panels, columns=6):
    """One legend above all panels, with what any of them shows."""
    found = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found, loc="outside upper center", ncols=min(len(found), columns), fontsize=8, frameon=False
    )


def _save(figure, path):
    with atomic(path) as file:
        figure.savefig(file, dpi=DPI, facecolor="white")
