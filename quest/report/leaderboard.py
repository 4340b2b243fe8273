"""The leaderboard: which submissions it takes, and what reveals one that breaks its rules. Needs no torch.

A submission is a folder `results/leaderboard/NAME` with `entry.yaml` and a packed checkpoint `model.safetensors` of the
model MODEL. A row of workflow/config/default.yaml needs no file: the workflow makes it. Who has no checkpoint sends the
judged images alone, whose rows stand below the others. Submissions are scored on the images of PROTOCOL.md.
docs/leaderboard.md has the rules for people.
"""

import hashlib
import math
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quest.diffusion.models import SEEDS
from quest.metrics import METRICS
from quest.quantization.header import FLOAT, read
from quest.report.rendering import MISSING, Column, Table, columns, interval
from quest.runtime.download import sha256_of
from quest.runtime.files import dumps, one_line
from quest.runtime.hashing import opened
from quest.runtime.yaml_files import read_yaml

MODEL = "photos-class"
FIRST, IMAGES = 500, 500  # the images that decide, as in PROTOCOL.md
SIDE = 32  # of an image, in pixels
FRESH = 100  # images that are drawn after the submissions were made, see `draw`
ENDPOINTS = ("kid_64w", "log_latent_mse", "psnr", "agreement")
ENDS, ENDS_BITS, SOFTMAX_BITS = ("conv_in", "conv_out"), 8, 8  # of the common stack (CONTRIBUTING.md)
# They read two tensors side by side, which have a scale each where the layer is split.
SPLITS = r"up_blocks\.\d+\.resnets\.\d+\.(conv1|conv_shortcut)"
LEVEL = 0.001  # of the test of `knows_the_images`
FOLDER = r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}"  # names of folders of submissions; their scores have a folder of this name
FULL = "full"  # the folder of full precision's scores, so no submission may have this name
MADE = "results/default"  # where the workflow makes the rows of default.yaml
FIELDS = {
    "name": (r"[\w.+ -]{1,60}", "a short name of the row"),
    "authors": (r"[^<>\[\]|`\r\n]{1,200}", "who made it, without links and markup"),
    "bits": (r"w[2-8]a[2-8]", "weight and activation bits, such as w4a4"),
    "recipe": (r"(?s).{20,5000}", "how to make the checkpoint again: commands or a config, and the commit"),
    "sha256": (
        r"[0-9a-f]{64}",
        "the hash of model.safetensors (sha256sum); with a row, that of `tensors_hash`; with images, that of --hash",
    ),
}
INSTEAD = {  # of a checkpoint beside entry.yaml
    "row": (r"[a-z0-9][a-z0-9-]{0,59}", "a row of workflow/config/default.yaml"),
    "images": (r"[A-Za-z0-9][A-Za-z0-9_-]{0,59}(\.npz)?", "a folder of images or an .npz file, beside entry.yaml"),
}
ONLY_IMAGES = "images only; bits and choice of images not checked"


@dataclass(frozen=True)
class Entry:
    """A submission that keeps the rules. calibration: the first and last seed of the images it was calibrated on.

    origin: "sent", or that it was made here, with the declared tensors or with others: they depend on the processor.
    ONLY_IMAGES: there is no checkpoint, so its bits and its calibration are what it says.
    """

    name: str
    authors: str
    bits: str
    recipe: str
    sha256: str
    calibration: tuple[int, int]
    folder: Path
    origin: str


def check(folder: str | Path) -> Entry:
    """Read a submission. Raises ValueError, which names the file and the rule, for one that breaks a rule."""
    folder = Path(folder)
    file, place = folder / "entry.yaml", folder.resolve().name
    if not is_place(place):
        raise ValueError(
            one_line(f"{folder}: the folder's name {place!r:.80}; valid: letters, digits, - and _, not {FULL!r}")
        )
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing; valid: name, authors and the other fields of docs/leaderboard.md")
    told = read_yaml(file)
    if not isinstance(told, dict) or (strange := (set(told) - INSTEAD.keys()) ^ {*FIELDS, "calibration"}):
        named = ", ".join(sorted(map(str, strange))) if isinstance(told, dict) else "no mapping"
        valid = ", ".join([*FIELDS, "calibration", *INSTEAD])
        raise ValueError(f"{file}: missing or unknown: {one_line(named)}; valid: {valid}")
    if INSTEAD.keys() <= set(told):
        raise ValueError(f"{file}: both row and images; valid: one of them, or none and a model.safetensors")
    fields = {field: _field(file, told, field) for field in (*FIELDS, *INSTEAD) if field in told}
    seeds = _seeds(file, told["calibration"])
    origin = _checked_images(folder, fields) if "images" in told else _checked_checkpoint(folder, fields)
    return Entry(**{field: fields[field] for field in FIELDS}, calibration=seeds, folder=folder, origin=origin)


def _checked_checkpoint(folder: Path, fields: dict) -> str:
    """Check the checkpoint of a submission. Returns its origin."""
    checkpoint = checkpoint_of(folder)
    if not checkpoint.is_file():
        made = f"`snakemake leaderboard` makes it where default.yaml has this row on {MODEL} at these bits"
        how = made if "row" in fields else "valid: a checkpoint that quest.save wrote"
        raise FileNotFoundError(f"{checkpoint}: missing; {how}")
    if "row" in fields:
        same = tensors_hash(checkpoint) == fields["sha256"]
        origin = "made here, as declared" if same else "made here, other tensors than declared"
    elif (found := sha256_of(checkpoint)) == fields["sha256"]:
        origin = "sent"
    else:
        raise ValueError(f"{checkpoint}: its SHA-256 is {found}, not the declared {fields['sha256']}")
    check_bits(checkpoint, fields["bits"])
    return origin


def _checked_images(folder: Path, fields: dict) -> str:
    """Check the images of a submission. Returns its origin."""
    place = folder / fields["images"]
    if (found := images_hash(judged_images(place))) != fields["sha256"]:
        raise ValueError(f"{place}: the SHA-256 of its images is {found}, not the declared {fields['sha256']}")
    return ONLY_IMAGES


def is_place(name: str) -> bool:
    """Whether a folder of a submission may have this name."""
    return re.fullmatch(FOLDER, name) is not None and name != FULL


def checkpoint_of(folder: Path) -> Path:
    """The checkpoint of a submission: the file beside its entry.yaml, or where the workflow makes its row.

    Raises ValueError for a row or bits that are not well formed.
    """
    told = read_yaml(folder / "entry.yaml")
    if not isinstance(told, dict) or "row" not in told:
        return folder / "model.safetensors"
    return Path(MADE, MODEL, declared(folder, "row"), declared(folder, "bits"), "model.safetensors")


def images_place(folder: Path) -> Path | None:
    """Where the images of a submission lie that has no checkpoint; None for one that has.

    Raises ValueError for a place that is not well formed.
    """
    told = read_yaml(folder / "entry.yaml")
    return folder / declared(folder, "images") if isinstance(told, dict) and "images" in told else None


def judged_images(place: Path) -> np.ndarray:
    """The images of a submission, uint8 [IMAGES, SIDE, SIDE, 3], by their index.

    place: a folder with one file for each, 00500.png to 00999.png, or an .npz file with all of them in this order.
    Raises FileNotFoundError or ValueError that names the file if one is missing, too many, damaged or of another size,
    or if two are identical: each has its own noise.
    """
    from quest.metrics.reference import read_images  # imports much that a plan does without

    images, names = read_images(place, size=SIDE)
    wanted = [f"{index:05}.png" for index in range(FIRST, FIRST + IMAGES)]
    if names is not None and (strange := sorted(set(names) ^ set(wanted))):
        raise ValueError(one_line(f"{place}: missing or unknown: {strange[0]}; valid: {wanted[0]} to {wanted[-1]}"))
    if len(images) != IMAGES:
        raise ValueError(f"{place}: {len(images)} images; valid: {IMAGES}, the images {FIRST} to {FIRST + IMAGES - 1}")
    first: dict[bytes, int] = {}
    for index, image in enumerate(images, FIRST):
        if (other := first.setdefault(image.tobytes(), index)) != index:
            raise ValueError(f"{place}: images {other} and {index} are identical; each begins with its own noise")
    return images


def images_hash(images: np.ndarray) -> str:
    """The hash of the pixels. It depends neither on the format of the files nor on what else they contain."""
    return hashlib.sha256(images.tobytes()).hexdigest()


def copies(sent: dict[str, np.ndarray], known: dict[str, np.ndarray]) -> dict[str, str]:
    """Why submissions with images are refused, by name: some images are, to the last bit, those of somebody else.

    sent: the images [N, H, W, 3] of each submission without a checkpoint. known: those of full precision and of the
    checkpoints.
    Of two submissions with the same image both are refused, but not for the sake of one that copied from `known`.
    Places do not matter. Two denoisers with other rounding errors make no identical image of this size.
    """
    refused = {name: why for name, images in sent.items() if (why := _copied(images, known))}
    rest = {name: images for name, images in sent.items() if name not in refused}
    for name, images in rest.items():
        if why := _copied(images, {other: theirs for other, theirs in rest.items() if other != name}):
            refused[name] = why
    return refused


def _copied(images, others):
    for name, theirs in others.items():
        known = {image.tobytes() for image in theirs}
        same = [index for index, image in enumerate(images, FIRST) if image.tobytes() in known]
        if same:
            return f"{len(same)} of its images are identical to images of {name}, the first of them {same[0]}"
    return None


def tensors_hash(checkpoint: Path) -> str:
    """The hash of all tensors of a checkpoint. Unlike the file's, it does not depend on the date in the header."""
    return hashlib.sha256(dumps(read(checkpoint)["hashes"], sort_keys=True).encode()).hexdigest()


def _seeds(file, told):
    whole = isinstance(told, list) and len(told) == 2 and all(type(seed) is int for seed in told)
    if not whole or not 0 <= told[0] <= told[1]:
        raise ValueError(one_line(f"{file}: calibration: {told!r:.80}; valid: [first seed, last seed] of its images"))
    if told[0] < SEEDS["calibration"] or told[1] >= SEEDS["validation"]:
        raise ValueError(
            f"{file}: calibration: seeds {told[0]} to {told[1]} are not all of the calibration split, "
            f"{SEEDS['calibration']} to {SEEDS['validation'] - 1}; images of evaluation are not for calibration"
        )
    return tuple(told)


def check_bits(checkpoint: Path, bits: str) -> None:
    """Raise ValueError, which names the layer, if a checkpoint computes anything with more bits than declared.

    The first and last layer and the softmax may have 8 bits. Every other weight, input and factor of an attention has
    at most the declared bits, with one static scale per tensor for activations (and for each time group) and one for
    each output channel for weights: a scale for each value would be a float weight. A branch multiplies floats, and a
    prologue scales or rotates channels of an input in float, so a layer has neither.
    """
    w, a = map(int, re.findall(r"\d+", bits))
    header = read(checkpoint)

    def refuse(where, what):
        raise ValueError(one_line(f"{checkpoint}: {where}: {what}; declared: {bits}"))

    if header.get("model") != MODEL:
        refuse("header", f"of the model {header.get('model')!r}, not {MODEL}")
    if header["weights"] != "codes":
        refuse("header", "its weights are floats, not packed codes")

    def compare(where, spec, most, kind):
        if spec["bits"] > most or spec["wide"]:
            shown = "float" if spec["bits"] == FLOAT else f"{spec['bits']} bits" + ", wide" * spec["wide"]
            refuse(where, f"its {kind} has {shown}, at most {most} are declared")
        if spec.get("rows") is not None:
            refuse(where, f"scales of its {kind} are computed while it runs; static ones are the rule")
        if spec.get("group") is not None:
            refuse(where, f"its {kind} has a scale for each group; one for an output channel is the rule")
        if kind != "weight" and spec["axis"] is not None:
            refuse(where, f"its {kind} has a scale for each channel; one for the tensor is the rule")

    for name in header["splits"]:
        if not re.fullmatch(SPLITS, name):
            refuse(name, "its input is split, so that parts of it have scales of their own; only in the decoder, once")
    for field, part in (("branches", "branch"), ("prologues", "prologue")):
        for name in header.get(field, {}):
            refuse(name, f"it has a {part}, which computes in float")
    for name, (weight, *activations) in header["layers"].items():
        ends = name in ENDS
        compare(name, weight, max(w, ENDS_BITS) if ends else w, "weight")
        for spec in activations:
            compare(name, spec, max(a, ENDS_BITS) if ends else a, "input")
    with opened(checkpoint, "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    for name, shape in shapes.items():
        if name.endswith(".weight") and len(shape) > 1:
            refuse(name.removesuffix(".weight"), "its weight is kept in float")
        layer = name.removesuffix(".weight_quantizer.scale")
        if layer in header["layers"] and name != layer:
            size = header["shapes"][layer]
            if math.prod(shape) > 1 and list(shape) != [1, size[0], *[1] * (len(size) - 1)]:
                refuse(layer, f"its weight has scales {list(shape)}; one for each output channel is the rule")
    for name in sorted({n.rpartition(".to_q")[0] for n in header["layers"] if n.endswith(".to_q")}):
        if name not in header["attentions"]:
            refuse(name, "its products are computed in float")
        *factors, probability = header["attentions"][name]
        for factor in factors:
            compare(name, factor, a, "query, key or value")
        compare(name, probability, max(a, SOFTMAX_BITS), "softmax")


def declared(folder: Path, field: str) -> str:
    """One field of a submission's entry.yaml, without the other checks; for the plan of a run."""
    return _field(folder / "entry.yaml", read_yaml(folder / "entry.yaml"), field)


def _field(file: Path, told, field: str) -> str:
    found = told.get(field) if isinstance(told, dict) else None
    pattern, valid = (FIELDS | INSTEAD)[field]
    if not isinstance(found, str) or not re.fullmatch(pattern, found.strip()):
        raise ValueError(one_line(f"{file}: {field}: {found!r:.80}; valid: {valid}"))
    return found.strip()


def draw() -> int:
    """Draw the index of the first fresh image, of the evaluation split and beyond all that the project itself uses.

    Who scores draws it, after the submissions were made. It must follow from nothing that a submitter controls: of an
    index that follows from the file, somebody who makes many files can choose the images that suit.
    """
    return FRESH * (100 + secrets.randbelow(9_000))  # whole batches of the sampler


def knows_the_images(judged: np.ndarray, fresh: np.ndarray) -> bool:
    """Whether a checkpoint is nearer to full precision on the judged images than chance allows.

    judged [N] and fresh [M]: log10 latent MSE to full precision of the judged and of fresh images, whose noise and
    classes have the same distribution. Welch's one-sided t-test at LEVEL.
    """
    from scipy import stats  # a quarter of Snakemake's own time, if every run imported it

    return bool(stats.ttest_ind(judged, fresh, equal_var=False, alternative="less").pvalue < LEVEL)


def table(scored: Iterable[tuple[Entry, dict]], refused: dict[str, str], first: int) -> Table:
    """The leaderboard: a row for each entry, by bits and then by the first endpoint, and then those that are refused.

    Entries without a checkpoint stand below all that have one. They have no latents.
    scored: entries with their metrics.json. refused: why, by folder. first: the index of the first fresh image.
    """
    heads = columns("bits", "name", "authors", "checkpoint", texts=4, choose=True)
    heads += [Column(METRICS[name].label, direction=METRICS[name].better) for name in ENDPOINTS]
    rows = []
    for entry, measured in scored:
        by_metric = {row["metric"]: row for row in measured["rows"]}
        cells = [
            MISSING
            if entry.origin == ONLY_IMAGES and name == "log_latent_mse"
            else interval(*(by_metric[name][k] for k in ("value", "low", "high")))
            for name in ENDPOINTS
        ]
        rows.append([entry.bits.upper(), entry.name, entry.authors, entry.origin, *cells])
    rows.sort(key=lambda row: (row[3] == ONLY_IMAGES, row[0], row[4].value))
    only_images = any(row[3] == ONLY_IMAGES for row in rows)
    for name, why in sorted(refused.items()):
        rows.append(["–", _without_markup(name), "–", f"refused: {_without_markup(why)}", *[MISSING] * len(ENDPOINTS)])
    notes = [
        f"{MODEL}, images {FIRST} to {FIRST + IMAGES - 1} of evaluation, ± half of a 95 % interval over images. "
        f"Fresh images: {first} to {first + FRESH - 1}."
    ]
    if only_images:
        notes.append(
            "Images only: without a checkpoint, its bits, its calibration and how its images were chosen are what its "
            "authors say, and there are neither latents nor fresh images. These rows stand below all others."
        )
    return Table(heads, rows, title="Leaderboard", notes=notes)


def _without_markup(text: str) -> str:
    """A text of a submission, which its rules did not check, without what makes links, pictures and HTML of it."""
    return text.translate(str.maketrans("[]<>`", "()‹›'"))
