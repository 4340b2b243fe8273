"""What the steps would cost on GPUs that nobody has measured: costs of a measured processor, scaled by data sheets."""

from typing import NamedTuple

from quest.planning.costs import STEPS

REACHED = 0.4  # of a GPU's peak in float32, by what multiplies matrices
MOVED = 0.7  # of its bandwidth, by what only moves numbers


class Gpu(NamedTuple):
    """Data sheet: TFLOPS in float32 without tensor cores, GB/s, and GB of memory."""

    teraflops: float
    bandwidth: float
    memory: float


GPUS = {
    "NVIDIA A100 80GB": Gpu(19.5, 2039, 80),
    "NVIDIA H100 80GB": Gpu(66.9, 3350, 80),
    "NVIDIA H200 141GB": Gpu(66.9, 4800, 141),
    "NVIDIA RTX 4090": Gpu(82.6, 1008, 24),
}
# What takes its time in matrix products; the rest (rounding of weights, searches, Adam) in moving numbers.
PRODUCTS = {"call", "quantized call", "decode", "features", "ranges row", "rounding row", "step learning row"}
PRODUCTS |= {"threshold search row", "gptq row", "svdquant row"} | {f"{what} row" for what in STEPS}


def forecast(costs: list[dict], machine: str, gpu: str, macs: dict[str, int]) -> list[dict]:
    """The costs of `machine` as rows of a GPU in GPUS. macs: of one denoiser call, by model.

    Seconds of matrix products are divided by REACHED times the GPU's peak over what the machine reached in a denoiser
    call; others by MOVED times its bandwidth over the machine's. Memory is the machine's: tensors are the same.
    """
    sheet, found = GPUS[gpu], []
    for model in dict.fromkeys(row["model"] for row in costs if row["machine"] == machine):
        of_model = [row for row in costs if (row["model"], row["machine"]) == (model, machine)]
        known = {row["what"]: row["value"] for row in of_model}
        if model not in macs or not known.get("call") or not known.get("copy"):
            continue
        faster = REACHED * sheet.teraflops * 1e12 / (2 * macs[model] / known["call"])
        wider = MOVED * sheet.bandwidth * 1e9 / (2e9 / known["copy"])  # a copy reads and writes
        for row in of_model:
            value = row["value"]
            if row["unit"] == "s" and row["what"] != "start":
                value /= faster if row["what"] in PRODUCTS else wider
            found.append(row | {"machine": gpu, "value": value, "how": "forecast"})
    return found


def assumptions(machine: str) -> str:
    """What `forecast` assumes, in sentences."""
    sheets = ", ".join(f"{name} {g.teraflops:g} TFLOPS and {g.bandwidth:g} GB/s" for name, g in GPUS.items())
    return (
        f"Nobody measured these. They are the costs in this plan of {machine}, scaled: matrix products reach "
        f"{REACHED:.0%} of the GPU's peak in float32 without tensor cores, all else {MOVED:.0%} of its bandwidth (data "
        f"sheets: {sheets}). Memory is what was measured on a processor, since the tensors are the same, with about "
        "0.5 GB of the process itself."
    )
