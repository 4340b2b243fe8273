"""Figures of a run, drawn from its tables and samples. Needs no torch and no display."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from quest.metrics import METRICS
from quest.metrics.comparison import outcome
from quest.report.style import COLOURS, DPI, INK, MARKERS, RULE, legend, log_axis, log_ticks, plain, save
from quest.report.tables import by_bits, column_label

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
    save(figure, path)


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
            log_axis(axes, of_model["value"])
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        sizes = ", ".join(str(n) for n in sorted(set(of_model["n"])))
        axes.set_title(f"{model}, n = {sizes}", fontsize=9)
        plain(axes)
    panels[0].set_ylabel(f"{column_label(metric, frame)}, {METRICS[metric].better} is better", fontsize=9)
    legend(figure, panels)
    save(figure, path)


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
        log_ticks(axes.xaxis, (1, 2, 5))
        axes.set_xlabel(AGAINST[against], fontsize=8, color=INK)
    if frame["value"].min() > 0 and frame["value"].max() / frame["value"].min() > 4:
        log_axis(axes, frame["value"])
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    plain(axes)
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
            plain(axes)
        panels[row, 0].set_ylabel(model, fontsize=9)
    figure.supxlabel("timestep (noise to image)", fontsize=9)
    figure.suptitle("Activation range: smallest to largest input of a layer", fontsize=9)
    save(figure, path)


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
            log_axis(axes, frame.loc[frame["model"] == model, "value"])
            axes.set_xlim(frame["timestep"].max() + 15, frame["timestep"].min() - 15)
            sizes = ", ".join(str(n) for n in sorted(set(cell["n"])))
            axes.set_title(f"{model}, {width.upper()}, n = {sizes} trajectories", fontsize=8)
            plain(axes)
    figure.supxlabel("timestep (noise to image)", fontsize=9)
    figure.supylabel("relative squared error of the noise prediction", fontsize=9)
    legend(figure, panels.flat)
    save(figure, path)


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
        log_ticks(axes.xaxis, (1, 2, 5))
        axes.set_yscale("log")
        axes.set_title(f"{number} thread{'s' if number > 1 else ''}", fontsize=9)
        plain(axes)
    figure.supxlabel("operations per byte moved at least", fontsize=9)
    panels[0].set_ylabel("1e9 operations a second", fontsize=9)
    legend(figure, panels)
    save(figure, path)


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
    verdicts = np.array([outcome(better, row) for better, row in zip(found["better"], found["row"], strict=True)])
    styles = {"better": (COLOURS[0], "o", "better"), "worse": (COLOURS[1], "s", "worse")}
    for verdict, (colour, marker, label) in (styles | {"neither": ("#888888", "D", "not told apart")}).items():
        chosen = verdicts == verdict
        points = found[chosen]
        if points.empty:
            continue
        error = [points["difference"] - points["difference_low"], points["difference_high"] - points["difference"]]
        style = dict(fmt=marker, color=colour, ms=4, lw=0, elinewidth=1.4, capsize=2)
        axes.errorbar(points["difference"], place[chosen], xerr=error, label=label, **style)
    for y in place[np.isin(verdicts, ("diverged", "rival diverged"))]:
        words = found["better"].iloc[y]
        axes.text(1, y, words, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=7, color=INK)
    axes.axvline(0, color=INK, lw=0.8)
    label = f"{spec.label}, minus that of {against} ({spec.better} is better)"
    # Differences of good rows are small beside those of rows that fail: linear around zero, logarithmic outside.
    sizes = found["difference"].abs().replace(np.inf, np.nan)
    linear = float(f"{2 * sizes.median():.0e}")  # NaN where every row has diverged
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
    plain(axes)
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.tick_params(axis="y", labelsize=7)
    legend(figure, [axes])
    save(figure, path)


def _spans_decades(values):
    values = values[np.isfinite(values)]
    return len(values) > 0 and values.min() > 0 and values.max() / values.min() > 20
