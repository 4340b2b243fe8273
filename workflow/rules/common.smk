import json
import math
import os
import re
import shlex
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError

from quest.config import (
    FILES,
    FULL_PRECISION,
    ConfigError,
    Run,
    ablation_runs,
    check_names,
    missing_files,
    parts_of,
    recipe_of,
    runs,
    seed_runs,
    start_of,
    starting_points,
    validate,
)
from quest.config.schema import renamed
from quest.config.searched import starts as search_starts
from quest.config.settled import families as families_of
from quest.config.settled import lottery_runs, settled_runs
from quest.diffusion.declared import PROTOCOL, of_config
from quest.diffusion.models import find
from quest.diffusion.nulls import KINDS
from quest.metrics import LITE0, SHIPPED_CLIPS
from quest.planning import keep
from quest.report.settle import SEEDS
from quest.runtime import memory
from quest.runtime.files import read_rows
from quest.runtime.provenance import CONFIG, config_hash

HOURS = config.pop("hours", None)  # of `snakemake settle --config hours=6`; no setting of a result
if HOURS is not None and (not isinstance(HOURS, (int, float)) or isinstance(HOURS, bool) or HOURS <= 0):
    raise WorkflowError(f"hours: {HOURS!r} is no number above 0")

try:
    check_names([*Path(workflow.basedir, "workflow/config").glob("*.yaml"), *workflow.overwrite_configfiles])
    config.update(renamed(config))
    validate(config)
except ConfigError as error:
    raise WorkflowError(str(error)) from None

MODELS = of_config(config)
NAME = config["name"]
RUNS = runs(config)
SEED_RUNS = seed_runs(config)
ABLATION_RUNS = ablation_runs(config)
SETTLE_RUNS = settled_runs(config, SEEDS)
LOTTERY_RUNS = lottery_runs(config)
STARTED = round(time.time())
SEARCH_STARTS = search_starts(config) if "search" in config else []
# {model, bits}: the cell whose questions need finetuning. Properties are measured on every model.
QUESTIONS = config.get("questions", {})
QAT_SEEDS = 2  # quantization seeds of the question that compares training with data and without
QUESTION_RUNS = [
    Run(QUESTIONS["model"], f"quest-suite@{seed}", QUESTIONS["bits"]) for seed in range(1, QAT_SEEDS) if QUESTIONS
]
STARTING_POINTS = (
    starting_points(config, RUNS + SEED_RUNS + ABLATION_RUNS + SETTLE_RUNS + LOTTERY_RUNS + QUESTION_RUNS)
    + SEARCH_STARTS
)
METHODS = [*config["methods"], *config.get("ablations", {}).get("rows", {})]
DEVICE = config.get("device", "cpu")
GPU_PARTS = config.get("share_gpu", {}).get("parts", 1)  # of one GPU, see resources.smk
# Null controls: full precision, sampled in another way. Method -> kind.
NULLS = {f"fp-{kind}": kind for kind in KINDS if DEVICE == "cpu" or kind in ("batches", "bf16")}
NULL_IMAGES = 100
CLIPS = {model.clip for model in MODELS.values() if model.clip}
# (model, bits) in the order of the grid. Each pair has one grid of samples.
CELLS = list(dict.fromkeys((run.model, run.bits) for run in RUNS if run.method != "fp"))
# Models whose images are kept, so that the report can show them; other models keep only features and latents.
PICTURED = [model for model, settings in config["models"].items() if settings.get("keep_images", True)]
TABLES = ["main.csv", "main.md", "main.tex", "paired.csv", "eps_error.csv", "ledger.csv", "ledger.md", "ledger.tex"]
PAPER_TABLES = expand("table{number}.{kind}", number=range(2, 12), kind=["csv", "md", "tex"])
METRICS = ["is", "latent_mse", "eps_error"]
for lite0, to_real, to_fp in ((True, ["kid_64w"], ["fd_64w_to_fp"]), (False, ["fid", "sfid"], ["fid_to_fp"])):
    of_kind = [MODELS[name] for name in config["models"] if (MODELS[name].extractor in LITE0) == lite0]
    METRICS += to_real if any(model.reference for model in of_kind) else []
    METRICS += to_fp if of_kind else []
METRICS += ["psnr"] if PICTURED else []
METRICS += ["clip"] if any(MODELS[run.model].clip for run in RUNS) else []
CURVES = [f"{metric}_vs_bits" for metric in METRICS] + ["eps_error_vs_timestep"] if CELLS else []
CURVES += ["activation_ranges_vs_timestep"]
GRIDS = [f"samples-{model}-{bits}" for model, bits in CELLS if model in PICTURED]
# Figures of docs/results.md: for each model the last bits in the grid, at which methods differ most.
SHOWN = [f"samples-{model}-{bits}" for model, bits in dict(CELLS).items() if model in PICTURED]
SHOWN += [figure for figure in CURVES if figure.startswith(("latent_mse_vs_bits", "eps_error_vs_t", "activation"))]

# Progress bars write to logs every five seconds instead of ten times a second, so that logs stay readable.
# glibc returns freed large arrays to the system, so every new array costs page faults: a fifth of the time of a
# quantized denoiser. These settings let a process keep that memory, in large pages; other C libraries ignore them.
# PYTHONUTF8 makes text UTF-8 in every locale, also in other packages. Jobs write the config's hash into their results.
# `memory` is in the environment, since it changes no result: jobs should not run again where it changes.
shell.prefix(
    (f"export PYTHONPATH={shlex.quote(str(CLONE))}; " if CLONE else "")
    + f"export {CONFIG}={config_hash(config)} {memory.VARIABLE}={config.get('memory', '')!r} PARTS_OF_GPU={GPU_PARTS}"
    " PYTHONUTF8=1 TQDM_MININTERVAL=5 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_TOP_PAD_=67108864"
    " MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824; "
)


wildcard_constraints:
    name=re.escape(NAME),
    model="|".join(map(re.escape, config["models"])),
    method=rf"({'|'.join(map(re.escape, METHODS))})(@[0-9]+(\.[0-9]+)?)?|{'|'.join(NULLS)}",
    draw=r"\d+",
    bits=r"w\d+a\d+",
    shard=r"\d+",


def files_of(runs, file="metrics.json"):
    """A file of each of these cells."""
    return [f"results/{NAME}/{run.path}/{file}" for run in runs]


def shipped(name):
    """The files with weights in one folder of resources/zoo."""
    return sorted(str(file) for file in Path(project("resources/zoo"), name).rglob("*.safetensors"))


def weights(wc):
    """The weights of a model as inputs, so that its cells run again after it was retrained or converted anew."""
    model = MODELS[wc.model]
    return f"results/models/{wc.model}" if model.origin else shipped(model.folder.name)


def setting(key):
    """The value of `key` in the config of a model, or []."""
    return lambda wc: config["models"][wc.model].get(key, [])


def file_setting(key):
    """The file that the config names under `key`, as an input if it exists or a rule makes it.

    A missing file does not stop a dry run; the job that needs it says what to put where.
    """

    def paths(wc):
        path = config["models"][wc.model].get(key)
        return [path] if path and (Path(path).exists() or path.startswith("results/checkpoints/tiny-")) else []

    return paths


def declaration(wc):
    """What the config says of a model that it declares itself, as JSON; [] for one of the suite."""
    settings = config["models"][wc.model]
    keys = ("pipeline", *PROTOCOL, "reference")
    return json.dumps({k: settings[k] for k in keys if k in settings}) if "pipeline" in settings else []


def pipeline_files(wc):
    """The files of a pipeline that the config names, so that its model is recorded anew when one of them changes."""
    folder = config["models"][wc.model].get("pipeline")
    return sorted(str(file) for file in Path(folder).rglob("*") if file.is_file()) if folder else []


def networks(wc):
    """The networks of the metrics as inputs: a retrained one gives other features, others are downloaded first."""
    model = MODELS[wc.model]
    return [file for name in (model.extractor, model.clip, model.classifier) if name for file in network(name)]


def network(name):
    """The input that represents a network: its shipped weights, or the record that its download was checked."""
    if name == "scenes":
        return shipped("scenes-extractor")
    if name in SHIPPED_CLIPS or name == "photos-classifier":
        return shipped(name)
    if name in LITE0:
        return [project(f"resources/reference/{name}.safetensors")]
    return [f"results/networks/{name if name in CLIPS else 'inception'}.json"]


def recipe(wc):
    """The config's recipe of one method, as a parameter; a change to it reruns that method only."""
    return json.dumps(recipe_of(config, wc.method)[1], sort_keys=True)


def calibration_draw(wc):
    """The flag that says how many trajectories a calibration set has."""
    return ["-n", config["models"][wc.model].get("trajectories", MODELS[wc.model].trajectories)]


def calibration(wc):
    """The calibration set of a cell; each quantization seed has its own draw of trajectories."""
    _, draw, _ = parts_of(wc.method)
    draw = f"-{draw}" if draw else ""
    return f"results/{NAME}/{wc.model}/calibration{draw}.safetensors"


def init(wc):
    """The checkpoint that a method starts from, if its recipe names one."""
    start = start_of(config, Run(wc.model, wc.method, wc.bits))
    return f"results/{NAME}/{start.path}/model.safetensors" if start else []


def floats(wc):
    """The flag that keeps float weights if another method starts from this checkpoint; otherwise weights are packed."""
    return "--floats" if Run(wc.model, wc.method, wc.bits) in STARTING_POINTS else ""


def checkpoint_of(wc):
    """The quantized denoiser of a cell; full precision has none."""
    return [] if wc.bits == FULL_PRECISION[1] else f"results/{NAME}/{wc.model}/{wc.method}/{wc.bits}/model.safetensors"


def shards(model, method):
    """Number of files in which the images of a cell lie; one of a null control, which has few."""
    return 1 if method in NULLS else config["models"][model].get("shards", 1)


def images(wc):
    """Number of images of a cell."""
    count = config["models"][wc.model]["images"]
    return min(NULL_IMAGES, count) if wc.method in NULLS else count


def sampled_images(wc):
    """Flags of sampling: which image is the first, and whether images are kept."""
    first = config["models"][wc.model].get("first", 0)
    return ["--first", first] * bool(first) + ["--drop-images"] * (wc.model not in PICTURED)


def arrays(kind, model, method, bits):
    """The `kind` files ("samples" or "features") of one cell, all shards in order."""
    folder = f"results/{NAME}/{model}/{method}/{bits}"
    return [f"{folder}/{kind}-{shard}.npz" for shard in range(shards(model, method))]


def cell(kind):
    return lambda wc: arrays(kind, wc.model, wc.method, wc.bits)


def full_precision(kind):
    """The full-precision files that paired metrics compare with, even if the grid does not list full precision."""
    return lambda wc: arrays(kind, wc.model, "fp", "w32a32")


def reference(wc):
    """Statistics of real images: shipped, or made from the file in the config; [] if it says `reference: none`."""
    if config["models"][wc.model].get("reference") == "none" or MODELS[wc.model].reference is None:
        return []
    return os.path.relpath(MODELS[wc.model].reference)


def first_samples(wc):
    """The first shard of full precision and of every method at these bits: the rows of a sample grid."""
    methods = [run.method for run in RUNS if (run.model, run.bits) == (wc.model, wc.bits)]
    return [
        arrays("samples", *cell)[0] for cell in [(wc.model, "fp", "w32a32"), *((wc.model, m, wc.bits) for m in methods)]
    ]


def optional(wc):
    """Files that the report shows in addition to its inputs, if they exist, each with its modification time."""
    patterns = ("tables/*.csv", "figures/*.png", "questions/*.md", "questions/**/*.png")
    files = [file for pattern in patterns for file in Path("results", NAME).glob(pattern)]
    files += [file for kind in ("csv", "md") for file in Path("results/kernels").glob(f"*.{kind}")]
    inputs = set(TABLES) | {f"{figure}.png" for figure in CURVES + GRIDS}
    return sorted(f"{file} {file.stat().st_mtime_ns}" for file in files if file.name not in inputs)


def ablations_run(wc):
    """Metrics of ablations that exist and are not cells of the grid; the tables do not cause ablations to run."""
    rows = [run for run in ABLATION_RUNS if run not in RUNS]
    return [path for path in files_of(rows) if Path(path).exists()]


def floors(wc):
    """The floors of `snakemake nulls` where it has run; tables do not cause it to run."""
    path = f"results/{NAME}/tables/nulls.csv"
    return [path] if Path(path).exists() else []


def measured(wc):
    """Metrics of the grid's cells at the model and bits of the questions, and of ablations that exist already."""
    run = of_question(wc)
    at = (run.model, run.bits)
    others = files_of(other for other in ABLATION_RUNS if (other.model, other.bits) == at)
    ours = files_of(other for other in RUNS if (other.model, other.bits) == at)
    return ours + [path for path in ablations_run(wc) if path in others]


def shown(path, caption, category, **labels):
    """An output that must not be empty and that `snakemake --report` shows, with workflow/report/{caption}.rst."""
    return ensure(report(path, caption=f"../report/{caption}.rst", category=category, labels=labels), non_empty=True)


def shown_tables(*files, caption=None):
    """Tables of a run as such outputs; the default caption of a table is the one of its name."""
    return [
        shown(f"results/{NAME}/tables/{file}", caption or stem, "Tables", table=stem, kind=kind)
        for file in files
        for stem, _, kind in [file.partition(".")]
    ]


def seeds_and_full_precision():
    """The cells of `seeds`, and full precision of their models where the grid has it."""
    models = {run.model for run in SEED_RUNS}
    return [*SEED_RUNS, *(run for run in RUNS if run.method == FULL_PRECISION[0] and run.model in models)]


def leaderboard_folder(place):
    return Path("results/leaderboard", place)


def submitted(wc):
    """The checkpoint or the images of a submission, where they are there or the workflow can make them.

    The check names what is missing.
    """
    folder = leaderboard_folder(wc.entry)
    try:
        file = leaderboard.images_place(folder) or leaderboard.checkpoint_of(folder)
    except ValueError:
        return []
    made = file.is_relative_to(leaderboard.MADE) and NAME == Path(leaderboard.MADE).name
    wanted = {run.path for run in RUNS}
    return [file] if file.exists() or made and str(file.parent.relative_to(leaderboard.MADE)) in wanted else []


def judged_part(place):
    """The judged images of a submission: "images" if it sent them, "judged" if its checkpoint makes them."""
    return "images" if leaderboard.images_place(leaderboard_folder(place)) else "judged"


def scores(wc):
    """What the table reads of each submission that the check has not refused. Images have no fresh ones beside them."""
    found = []
    for entry in ENTRIES:
        checked = checkpoints.leaderboard_check.get(entry=entry).output[0]
        if json.loads(Path(checked).read_text(encoding="utf-8"))["refused"] is None:
            found.append(f"results/scored/{entry}/metrics.json")
            if judged_part(entry) == "judged":
                found.append(f"results/scored/{entry}/samples-fresh.npz")
    return found
