"""Answers to ten questions about QuEST (arXiv:2402.03666) and to what the paper leaves open, from the results of a run.

Every number and every verdict comes from results, see `quest.report.evidence`. An answer without a result says NOT RUN.
This module needs no torch.
"""

from collections import Counter

from quest.metrics import METRICS
from quest.metrics.comparison import Comparison
from quest.metrics.intervals import student
from quest.report import rendering
from quest.report.answers import (
    NOT_RUN,
    Answer,
    against,
    comparisons,
    count,
    in_words,
    not_run,
    seconds,
    shown,
    value,
    with_number,
)
from quest.report.evidence import QAT_PAIRS, TUNED, Evidence, inference_rows
from quest.report.properties import RANGE_KINDS
from quest.report.rendering import Table, columns, plus_minus


def answers(evidence: Evidence) -> list[Answer]:
    """Answer the ten questions in their order."""
    questions = (_layers, _groups, _theorem, _losses, _order, _after, _real, _inference, _qat, _signals)
    return [answer(evidence) for answer in questions]


def _layers(e: Evidence) -> Answer:
    answer = Answer("1. Why tune these layers only?")
    frame = e.properties["sensitivity"]
    for model, rows in frame[(frame["lowered"] == "activations") & (frame["layer_class"] != "all")].groupby("model"):
        order = rows.sort_values("value", ascending=False)
        most, least = order.iloc[0], order.iloc[-1]
        top = ", ".join(f"{r.layer_class} {r.value:.2g}" for r in order.head(3).itertuples())
        rank = {r.layer_class: i + 1 for i, r in enumerate(order.itertuples())}
        answer.lines.append(
            f"{model}: if the activations of one class of layers have {most['bits'].split('a')[1]} bits, and all else "
            f"is in full precision, the noise-prediction error is largest for {top}. The first of these classes does "
            f"{most['macs']:.1%} of the multiply-accumulates. The error is smallest for {least['layer_class']} "
            f"({least['value']:.2g}). Of {len(order)} classes, from the largest error to the smallest, the time "
            f"embedding is number {rank['time embedding']} and attention q, k, v is number {rank['attention q, k, v']}."
        )
    pairs = [("quest-suite", "quest-control"), ("quest-tla-only", "quest-control-only")]
    answer.lines += [against(e, *pair) for pair in [*pairs, ("quest-suite", "full-finetune")]]
    rows = ["quest-untuned", "quest-tla-only", "quest-control-only", "quest-cma-only", "quest-control"]
    answer.tables.append(comparisons(e, [*rows, "quest-lsun-set", "quest-sd-set", "full-finetune"], "quest-suite"))
    answer.figures.append("sensitivity")
    return answer


def _groups(e: Evidence) -> Answer:
    answer = Answer("2. How many time groups does TAQuant need, and what do they cost?")
    answer.tables.append(comparisons(e, [f"quest-groups-{n}" for n in (10, 5, 2, 1)], "quest-suite"))
    answer.lines += [against(e, "quest-groups-1", "quest-suite"), against(e, "quest-untuned-groups-1", "quest-untuned")]
    frame = e.properties["time_ranges"]
    for row in frame[frame["quantized"] == "all"].itertuples():
        answer.lines.append(
            f"{row.model}: here nothing is learned, weights are rounded to nearest, and the first and last layer stay "
            "in float. The noise-prediction error with one range for each timestep (from 8 rows each), minus that with "
            f"one range for all timesteps (from 64 rows), is {plus_minus(row.value, row.low, row.high)}: "
            f"{Comparison(row.value, row.low, row.high).in_words('')}."
        )
    size = e.inference["bytes"]
    if reason := e.inference.get("diverged"):
        answer.lines.append(f"quest-suite diverged, so there are no scales to count: {reason}.")
        return answer
    answer.lines.append(
        f"The scales and zero points of {e.inference['groups']} groups take "
        f"{size['activation scales'] / 1e3:.1f} kB of "
        f"{sum(size.values()) / 1e6:.3f} MB ({size['activation scales'] / sum(size.values()):.1%}); they grow with the "
        "number of groups, and so does the time of calibration. Question 8 has the time of a call."
    )
    return answer


def _theorem(e: Evidence) -> Answer:
    answer = Answer("3. What does theorem 1 assume, and what does tuning weights add to tuning scales?")
    remainders = {(r["bits"], r["what"]): student(r["values"]) for r in e.taylor["rows"]}
    bits = list(dict.fromkeys(b for b, _ in remainders))
    names = {
        "loss": "loss / output²",
        "first": "first-order step, output",
        "second": "second-order step, output",
        "loss, 1 step": "loss, 1 step",
        "loss, 4 steps": "loss, 4 steps",
    }

    def text(b, what):
        return plus_minus(*remainders[b, what])

    most, least = max(bits), min(bits)
    worse = [b for b in bits if remainders[b, "second"][1] > remainders[b, "first"][2]]
    answer.lines += [
        f"{e.taylor['model']}: all weights and all inputs of layers are quantized at once, and the change of the "
        "output is predicted by a Taylor expansion. The first-order prediction misses "
        f"{text(most, 'first')} of the change at {most} bits and {text(least, 'first')} at {least} bits; the "
        f"second-order prediction misses {text(most, 'second')} and {text(least, 'second')}.",
        "Reconstruction minimises a single second-order step without the gradient. This differs from the true change "
        f"of the loss by {text(most, 'loss, 1 step')} of it at {most} bits, {text(4, 'loss, 1 step')} at 4 bits and "
        f"{text(least, 'loss, 1 step')} at {least} bits. The sum of four steps with their gradients differs from it by "
        f"{text(4, 'loss, 4 steps')} at 4 bits and {text(least, 'loss, 4 steps')} at {least} bits.",
        "The second-order prediction is worse than the first-order one, with intervals that do not overlap, at these "
        f"numbers of bits: {', '.join(map(str, worse)) or 'none'}.",
        "None of this says that weights must be tuned, because theorem 1 gives no bound and compares nothing with the "
        "tuning of scales. The next lines measure this comparison.",
    ]
    variants = {"untuned": "scales are searched, nothing is learned", "learned-scales": "scales are learned"}
    variants |= {"learned-weights": "weights are learned", "quest-suite": "both are learned (QuEST)"}
    answer.lines += _tuned(e, [("learned-weights", "learned-scales"), ("quest-suite", "learned-weights")])
    answer.table(["bits", *names.values()], [[str(b), *(text(b, name) for name in names)] for b in bits])
    answer.tables.append(_tuning_table(e, variants))
    answer.figures.append("taylor")
    return answer


def _tuned(e: Evidence, pairs, metric: str = "to_full_precision") -> list[str]:
    label = TUNED[metric]
    lines = []
    for one, other in pairs:
        measured = {variant: tuning for variant, tuning in e.tunings.items() if metric in tuning}
        verdict = not_run((one, other), measured)
        if {one, other} <= set(measured):
            comparison = Comparison.of_pairs(e.tunings[one][metric], e.tunings[other][metric])
            verdict = with_number(comparison, comparison.in_words(other), "{0}, {1}")
        lines.append(f"{one} against {other}, {label}: {verdict}.")
    return lines


def _tuning_table(e: Evidence, names: dict[str, str]) -> Table:
    rows = []
    for variant, name in names.items():
        if (tuning := e.tunings.get(variant)) is None:
            rows.append([name, *[NOT_RUN] * 3])
            continue
        kinds = ("to_full_precision", "to_noise")
        errors = [plus_minus(*student(tuning[kind])) if kind in tuning else NOT_RUN for kind in kinds]
        rows.append([name, *errors, f"{tuning['seconds']:.0f}"])
    sizes = ""
    reasons = [
        f"{name}: {e.tunings[v]['diverged']}" for v, name in names.items() if e.tunings.get(v, {}).get("diverged")
    ]
    any_tuning = next(iter(e.tunings.values()), {})
    if "to_noise" in any_tuning:
        rows.append(["full precision", "0", plus_minus(*student(any_tuning["full_precision_to_noise"])), "–"])
        counts = len(any_tuning["to_full_precision"]), len(any_tuning["to_noise"])
        sizes = f" They are means over {counts[0]} trajectories and {counts[1]} scenes."
    heads = ["variant", "error against full precision", "error against the true noise", "seconds"]
    notes = [f"These are relative squared errors of the noise prediction.{sizes}"]
    notes += [f"Diverged: {'; '.join(reasons)}."] if reasons else []
    return Table(columns(*heads, texts=1), rows, notes=notes)


def _losses(e: Evidence) -> Answer:
    answer = Answer("4. Which loss matters: that of the noise prediction, or those of the layers?")
    rows = ["quest-only-global", "quest-no-global", "quest-no-local-tla", "quest-no-local-cma", "quest-global-1"]
    pairs = [("quest-tla-only-no-local", "quest-tla-only"), ("quest-tla-only-no-global", "quest-tla-only")]
    pairs += [("quest-cma-only-no-global", "quest-cma-only")]
    answer.lines += [against(e, *pair) for pair in [*((row, "quest-suite") for row in rows), *pairs]]
    answer.tables.append(comparisons(e, rows, "quest-suite"))
    return answer


def _order(e: Evidence) -> Answer:
    answer = Answer("5. Does it matter that the time embedding is tuned before attention?")
    frame, embeddings = e.properties["temporal"], e.properties["embeddings"]
    for model, rows in frame.groupby("model", sort=False):
        errors = {(r.quantized, r.ranges): plus_minus(r.value, r.low, r.high) for r in rows.itertuples()}
        (static, timed), (path, rest) = RANGE_KINDS, list(dict.fromkeys(rows["quantized"]))[:2]
        by_kind = embeddings[embeddings["model"] == model].groupby("ranges", sort=False)
        counts = [f"{(one['nearest'] == one['timestep']).sum()} of {len(one)} ({ranges})" for ranges, one in by_kind]
        answer.lines.append(
            f"{model}: if only {path} is at {rows['bits'].iloc[0].upper()}, the noise-prediction error is "
            f"{errors[path, static]} with static ranges and {errors[path, timed]} with one range for each timestep. If "
            f"{rest} is quantized instead (with the first and last layer), it is {errors[rest, static]} with static "
            "ranges. The quantized embedding of a timestep should be nearest to the exact embedding of the same "
            f"timestep. This holds for {', '.join(counts)}."
        )
    pairs = [("quest-untuned-float-time-embedding", "quest-untuned"), ("quest-cma-tla", "quest-suite")]
    answer.lines += [against(e, *pair) for pair in [*pairs, ("quest-joint", "quest-suite")]]
    rows = ["quest-cma-tla", "quest-joint", "quest-cma-only"]
    rows += ["quest-time-embedding-tuned", "quest-time-embedding-frozen"]
    answer.tables.append(comparisons(e, rows, "quest-suite"))
    answer.figures.append("temporal")
    return answer


def _after(e: Evidence) -> Answer:
    answer = Answer("6. Are activations easier to quantize after finetuning, and in all layers?")
    frame = e.properties["activation_changes"]
    after = frame[frame["denoiser"] == "after finetuning"]
    for (model, statistic), rows in after.groupby(["model", "statistic"], sort=False):
        ratios = Counter(Comparison(r.value - 1, r.low - 1, r.high - 1).verdict for r in rows.itertuples())
        if ratios["diverged"] == len(rows):
            note = rows["note"].iloc[0]
            answer.lines.append(f"{model}, {statistic}: {note if isinstance(note, str) else 'diverged'}.")
            continue
        broken = f", diverged in {ratios['diverged']}" if ratios["diverged"] else ""
        extremes = rows.dropna(subset=["value"]).sort_values("value")
        most, least = extremes.iloc[0], extremes.iloc[-1]
        answer.lines.append(
            f"{model}, {statistic}: it is lower after finetuning in {ratios['better']} of {len(rows)} classes of "
            f"layers, higher in {ratios['worse']}, and not told apart in {ratios['neither']}{broken}. Finetuning "
            f"multiplies it by {most['value']:.2f} ({most['layer_class']}) to {least['value']:.2f} "
            f"({least['layer_class']})."
        )
    answer.lines.append(
        "The intervals are those of the ratio after / before on each held-out trajectory. Even a change of a few per "
        "cent is told apart if it is the same on all trajectories. The time embedding has the same inputs on each."
    )
    answer.figures += ["imbalance", "activations"]
    return answer


def _real(e: Evidence) -> Answer:
    answer = Answer("7. Should the targets come from the full-precision model, or from real images?")
    names = {
        "global-trajectories": "targets from full precision, on its own trajectories",
        "global-scenes": "targets from full precision, on real scenes with noise",
        "global-noise": "the true noise as target, on the same scenes",
        "quest-suite": "QuEST: the first of these, with the losses of layers",
    }
    pairs = [("global-noise", "global-scenes"), ("global-scenes", "global-trajectories")]
    answer.lines += [
        f"With the global loss alone, {line}" for m in ("to_full_precision", "to_noise") for line in _tuned(e, pairs, m)
    ]
    answer.tables.append(_tuning_table(e, names))
    if "global-scenes" not in e.tunings:
        answer.lines.append(
            f"The real pictures of {e.model} do not ship, so nothing was finetuned on them. The models of drawn scenes "
            "have theirs: `snakemake questions --configfile workflow/config/scenes.yaml`."
        )
    return answer


def _inference(e: Evidence) -> Answer:
    answer = Answer("8. Does inference need special care for timesteps?")
    groups, rows = e.inference["groups"], []
    if reason := e.inference.get("diverged"):
        answer.lines.append(f"quest-suite diverged, so there is no call to time: {reason}.")
        return answer
    for timing, row in zip(inference_rows(e), e.inference["rows"], strict=True):
        medians = [f"{1e3 * timing[name]:.3g}" for name in ("time groups", "one group", "lookup")]
        difference = [timing[key] for key in ("difference", "low", "high")]
        word = Comparison(*difference).in_words("")
        slower = {"worse": "slower", "better": "faster"}.get(word, word)
        name = f"{row['kernel']}, {row['rows']} row{'s' if row['rows'] > 1 else ''}"
        milliseconds = plus_minus(*(1e3 * seconds for seconds in difference))
        rows.append([name, *medians, milliseconds, slower, str(len(row["seconds"]["time groups"]))])
    same = all(row["same_output"] for row in e.inference["rows"])
    answer.lines += [
        f"{e.inference['model']} with {groups} time groups: a call finds its group from its timestep, so no sampler "
        "is changed. A denoiser that holds the scales of one group alone gives, at the timesteps of this group, "
        + ("the same output bit for bit." if same else "another output.")
    ]
    for r in rows:
        text = f"{groups} groups against one: {r[4]} ms a call ({r[5]}). Finding the group takes {r[3]} ms."
        answer.lines.append(f"{r[0]}: {text}")
    heads = ["kernel", f"{groups} groups [ms]", "one group [ms]", "lookup [ms]", "difference [ms]", "verdict", "calls"]
    note = (
        "Medians of the processor time of one thread; the calls take turns. The difference is a mean with its "
        "paired 95 % interval."
    )
    answer.table(heads, rows, note)
    return answer


def _qat(e: Evidence) -> Answer:
    answer = Answer("9. Where does QuEST stand between PTQ and quantization-aware training?")
    rows = ["rtn-mse", "q-diffusion", "q-diffusion-groups", "efficient-dm", "qalora", "full-finetune"]
    answer.lines += [against(e, "quest-suite", row) for row in ("q-diffusion", "efficient-dm", "full-finetune")]
    lines, metrics = [], shown(e)
    for row in ["quest-suite", *rows]:
        effort = e.efforts.get(row)
        if effort is None or row not in e.cells:
            lines.append([row, *[NOT_RUN] * (len(metrics) + 3)])
            continue
        quality = [value(e.cells[row], m) for m in metrics]
        lines.append([row, *quality, count(effort["iterations"]), seconds(e, row), count(effort["peak_memory"])])
    heads = ["row", *(METRICS[m].label for m in metrics), "iterations", "seconds", "peak memory [MB]"]
    answer.table(
        heads, lines, "The seconds are those of the method + those of the checkpoint it starts from, on one thread."
    )
    if "qat" not in e.tunings:
        return answer
    seeds = [at for at in ("", *(f"@{seed}" for seed in range(1, 100))) if f"qat{at}" in e.tunings]
    names = {
        "qat": "training: all weights, on noised real scenes, the true noise as target",
        "full-finetune-global": "finetuning: the same without data, full precision as target",
        "full-finetune": "the same with the losses of layers",
        "quest-suite": "QuEST",
    }
    for at in seeds:
        pairs, said = [(one + at, other + at) for one, other in QAT_PAIRS], f" (seed {at[1:]})" if at else ""
        answer.lines += [line for metric in TUNED for line in _tuned(e, pairs, metric)]
        answer.tables.append(_tuning_table(e, {variant + at: f"{name}{said}" for variant, name in names.items()}))
    return answer


def _signals(e: Evidence) -> Answer:
    answer = Answer("10. Does QuEST work on data that are not images?")
    methods, metrics = e.signals["methods"], ("latent_mse", "eps_error")
    rows = [
        [name, *(plus_minus(*student(result[metric])) for metric in metrics), f"{result['seconds']:.0f}"]
        for name, result in methods.items()
    ]
    answer.lines.append(
        f"The data are signals of 64 values in {len(e.signals['classes'])} classes (chirps, pulses, tones, steps). The "
        "denoiser has linear layers and convolutions of height 1 and is quantized to "
        f"{e.signals['bits'].upper()}. Each of the n = {e.signals['n']} signals starts from the same noise as that of "
        "full precision."
    )
    for other in (name for name in methods if name != "quest-suite"):
        compared = {m: Comparison.of_pairs(methods["quest-suite"][m], methods[other][m]) for m in metrics}
        answer.lines.append(f"quest-suite against {other}: {in_words(compared, other)}.")
    answer.table(["method", "MSE to FP", "noise-prediction error", "seconds"], rows)
    answer.figures.append("signals")
    return answer


def document(evidence: Evidence) -> str:
    """Return the protocol and all ten answers in Markdown."""
    return "\n\n".join(["# Ten questions", protocol(evidence), *(a.markdown() for a in answers(evidence))])


def protocol(evidence: Evidence) -> str:
    """Return what a reader must know about all numbers: seeds, intervals and verdicts."""
    cell = evidence.cells.get("quest-suite") or next(iter(evidence.cells.values()))
    drawn = cell["drawn"]
    return (
        f"Unless a line names another model, these are results of {evidence.model} at {evidence.bits.upper()}. Images "
        f"have the evaluation seeds {drawn['images']}; noise-prediction errors come from {drawn['trajectories']} "
        "held-out trajectories. **One calibration draw and one quantization seed**: the intervals hold the spread over "
        "images (or trajectories) but not that over quantizations, which can be larger. ± is half of a 95 % interval. "
        "Differences are paired. A row is better or worse if the interval of the difference excludes zero; otherwise "
        "it is not told apart. There are dozens of comparisons, and one in twenty may exclude zero by chance."
    )


def findings(evidence: Evidence) -> str:
    """Return what a run of the small models says about questions that the paper and its code leave open."""
    time_embedding = ["quest-cma-only", "quest-control", "quest-cma-tla"]
    zero_point = (
        "Should the search for activation ranges include the zero point ({}), which the published one does not?"
    )
    questions = [  # question, versus, rows
        ("Is a true 4-bit grid as good as the released 33 levels?", "quest-suite", "quest-wide", "quest-symmetric"),
        ("One scale set, or one for each time group?", "quest-suite", "quest-groups-1", "quest-groups-5"),
        ("One scale set, or one for each time group, before finetuning?", "quest-untuned", "quest-untuned-groups-1"),
        (
            "Is the local loss of the critical modules needed beside the global loss?",
            "quest-suite",
            "quest-no-local-cma",
        ),
        (
            "Should 4-bit activations have a scale per channel, as released, or one per tensor?",
            "quest-suite",
            "quest-released",
        ),
        (
            "A scale per channel or per tensor, with one scale set for all timesteps?",
            "quest-groups-1",
            "quest-released-groups-1",
        ),
        (zero_point.format("QuEST"), "quest-suite", "quest-published-ranges"),
        (zero_point.format("Q-Diffusion"), "q-diffusion", "q-diffusion-published-ranges"),
        (zero_point.format("PTQ4DM"), "ptq4dm", "ptq4dm-published-ranges"),
        ("Does finetuning time-embedding layers first help?", "quest-suite", *time_embedding),
    ]
    blocks = [protocol(evidence)]
    for question, versus, *rows in questions:
        lines = [f"- {against(evidence, row, versus)}" for row in rows]
        blocks += [f"### {question}", "\n".join(lines), comparisons(evidence, rows, versus)]
    return rendering.document("md", *blocks)
