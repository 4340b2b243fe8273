"""docs/claims.md: what the paper and the field claim, and what results/settled says of it. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from quest.metrics import METRICS
from quest.metrics.comparison import outcome
from quest.report.rendering import Table, plus_minus
from quest.report.settle import FP, LOOKS
from quest.report.settle.verdicts import ALL, MARGINS

AHEAD, EQUIVALENT = "better", "equivalent"
PAPER = "arXiv:2402.03666"


@dataclass(frozen=True)
class Claim:
    """A claim and the comparisons that decide it.

    expected: the verdicts that support it. pairs: [method, versus]; without any, `needs` says what would settle it.
    measured: the name of a fact (`quest.report.settle.facts`) that answers a claim without pairs.
    """

    text: str
    source: str
    pairs: tuple[tuple[str, str], ...] = ()
    endpoints: tuple[str, ...] = tuple(MARGINS)
    expected: tuple[str, ...] = (AHEAD,)
    needs: str = ""
    measured: str = ""


QUESTIONS = (
    "`snakemake questions` measures it with one seed ([findings](findings.md)); no endpoint of the protocol does"
)
# Pairs of rows that decide a claim and a question: selected layers against all, and more time groups against one.
SELECTION = (("quest-suite", "full-finetune"), ("quest-groups-5", "full-finetune-groups-5"))
SELECTION += (("quest-groups-1", "full-finetune-groups-1"),)
GROUPS = (("quest-suite", "quest-groups-1"), ("quest-groups-5", "quest-groups-1"))
AFTER = "this suite; asked after the first look at finetuned static scales against scales of each token"
PAPERS = (
    Claim(
        "QuEST is ahead of Q-Diffusion at W4A4 (as this suite configures it)", PAPER, (("quest-suite", "q-diffusion"),)
    ),
    Claim("QuEST as in the text is ahead of Q-Diffusion at W4A4", PAPER, (("quest-paper", "q-diffusion"),)),
    Claim("QuEST as released is ahead of Q-Diffusion at W4A4", PAPER, (("quest-official", "q-diffusion"),)),
    Claim(
        "tuning selected layers is as good as tuning all weights, or better",
        f"{PAPER}, Table 8",
        SELECTION,
        expected=(AHEAD, EQUIVALENT),
    ),
    Claim(
        "activation scales for each time group are ahead of one set",
        f"{PAPER}v1, section 3",
        GROUPS,
    ),
    Claim("time-embedding layers must be tuned first", f"{PAPER}, section 3", (("quest-suite", "quest-cma-tla"),)),
    Claim(
        "four bits suffice: the images show what was asked for as often as full precision's",
        f"{PAPER}, abstract",
        (("quest-suite", "fp"),),
        ("agreement", "retrieval"),
        (AHEAD, EQUIVALENT),
    ),
    Claim("activations are imbalanced, and finetuning narrows them (property 1)", PAPER, needs=QUESTIONS),
    Claim("time-embedding layers are among the most sensitive (property 2)", PAPER, needs=QUESTIONS),
    Claim("attention-related layers are critical (property 3)", PAPER, needs=QUESTIONS),
    Claim("targets of full precision replace training data", PAPER, needs=QUESTIONS),
)
FIELD = (
    Claim(
        "QuEST W4A4 on LSUN-Bedrooms has an FID of 5.64; a user measured 11.36",
        f"{PAPER}; hatchetProject/QuEST issue 20",
        needs="`paper.yaml` on the published checkpoint",
    ),
    Claim(
        "ViDiT-Q at W4A8 loses almost nothing; SVDQuant's table gives it an FID of 37.3 (full precision: 16.6)",
        "arXiv:2406.02540; arXiv:2411.05007",
        needs="a row of ViDiT-Q, which is not here, beside `svdquant`, in a family at w4a8",
    ),
    Claim(
        "a low-rank branch is essential at W4A4; others find a factor of 1.12, or none",
        "arXiv:2411.05007; JoaoZaokk/comfy-quant-bench",
        (
            ("lowrank-token", "branchless-token"),
            ("lowrank-token", "fine-weights-token"),
            ("lowrank-token", "whole-channels-token"),
        ),
    ),
    Claim(
        "rotated W4A4 keeps the quality of full precision; others find it destroyed",
        "arXiv:2512.03673; JoaoZaokk/comfy-quant-bench",
        (("hadamard-token", "fp"),),
        ("agreement", "retrieval", "kid_64w"),
        (AHEAD, EQUIVALENT),
    ),
    Claim(
        "rotated W4A4 is ahead of W4A4 without a rotation, with a scale for each token",
        "arXiv:2512.03673; JoaoZaokk/comfy-quant-bench",
        (("hadamard-token", "rtn-token"),),
    ),
    Claim(
        "distances to full precision at the same seed rank methods; others call them invalid",
        "cozy-eval; TensorRT-LLM PR 18386",
        needs="records of four methods on a model; tables of floors say how far full precision is from itself",
        measured="distances",
    ),
    Claim(
        "a median layer error above .21 breaks a model, below .15 it does not",
        "JoaoZaokk/comfy-quant-bench",
        needs="layer errors of the records' checkpoints, in docs/assets/layer-errors.csv",
        measured="layer errors",
    ),
    Claim(
        "8-bit post-training quantization does not work for Stable Diffusion; papers call W8A8 lossless",
        "optimum-intel PR 584",
        (("q-diffusion", "fp"),),
        ("agreement", "retrieval", "kid_64w"),
        (AHEAD, EQUIVALENT),
        needs="a family at w8a8",
    ),
    Claim(
        "a quantized model can be better than full precision",
        "arXiv:2406.02540; D2-DPM",
        needs="records; the protocol counts it as a flag, which says that the metric errs",
        measured="beyond",
    ),
    Claim(
        "static scales for each step are as good as dynamic ones",
        "arXiv:2502.15077",
        (("adaround-step", "adaround-sample"), ("adaround-step", "adaround-token")),
        expected=(AHEAD, EQUIVALENT),
    ),
    Claim(
        "finetuned static scales keep up with scales of each token, which cost more",
        "this suite; arXiv:2502.15077",
        (("quest-suite", "adaround-token"),),
        expected=(AHEAD, EQUIVALENT),
    ),
    Claim(
        "QuEST's finetuning still pays where each token has its own scale",
        AFTER,
        (("quest-token", "adaround-token"),),
    ),
    Claim(
        "where each token has its own scale, tuning selected layers is as good as tuning all weights, or better",
        AFTER,
        (("quest-token", "full-finetune-token"),),
        expected=(AHEAD, EQUIVALENT),
    ),
    Claim(
        "normally distributed calibration timesteps are worse than uniform ones",
        "iszry/DI2N-PTQ4DM",
        (("q-diffusion-unsplit", "ptq4dm"),),
        needs="the two rows in a family",
    ),
    Claim(
        "convolutional denoisers should not be quantized; others report +15 % on SDXL",
        "ComfyUI-GGUF PR 63; convert_to_quant issue 21",
        needs="published weights",
    ),
    Claim(
        "published results that users could not reproduce",
        "EDA-DM issue 2, D2-DPM issue 1, PTQ4DiT issue 3, MixDQ issue 9, Q-Diffusion issue 41",
        needs="published weights",
    ),
)


def document(
    settled: pd.DataFrame,
    before: dict[str, pd.DataFrame],
    lottery: pd.DataFrame,
    facts: dict[str, tuple[str, list[str]]],
    rows: Sequence[Table],
) -> str:
    """Return docs/claims.md.

    settled: `verdicts.frame`. before: tables over seeds by name, which only illustrate. lottery: `lottery.summary`.
    facts: `quest.report.settle.facts.of`. rows: `levels.tables`.
    """
    parts = [
        "# Claims, and what is settled",
        "Generated by `python -m workflow.scripts.claims` from `results/settled/`. The rules are in "
        "[PROTOCOL.md](../PROTOCOL.md): seeds 3 to 14, images 500 to 999, looks at "
        f"{', '.join(map(str, LOOKS))} seeds. A verdict needs three seeds at least. ± is half of the interval of the "
        "look, over images and seeds. Lines in italics come from tables of runs with seeds 0 to 2, which were looked "
        "at during development, or with one seed (main.csv, scenes-main.csv): they decide nothing.",
        "## The paper",
        *(_section(claim, settled, before, facts) for claim in PAPERS),
        "## The field",
        *(_section(claim, settled, before, facts) for claim in FIELD),
        "## Where the rows stand",
        "Means over seeds with 95 % intervals over seeds and images. The verdicts above are sharper, because they "
        "compare methods on the same images. Stored bits are those of a parameter, scales and branches included; on "
        "integers is the share of the products that our integer kernel computed when the row was sampled. Now it "
        "computes all products with scales of tokens, which it did not in rows whose names end in -token; weights of "
        "convolutions with scales of groups, as in fine-weights-token, it still leaves to the reference kernel.",
        *(table.markdown() for table in rows),
        "![Distance to full precision of every row with its stored bits per parameter; hollow points did not run on "
        "integers alone](assets/standing.png)",
        "## The quantization lottery",
        _lottery(lottery),
    ]
    return "\n\n".join(parts) + "\n"


def _section(claim: Claim, settled: pd.DataFrame, before: dict[str, pd.DataFrame], facts: dict) -> str:
    rows = of_claim(claim, settled)
    lines = [f"- {line(row)}" for row in rows]
    said = word(claim, rows)
    if not rows:
        lines = [f"- *{line}*" for name, seeds in before.items() for line in illustrations(claim, seeds, name)]
    if claim.measured:
        said, measured = facts[claim.measured]
        lines = [f"- {line}" for line in measured]
    if said == "open" and not rows and claim.needs:
        lines.append(f"- needs: {claim.needs}")
    head = f"**{claim.text[0].upper()}{claim.text[1:]}** ({claim.source}): **{said}**"
    return "\n".join([head, "", *lines]) if lines else head


def of_claim(claim: Claim, settled: pd.DataFrame) -> list:
    """The rows that decide a claim, single models only."""
    pairs = set(claim.pairs)
    return [
        row
        for row in settled.itertuples()
        if (row.method, row.versus) in pairs and row.endpoint in claim.endpoints and row.model != ALL
    ]


def word(claim: Claim, rows: Sequence) -> str:
    """Return "holds" or "refuted" where all settled comparisons say so, otherwise "mixed"; "open" where none is.

    Behind it stands where that was settled, because it says nothing about other models and endpoints. A row that is
    better than full precision counts for nothing: that is a flag, not a success.
    """
    done = [row for row in rows if row.verdict not in ("open", "rival diverged") and not _flag(row)]
    if not done:
        return "open (full precision is surpassed, which flags the metric)" if any(map(_flag, rows)) else "open"
    support = [row.verdict in claim.expected for row in done]
    models = ", ".join(dict.fromkeys(row.model for row in done))
    endpoints = ", ".join(dict.fromkeys(METRICS[row.endpoint].label for row in done))
    said = "holds" if all(support) else "mixed" if any(support) else "refuted"
    return f"{said} (on {models}, in {endpoints}; {len(done)} of {len(rows)} comparisons settled)"


def _flag(row) -> bool:
    return row.versus == FP and row.verdict == AHEAD


def line(row) -> str:
    names = f"{row.model}, {row.bits.upper()}, {METRICS[row.endpoint].label}: {row.method} minus {row.versus}"
    number = "" if math.isnan(row.value) else f" {plus_minus(row.value, row.low, row.high)}"
    note = f"; {row.note}" if row.note else ""
    return f"{names}{number}, {row.seeds} seeds: {'flag' if _flag(row) else row.verdict}{note}"


def illustrations(claim: Claim, seeds: pd.DataFrame, name: str):
    """Lines of a table over seeds that was made before the protocol."""
    for row in seeds.itertuples():
        if (row.method, row.versus) not in claim.pairs or row.metric not in claim.endpoints:
            continue
        says = {"better": "ahead", "worse": "behind", "neither": "not told apart"}.get(
            outcome(row.better, row.method), ""
        )
        value = plus_minus(row.value, row.low, row.high)
        label = METRICS[row.metric].label
        yield f"{row.model}, {row.bits.upper()}, {label}: {row.method} minus {row.versus} {value}: {says} ({name})"


def _lottery(summary: pd.DataFrame) -> str:
    lines = [
        "How far each source of chance moves an endpoint of one quantized model (standard deviation; median and "
        "largest over rows and models). Two checkpoints of equal methods are further apart than the noise gap, 1.96 √2 "
        "median deviations, in one case of twenty. Smaller gaps between single checkpoints are noise.",
        "",
        "| endpoint | bits | source | median | largest | noise gap | rows | models |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in summary.itertuples():
        names = f"| {METRICS[row.endpoint].label} | {row.bits.upper()} | {row.source} "
        lines.append(
            f"{names}| {row.median:.2g} | {row.largest:.2g} | {row.noise_gap:.2g} | {row.rows} | {row.models} |"
        )
    missing = [
        name for name in ("calibration draw", "quantization seed", "processor") if name not in set(summary["source"])
    ]
    if missing:
        lines += ["", f"Not measured alone yet: {', '.join(missing)}."]
    return "\n".join(lines)
