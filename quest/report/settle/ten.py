"""docs/questions.md: ten questions about QuEST, the conclusion first, from records and tables. Needs no torch.

A conclusion is what the records in results/settled decide ("open" where they decide nothing), or what holds by
construction. Runs of seeds that were looked at, and of one seed, stand below it and decide nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from quest.report.rendering import plus_minus
from quest.report.settle import claims
from quest.report.settle.claims import AHEAD, Claim
from quest.runtime.yaml_files import read_yaml

QUESTIONS = Path(__file__).parents[3] / "resources" / "questions.yaml"
FINDINGS = "[findings](findings.md#side-by-side)"


@dataclass(frozen=True)
class Sources:
    """tables: of docs/assets, by name. findings: the text of docs/findings.md."""

    tables: Mapping[str, pd.DataFrame]
    findings: str


@dataclass(frozen=True)
class Question:
    """A question, what is asked of records (pairs, as in a claim), and what else is known.

    holds, refuted: the conclusion where all comparisons settle it one way. answer: one that holds by construction.
    construction: what follows without a measurement. known: functions in KNOWN that give lines. findings: [row, versus]
    of comparisons in docs/findings.md. once: what runs of one seed showed, with links. needs: what would settle it.
    """

    text: str
    holds: str = ""
    refuted: str = ""
    pairs: Sequence[Sequence[str]] = ()
    expected: Sequence[str] = (AHEAD,)
    answer: str = ""
    construction: str = ""
    known: Sequence[str] = ()
    findings: Sequence[Sequence[str]] = ()
    once: Sequence[str] = ()
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


KNOWN = {"shares": shares, "sizes": sizes, "trained_on_data": trained_on_data}


def document(settled: pd.DataFrame, before: Mapping[str, pd.DataFrame], sources: Sources) -> str:
    """Return docs/questions.md. settled, before: as for `claims.document`."""
    questions = [Question(**one) for one in read_yaml(QUESTIONS)]
    sections = [_section(number, one, settled, before, sources) for number, one in enumerate(questions, start=1)]
    answered = sum(_word(one, settled) != "open" for one in questions)
    built = sum(bool(one.answer) for one in questions)
    head = (
        f"Of ten questions, records over seeds answer {answered} so far, for the models and endpoints that stand "
        f"behind the answer, and {built} have an answer by construction. "
        "**All else is open.** Lines in italics decide nothing: they come from seeds that were looked at, or from one "
        "small model with one calibration draw and one quantization seed, which another may reverse. Generated by "
        "`python -m workflow.scripts.claims`; rules in [PROTOCOL.md](../PROTOCOL.md), verdicts and the signs of "
        "the tables in [claims](claims.md)."
    )
    return "\n\n".join(["# Ten questions about QuEST", head, *sections]) + "\n"


def _claim(one: Question) -> Claim:
    return Claim(one.text, "", one.pairs, expected=one.expected)


def _word(one: Question, settled: pd.DataFrame) -> str:
    claim = _claim(one)
    return claims.word(claim, claims.of_claim(claim, settled)) if one.pairs else "open"


def _section(number: int, one: Question, settled, before, sources: Sources) -> str:
    claim, (said, _, part) = _claim(one), _word(one, settled).partition(" (")
    words = {"holds": one.holds, "holds in part": f"In part: {one.holds}", "refuted": one.refuted}
    words["mixed"] = "It depends on the model and the endpoint."
    conclusion = f"**{words.get(said) or one.answer or 'Open.'}**" + (f" ({part}" if part else "")
    if one.construction:
        conclusion += f" By construction: {one.construction}"
    rows = claims.of_claim(claim, settled)
    parts = [f"## {number}. {one.text}", conclusion]
    lines = []
    if rows:
        parts.append(claims.comparisons(claim, rows).markdown())
    else:
        seeds = [line for name, table in before.items() for line in claims.illustrations(claim, table, name)]
        lines += [f"*three seeds: {line}*" for line in seeds]
    lines += [line for name in one.known for line in KNOWN[name](sources)]
    lines += [f"*one seed: {finding(pair, sources.findings)}*" for pair in one.findings]
    lines += [f"*one seed: {line}*" for line in one.once]
    if one.needs and (said in ("open", "mixed") or any(row.verdict == "open" for row in rows)):
        lines.append(f"needs: {one.needs}")
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)])


def finding(pair: Sequence[str], text: str) -> str:
    """The sentence of docs/findings.md that compares two rows, with its model. Raises ValueError if there is none."""
    row, versus = map(re.escape, pair)
    found = re.search(rf"^- ({row} against {versus}: .*)\.$", text, re.MULTILINE)
    where = re.search(r"these are results of (\S+ at W\d+A\d+)", text)
    if found is None or where is None:
        raise ValueError(f"docs/findings.md compares {pair[0]} with {pair[1]} nowhere, or does not name its model")
    return f"{where[1]}, {found[1]} ({FINDINGS})"
