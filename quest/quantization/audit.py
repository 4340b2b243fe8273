"""Count what a checkpoint contains: bytes of each kind, bits per parameter, bit operations, compression."""

import math
from pathlib import Path

from quest.quantization import checkpoint, cost


def account(path) -> dict:
    """Count the bytes of a checkpoint. Every tensor is read and compared with its hash.

    Returns a dictionary for JSON: bytes {kind: {class of layers: bytes}}, scheduler (bytes of a sampler's correction),
    file (bytes of the whole file), parameters (number of them in the denoiser), and header (see `header`). Raises
    ValueError for a file that is no checkpoint, and FloatingPointError for that of a method that diverged.
    """
    header, tensors = checkpoint.read(path)
    found: dict[str, dict[str, int]] = {kind: {} for kind in cost.KINDS}
    scheduler = parameters = 0
    for name, value in tensors.items():
        size = value.numel() * value.element_size()
        if name.startswith(checkpoint.SCHEDULER):
            scheduler += size
            continue
        kind, place = cost.kind(name), cost.tensor_class(name)
        found[kind][place] = found[kind].get(place, 0) + size
        if kind == "codes":
            parameters += math.prod(header["shapes"][name.removesuffix(f".{checkpoint.CODES}")])
        elif kind == "float":
            parameters += value.numel()
    size = Path(path).stat().st_size
    return {"bytes": found, "scheduler": scheduler, "file": size, "parameters": parameters, "header": header}


def report(path) -> str:
    """Return the numbers of `account` as text for people."""
    found = account(path)
    header, parameters = found["header"], found["parameters"]
    full = 4 * parameters  # bytes in float32
    kinds = {kind: sum(of_kind.values()) for kind, of_kind in found["bytes"].items()}
    denoiser = sum(kinds.values())
    lines = [" ".join(filter(None, [str(path) + ":", header.get("model"), header.get("method"), header.get("bits")]))]
    lines += [f"weights {header['granularity']['weights']}; activations {header['granularity']['activations']}"]
    if header["time_groups"]:
        lines.append(f"time groups start at {', '.join(map(str, header['time_groups']))}")
    made = header.get("provenance", {})
    lines += [f"commit {made.get('commit')}, {made.get('date')}", ""]
    rows = [(cost.KINDS[kind], size) for kind, size in kinds.items() if size or kind != "branches"]
    rows += [(f"  {place}", size) for place, size in sorted(found["bytes"]["float"].items(), key=lambda row: -row[1])]
    rows += [("denoiser", denoiser), ("corrections of the sampler", found["scheduler"])]
    rows += [("header", found["file"] - denoiser - found["scheduler"]), ("file", found["file"])]
    lines += [f"{what:<40}{size:>15,} bytes  {size / full:8.4%} of float32" for what, size in rows]
    lines += ["", f"parameters           {parameters:,}"]
    lines += [f"bits per parameter   {8 * denoiser / parameters:.3f}"]
    lines += [f"compression          {denoiser / full:.4f} of float32, {full / denoiser:.2f} times smaller"]
    footprint = header.get("cost", {}).get("footprint")
    if header["weights"] == "float":
        lines[-1] += "; weights are in float32, for other methods to start from"
        lines[-1] += f" (packed: {footprint['bytes'] / full:.4f})" if footprint else ""
    if footprint:
        macs, bops = footprint["macs"], footprint["bops"]
        less = f"{macs * cost.FLOAT**2 / bops:.2f} times fewer than in float32"
        lines.append(f"bit operations       {bops / 1e12:.4g}e12 for one sample, {less} ({macs / 1e9:.4g}e9 MACs)")
        if beside := footprint.get("branch_bops"):
            lines.append(f"  of branches beside {beside / 1e12:.4g}e12 more, at 16 x 16 bits")
    else:
        lines.append("bit operations       not known: the file was not made by quest.quantize")
    return "\n".join(lines) + "\n"
