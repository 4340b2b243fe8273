"""docs/questions.md: ten questions about QuEST, the conclusion first, from records and tables. Needs no torch.

A conclusion is what the records in results/settled decide ("open" where they decide nothing), or what holds by
construction. Runs of seeds that were looked at, and of one seed, stand below it and decide nothing.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from quest.report.rendering import plus_minus
from quest.report.settle import claims
from quest.report.settle.claims import AHEAD, EQUIVALENT, GROUPS, PAPER, SELECTION, Claim

LOG = "[log, 2026-11-22](../results/LOG.md)"
FINDINGS = "[findings](findings.md#side-by-side)"
ZOO = "protocols.md#the-models-of-the-zoo"


@dataclass(frozen=True)
class Sources:
    """tables: of docs/assets, by name. findings: the text of docs/findings.md."""

    tables: Mapping[str, pd.DataFrame]
    findings: str


@dataclass(frozen=True)
class Question:
    """A question, what is asked of records (pairs, as in a claim), and what else is known.

    yes, no: the conclusion where all comparisons settle it one way. answer: a conclusion that holds by construction.
    construction: what follows without a measurement. known: functions that give lines. findings: [row, versus] of
    comparisons in docs/findings.md. once: what runs of one seed showed, with links. needs: what would settle it.
    """

    text: str
    yes: str = ""
    no: str = ""
    pairs: tuple[tuple[str, str], ...] = ()
    expected: tuple[str, ...] = (AHEAD,)
    answer: str = ""
    construction: str = ""
    known: tuple[Callable[[Sources], list[str]], ...] = ()
    findings: tuple[tuple[str, str], ...] = ()
    once: tuple[str, ...] = ()
    needs: str = ""


def shares(sources: Sources) -> list[str]:
    """How many of the weights QuEST tunes."""
    both = sources.tables["tuned.csv"].set_index("model")["both"]
    names = ("lsun-bedrooms", "imagenet", "sd14", "photos-class", "emoji-text")
    some = ", ".join(f"{both[name]:.0%} on {name}" for name in names if name in both)
    return [
        f"The selection of the released code has {both.min():.0%} to {both.max():.0%} of the parameters ({some}; "
        "[every model](assets/tuned.csv)), where the paper speaks of a very small subset."
    ]


def sizes(sources: Sources) -> list[str]:
    """What sets of activation scales cost in bytes: quest-suite has them, q-diffusion has one."""
    main, lines = sources.tables["main.csv"], []
    of = main.drop_duplicates(["model", "method", "bits"]).set_index(["model", "method", "bits"])["size_mb"]
    for model in dict.fromkeys(main["model"]):
        keys = [(model, method, "w4a4") for method in ("quest-suite", "q-diffusion")]
        if all(key in of for key in keys):
            many, one = (of[key] for key in keys)
            lines.append(f"{model} {many:.3f} instead of {one:.3f} MB")
    return (
        [f"A set for each time group takes, at W4A4: {', '.join(lines)} ([main.csv](assets/main.csv))."]
        if lines
        else []
    )


ERRORS = {"to_noise": "held-out error against the true noise", "to_full_precision": "against full precision"}
ERRORS |= {"log_latent_mse": "log10 latent MSE to FP"}
VERSUS = {
    "full-finetune-global": "finetuning all weights without data, by the same loss",
    "full-finetune": "full-finetune, without data but with the losses of layers",
    "quest-suite": "quest-suite",
}


def trained_on_data(sources: Sources) -> list[str]:
    """What quantization-aware training on real scenes showed beside finetuning without data, by seed."""
    table, lines = sources.tables["qat.csv"], []
    for (model, bits, versus), rows in table.groupby(["model", "bits", "versus"], sort=False):
        parts = []
        for error, of_error in rows.groupby("error", sort=False):
            values = [plus_minus(row.difference, row.low, row.high) for row in of_error.itertuples()]
            parts.append(f"{ERRORS[error]} {' and '.join(values)} ({', '.join(dict.fromkeys(of_error['verdict']))})")
        numbers = list(dict.fromkeys(map(str, rows["seed"])))
        seeds = f"seed{'s' * (len(numbers) > 1)} {' and '.join(numbers)}"
        lines.append(
            f"*{seeds}: {model} at {bits.upper()}, training all weights on noised real scenes, target the noise, "
            f"minus {VERSUS[versus]}, at equal iterations: {'; '.join(parts)} ([qat.csv](assets/qat.csv))*"
        )
    return lines


QUESTIONS = (
    Question(
        "Why finetune only certain layers, such as the time embedding and attention?",
        yes="It pays: tuning the selected layers is as good as tuning all, or better.",
        no="It does not pay in quality: tuning all layers at equal iterations is better.",
        pairs=SELECTION,
        expected=(AHEAD, EQUIVALENT),
        known=(shares,),
        findings=(("quest-control", "quest-suite"), ("quest-cma-only", "quest-suite")),
        once=(
            f"the layers that are tuned are not the sensitive ones ([three models]({ZOO})): shortcuts and both ends "
            "are, and attention's q, k, v are among the least",
        ),
        needs="records of the family `selection`; what it saves in memory and time at the paper's sizes",
    ),
    Question(
        "How does TAQuant treat activations of different timesteps, and what do more groups cost?",
        yes="Scales for each time group are better than one set.",
        no="Scales for each time group are not better than one set, after finetuning.",
        pairs=GROUPS,
        construction="a call takes the scales of its timestep's group, so bytes grow with the number of groups, and "
        "each group learns from fewer batches where iterations are shared out.",
        known=(sizes,),
        findings=(
            ("quest-untuned-groups-1", "quest-untuned"),
            ("quest-groups-1", "quest-suite"),
            ("quest-groups-5", "quest-suite"),
        ),
        needs="records of the family `time-groups` on three models",
    ),
    Question(
        "What does theorem 1 assume, and does it justify tuning weights instead of scales?",
        answer="It does not justify it by itself.",
        construction="it takes a second-order Taylor expansion around a trained minimum, whose remainder must be "
        "small; it gives no bound, and compares nothing with the tuning of scales.",
        once=(
            "at 2 bits a second-order step misses more than all of the output's change, and tuning weights lowered the "
            f"noise-prediction error far more than tuning scales, on scenes-class ({LOG})",
        ),
        needs="`snakemake questions` on other models and seeds, for the comparison of weights and scales",
    ),
    Question(
        "Which matters more: the loss of the task, or those of intermediate outputs?",
        findings=(("quest-no-local-cma", "quest-suite"),),
        once=(f"without the local loss of the first stage nothing changed that could be told apart ({LOG})",),
        needs="rows `quest-no-local-cma`, `quest-only-global` and `quest-no-global` in a family of `settle`",
    ),
    Question(
        "Why tune the time embedding before attention, and does the order matter?",
        yes="The order of the paper is better than the reverse.",
        no="The order of the paper is not better than the reverse.",
        pairs=(("quest-suite", "quest-cma-tla"),),
        findings=(("quest-cma-tla", "quest-suite"),),
        needs="records of the family `order`",
    ),
    Question(
        "Does finetuning make activations easier to quantize, and in all layers?",
        once=(
            "statistics of activations hardly changed, in both directions, on scenes-class: the narrowing of the "
            f"paper's Figure 3 was not seen ({LOG})",
        ),
        needs=f"`snakemake questions` on the models of pictures, and on one with [outliers]({ZOO}) to narrow",
    ),
    Question(
        "How does full precision as the teacher compare with real data?",
        once=(
            "with the global loss alone, on scenes-class, the teacher's answers on noised real scenes were a little "
            f"better than on its own trajectories, and the true noise a worse target; images were not compared ({LOG})",
        ),
        needs="images of the variants `global-scenes` and `global-noise`, over seeds; pictures of photos and emoji "
        "do not ship, so only the drawn scenes can say",
    ),
    Question(
        "Is inference that of any quantized model, or do timesteps need care?",
        answer="It is, but for a look-up of the timestep's group.",
        construction="a call finds the group of its timestep and takes its scales; no sampler changes, and a "
        "denoiser with the scales of one group alone gives the same bits at that group's timesteps.",
        known=(sizes,),
        once=(f"the look-up cost a few milliseconds in floats, and nothing to be told apart on integers ({LOG})",),
    ),
    Question(
        "Where does QuEST stand between post-training quantization and quantization-aware training?",
        yes="It is ahead of post-training quantization (Q-Diffusion) as configured here.",
        no="It is not ahead of post-training quantization (Q-Diffusion) as configured here.",
        pairs=(("quest-suite", "q-diffusion"),),
        construction="`full-finetune` learns all weights by QuEST's losses, without training data; it is not "
        "quantization-aware training in the usual sense. Question 1 has it.",
        known=(trained_on_data,),
        needs="records of the family `rivals`, and training on data with more seeds, more iterations and pictures "
        "that no program draws",
    ),
    Question(
        "Do the conclusions carry over to other domains, such as sequences?",
        construction="nothing in the method needs images; it names layers of attention, feed-forward and time "
        "embedding.",
        once=(
            "on signals of 64 values (one small model) QuEST was better than rounding to nearest, and better than "
            f"Q-Diffusion in noise prediction but not told apart in distance to full precision ({LOG})",
        ),
        needs="a good model of another domain, several seeds, and an endpoint of that domain",
    ),
)


def document(settled: pd.DataFrame, before: Mapping[str, pd.DataFrame], sources: Sources) -> str:
    """Return docs/questions.md. settled, before: as for `claims.document`."""
    sections = [_section(number, one, settled, before, sources) for number, one in enumerate(QUESTIONS, start=1)]
    answered = sum(_word(one, settled) != "open" for one in QUESTIONS)
    built = sum(bool(one.answer) for one in QUESTIONS)
    head = (
        f"Of ten questions, records over seeds answer {answered} so far, for the models and endpoints that stand "
        f"behind the answer, and {built} have an answer by construction. "
        "**All else is open.** Lines in italics decide nothing: they come from seeds that were looked at, or from one "
        "small model with one calibration draw and one quantization seed, which another may reverse. Generated by "
        "`python -m workflow.scripts.claims`; rules in [PROTOCOL.md](../PROTOCOL.md), verdicts in [claims](claims.md)."
    )
    return "\n\n".join(["# Ten questions about QuEST", head, *sections]) + "\n"


def _claim(one: Question) -> Claim:
    return Claim(one.text, PAPER, one.pairs, expected=one.expected)


def _word(one: Question, settled: pd.DataFrame) -> str:
    claim = _claim(one)
    return claims.word(claim, claims.of_claim(claim, settled)) if one.pairs else "open"


def _section(number: int, one: Question, settled, before, sources: Sources) -> str:
    claim, (said, _, part) = _claim(one), _word(one, settled).partition(" ")
    words = {"holds": one.yes, "refuted": one.no, "mixed": "It depends on the model and the endpoint."}
    conclusion = f"**{words.get(said) or one.answer or 'Open.'}**" + (f" {part}" if part else "")
    if one.construction:
        conclusion += f" By construction: {one.construction}"
    rows = claims.of_claim(claim, settled)
    lines = [claims.line(row) for row in rows]
    if not rows:
        seeds = [line for name, table in before.items() for line in claims.illustrations(claim, table, name)]
        lines += [f"*three seeds: {line}*" for line in seeds]
    lines += [line for function in one.known for line in function(sources)]
    lines += [f"*one seed: {finding(pair, sources.findings)}*" for pair in one.findings]
    lines += [f"*one seed: {line}*" for line in one.once]
    if one.needs and (said in ("open", "mixed") or any(row.verdict == "open" for row in rows)):
        lines.append(f"needs: {one.needs}")
    return "\n".join([f"## {number}. {one.text}", "", conclusion, "", *(f"- {line}" for line in lines)])


def finding(pair: tuple[str, str], text: str) -> str:
    """The sentence of docs/findings.md that compares two rows, with its model. Raises ValueError if there is none."""
    # An older run has QuEST's row under the name "quest".
    row, versus = (re.escape(name).replace("quest\\-suite", "quest(?:-suite)?") for name in pair)
    found = re.search(rf"^- ({row} against {versus}: .*)\.$", text, re.MULTILINE)
    where = re.search(r"these are results of (\S+ at W\d+A\d+)", text)
    if found is None or where is None:
        raise ValueError(f"docs/findings.md compares {pair[0]} with {pair[1]} nowhere, or does not name its model")
    return f"{where[1]}, {found[1]} ({FINDINGS})"
