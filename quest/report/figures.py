"""Figures of a run, drawn from its tables and samples. This module needs no torch and no display."""

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
from quest.report.style import DPI, INK, RULE, error_bars, legend, log_axis, log_ticks, look, plain, save, subplots
from quest.report.tables import by_bits, column_label

AGAINST = {"bits": "bits", "size_mb": "size of the denoiser [MB]", "tbops": "TBOPs per denoiser call"}


def sample_grid(rows: Sequence[tuple[str, np.ndarray]], path: str | Path, title: str = "", scale: int = 2) -> None:
    """Draw rows of (label, images uint8 [N, H, W, 3]); a column has one seed, so only the method changes within it.

    Every pixel is drawn as scale x scale pixels, without smoothing. Raises ValueError if the shapes of rows differ.
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
    """Draw a metric with its 95 % intervals against bits from the frame of main.csv, one panel per model.

    Full precision is a line, and its interval is a band. Raises ValueError for a metric that is unknown or has no row.
    """
    if metric not in METRICS:
        raise ValueError(f"metric: {metric!r} is not one of {', '.join(METRICS)}")
    frame = main[main["metric"] == metric]
    if frame.empty:
        raise ValueError(f"no row of metric {metric!r} to draw")
    models, (methods, bits) = list(dict.fromkeys(frame["model"])), _methods_and_bits(frame)
    figure, ((*panels,),) = subplots(1, len(models), (1.2 + 2.9 * len(models), 3.3))
    finite = frame.loc[np.isfinite(frame["value"]), "value"]
    logarithmic = finite.min() > 0 and finite.max() / finite.min() > 20
    for axes, model in zip(panels, models, strict=True):
        of_model = frame[frame["model"] == model]
        _band(axes, of_model[of_model["method"] == "fp"])
        for place, method in enumerate(methods):
            points = of_model[of_model["method"] == method].set_index("bits").reindex(bits)
            x = _beside(bits, place, methods)
            error_bars(axes, x, points, ms=5, elinewidth=1.4, capsize=2.5, label=method, **look(place))
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


def _beside(bits: Sequence[str], place: int, methods: Sequence[str]) -> np.ndarray:
    """Where the marks of a method stand: beside those of the others, around each number of bits."""
    apart = min(0.18, 0.9 / len(methods))  # of a step from one number of bits to the next
    return np.arange(len(bits)) + apart * (place - (len(methods) - 1) / 2)


def quality(main: pd.DataFrame, model: str, metric: str, against: str) -> str:
    """Draw a metric of one model with its 95 % intervals against `against` (a key of AGAINST), as an <svg> element.

    It uses `currentColor` and the property `--rule`, so it takes the colours of its page, and its text stays text.
    main: the frame of main.csv. Full precision is a line with a band against bits, and otherwise a point. Raises
    ValueError for a metric that the model lacks.
    """
    frame, (methods, bits) = main.assign(tbops=main["bops"] / 1e12), _methods_and_bits(main)
    frame = frame[(frame["model"] == model) & (frame["metric"] == metric)]
    if frame.empty:
        raise ValueError(f"{model} has no row of metric {metric!r} to draw")
    figure = Figure(figsize=(3.5, 2.6))
    axes = figure.add_axes((0.14, 0.1, 0.84, 0.8) if against == "bits" else (0.14, 0.18, 0.84, 0.72))
    full = frame[frame["method"] == "fp"]
    if against == "bits":
        _band(axes, full)
    else:
        error_bars(axes, full[against], full, marker="_", color="black", ms=6, elinewidth=1.5, capsize=2.5)
    for place, method in enumerate(methods):
        points = frame[frame["method"] == method].set_index("bits").reindex(bits)
        x = _beside(bits, place, methods) if against == "bits" else points[against]
        error_bars(axes, x, points, ms=4.5, elinewidth=1.2, **look(place))
        if against == "tbops":  # the size depends on weight bits alone, so a line against it would be vertical
            axes.plot(x, points["value"], color=look(place)["color"], lw=0.8, alpha=0.6)
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
    axes.minorticks_off()  # like the fixed margins, this saves seconds per page that measuring ticks would take
    axes.set_title(model, fontsize=9, color=INK)
    return _svg(figure, f"{model}-{metric}-{against}")


def _methods_and_bits(main):
    """Return the quantized methods in their order, and their bits, most bits first."""
    quantized = main[main["method"] != "fp"]
    return list(dict.fromkeys(quantized["method"])), sorted(set(quantized["bits"]), key=by_bits)


def _band(axes, full_precision):
    for row in full_precision.itertuples():
        axes.axhspan(row.low, row.high, color="black", alpha=0.12, lw=0)
        axes.axhline(row.value, color="black", lw=1, label="full precision")


def _svg(figure, name):
    """Return the figure as an <svg> element whose ids contain `name`, so that one page can hold several."""
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
        renamed = f' id="{name}-{identity}"' if identity in used else ""
        drawing = drawing.replace(f' id="{identity}"', renamed)
    drawing = re.sub(r'(url\(|href=")#', rf"\1#{name}-", drawing)
    drawing = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", drawing, flags=re.DOTALL)  # a page's styles
    drawing = re.sub(r" font-family: [^;]*;", "", drawing)
    for colour in (INK, "#000000"):
        drawing = drawing.replace(colour, "currentColor")
    return drawing.replace(RULE, "var(--rule)")


def activation_ranges(frame: pd.DataFrame, path: str | Path) -> None:
    """Draw the range of the layers' inputs against timestep: a row per model, a column per class of layers.

    frame: columns model, layer_class, timestep, low, high. Sampling runs from left to right, from noise to image.
    """
    models, classes = list(dict.fromkeys(frame["model"])), list(dict.fromkeys(frame["layer_class"]))
    size = (0.8 + 2.1 * len(classes), 0.6 + 1.8 * len(models))
    figure, panels = subplots(len(models), len(classes), size, sharex="row")
    for axes, _, layer_class, points in _occupied(panels, frame, model=models, layer_class=classes):
        points = points.sort_values("timestep")
        colour = look(0)["color"]
        axes.fill_between(points["timestep"], points["low"], points["high"], color=colour, alpha=0.25, lw=0)
        for edge in ("low", "high"):
            axes.plot(points["timestep"], points[edge], color=colour, lw=1.4)
        axes.axhline(0, color=INK, lw=0.5)
        axes.set_xlim(frame["timestep"].max(), frame["timestep"].min())
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_title(layer_class, fontsize=8)
        plain(axes)
    for axes, model in zip(panels[:, 0], models, strict=True):
        axes.set_ylabel(model, fontsize=9)
    figure.supxlabel("timestep (noise to image)", fontsize=9)
    figure.suptitle("Activation range: smallest to largest input of a layer", fontsize=9)
    save(figure, path)


def _occupied(panels, frame, **values):
    """Yield (axes, row value, column value, rows of the frame) for each panel that has rows; the others are hidden.

    values: two columns of the frame and their values, one for each row and one for each column of panels.
    """
    (row_name, row_values), (column_name, column_values) = values.items()
    for row_axes, row_value in zip(panels, row_values, strict=True):
        for axes, column_value in zip(row_axes, column_values, strict=True):
            chosen = frame[(frame[row_name] == row_value) & (frame[column_name] == column_value)]
            if chosen.empty:
                axes.set_axis_off()
            else:
                yield axes, row_value, column_value, chosen


def eps_error_curves(frame: pd.DataFrame, path: str | Path) -> None:
    """Draw the noise-prediction error against timestep with its 95 % band: a row per model, a column per bits.

    frame: that of eps_error.csv. Sampling runs from left to right.
    """
    models, methods = (list(dict.fromkeys(frame[column])) for column in ("model", "method"))
    bits = sorted(set(frame["bits"]), key=by_bits)
    size = (0.9 + 2.6 * len(bits), 0.8 + 2.1 * len(models))
    figure, panels = subplots(len(models), len(bits), size, sharey="row")
    for axes, model, width, cell in _occupied(panels, frame, model=models, bits=bits):
        for place, method in enumerate(methods):
            points = cell[cell["method"] == method].sort_values("call")
            if points.empty:
                continue
            # A band that reaches below zero has no end on a logarithmic axis, so it ends at a tenth of the value.
            low = points["low"].clip(lower=points["value"] / 10)
            axes.fill_between(points["timestep"], low, points["high"], color=look(place)["color"], alpha=0.2, lw=0)
            axes.plot(points["timestep"], points["value"], lw=1.3, ms=3, label=method, **look(place))
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
    """Draw the speed of layers against operations per byte, below the machine's limits; a panel per number of threads.

    frame: that of results/kernels/*.csv. Convolutions by Winograd's algorithm need fewer multiplications than are
    counted, so they can lie above the limit. Raises ValueError if no layer was measured.
    """
    layers = frame[(frame["part"] == "layer") & frame["gops"].notna()]
    threads = sorted(set(layers["threads"]))
    if not threads:
        raise ValueError("no layer was measured: nothing to draw")
    figure, ((*panels,),) = subplots(1, len(threads), (1 + 4 * len(threads), 3.6), sharey=True)
    for axes, number in zip(panels, threads, strict=True):
        peaks = frame[(frame["part"] == "peak") & (frame["threads"] == number)].set_index("kernel")
        intensity = np.geomspace(layers["intensity"].min(), layers["intensity"].max(), 100)
        for place, (kernel, peak) in enumerate({"fp32": "fp32", "integer w8a8": "integer"}.items()):
            points = layers[(layers["threads"] == number) & (layers["kernel"] == kernel)]
            axes.scatter(points["intensity"], points["gops"], s=14, alpha=0.6, lw=0, label=kernel, **look(place))
            if {peak, "memory"} <= set(peaks.index):
                roof = np.minimum(peaks.loc[peak, "gops"], peaks.loc["memory", "gbs"] * intensity)
                axes.plot(intensity, roof, color=look(place)["color"], lw=1.2, label=f"what the machine allows, {peak}")
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
    """Draw the difference of every row to `against` in a metric, with its 95 % interval; frame: that of ablations.csv.

    Colour and marker show whether the interval excludes 0 and on which side. Raises ValueError if there is no row.
    """
    rows = frame[(frame["metric"] == metric) & (frame["versus"] == against)]
    if rows.empty:
        raise ValueError(f"no difference to {against!r} in {metric!r} to draw")
    spec, place = METRICS[metric], np.arange(len(rows))
    figure, ((axes,),) = subplots(1, 1, (7.5, 1.4 + 0.19 * len(rows)))
    verdicts = np.array([outcome(better, row) for better, row in zip(rows["better"], rows["row"], strict=True)])
    intervals = rows[["difference", "difference_low", "difference_high"]].set_axis(["value", "low", "high"], axis=1)
    styles = {"better": look(0) | {"label": "better"}, "worse": look(1) | {"label": "worse"}}
    styles["neither"] = {"color": "#888888", "marker": "D", "label": "not told apart"}
    for verdict, style in styles.items():
        if (chosen := verdicts == verdict).any():
            error_bars(axes, place[chosen], intervals[chosen], horizontal=True, elinewidth=1.4, **style)
    for y in place[np.isin(verdicts, ("diverged", "rival diverged"))]:
        style = dict(ha="right", va="center", fontsize=7, color=INK)
        axes.text(1, y, rows["better"].iloc[y], transform=axes.get_yaxis_transform(), **style)
    axes.axvline(0, color=INK, lw=0.8)
    label = f"{spec.label}, minus that of {against} ({spec.better} is better)"
    # Differences of good rows are small beside those of bad ones, so the axis is linear near 0 and logarithmic beyond.
    sizes = rows["difference"].abs().replace(np.inf, np.nan)
    linear = float(f"{2 * sizes.median():.0e}")  # NaN where every row has diverged
    if sizes.max() > 10 * linear > 0:
        axes.set_xscale("symlog", linthresh=linear, linscale=2)
        decades = 10.0 ** np.arange(np.ceil(np.log10(linear)), np.log10(sizes.max()) + 0.3)
        ends = rows["difference_low"].min(), rows["difference_high"].max()
        ticks = np.concatenate([[linear / 2, linear], decades[decades > 1.5 * linear]])
        axes.set_xticks([t for t in (*-ticks[::-1], 0, *ticks) if 1.5 * ends[0] <= t <= 1.5 * ends[1]])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        label += f"\nlinear to ±{linear:g}, logarithmic beyond"
    axes.set_yticks(place, rows["row"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    model, bits, n = (rows[column].iloc[0] for column in ("model", "bits", "n"))
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(f"{model}, {bits.upper()}, n = {n}: paired differences, 95 % intervals", fontsize=9)
    plain(axes)
    axes.grid(axis="x", color=RULE, lw=0.6)
    axes.tick_params(axis="y", labelsize=7)
    legend(figure, [axes])
    save(figure, path)
