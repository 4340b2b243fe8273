import json
import os
import re
from pathlib import Path

from snakemake.exceptions import WorkflowError

from quest.config import (
    FILES,
    ConfigError,
    Run,
    ablation_runs,
    check_names,
    missing_files,
    recipe_of,
    runs,
    seed_runs,
    start_of,
    starting_points,
    validate,
)
from quest.diffusion.models import MODELS
from quest.runtime.provenance import CONFIG, config_hash

try:
    check_names([*Path(workflow.basedir, "workflow/config").glob("*.yaml"), *workflow.overwrite_configfiles])
    validate(config)
except ConfigError as error:
    raise WorkflowError(str(error)) from None

NAME = config["name"]
RUNS = runs(config)
SEED_RUNS = seed_runs(config)
ABLATION_RUNS = ablation_runs(config)
STARTING_POINTS = starting_points(config, RUNS + SEED_RUNS + ABLATION_RUNS)
METHODS = [*config["methods"], *config.get("ablations", {}).get("rows", {})]
# {model, bits}: where what takes finetuning is measured; properties are, on each model.
QUESTIONS = config.get("questions", {})
DEVICE = config.get("device", "cpu")
CLIPS = {model.clip for model in MODELS.values() if model.clip}
# Per model, the bits in the order of the grid: what one sample grid compares.
CELLS = list(dict.fromkeys((run.model, run.bits) for run in RUNS if run.method != "fp"))
# Models whose images are kept and can be shown; of the others, features and latents are.
PICTURED = [model for model, settings in config["models"].items() if settings.get("keep_images", True)]
TABLES = ["main.csv", "main.md", "main.tex", "paired.csv", "eps_error.csv", "ledger.csv", "ledger.md", "ledger.tex"]
PAPER_TABLES = expand("table{number}.{kind}", number=range(2, 12), kind=["csv", "md", "tex"])
METRICS = ["fid", "sfid", "is", "latent_mse", "fid_to_fp", "eps_error"]
METRICS += ["psnr"] if PICTURED else []
METRICS += ["clip"] if any(MODELS[run.model].clip for run in RUNS) else []
CURVES = [f"{metric}_vs_bits" for metric in METRICS] + ["eps_error_vs_timestep"] if CELLS else []
CURVES += ["activation_ranges_vs_timestep"]
GRIDS = [f"samples-{model}-{bits}" for model, bits in CELLS if model in PICTURED]
# What the README shows: the last bits of each model in the grid, where methods differ most.
SHOWN = [f"samples-{model}-{bits}" for model, bits in dict(CELLS).items() if model in PICTURED]
SHOWN += [figure for figure in CURVES if figure.startswith(("latent_mse_vs_bits", "eps_error_vs_t", "activation"))]

# People read logs, also while the job runs: progress bars write to them every five seconds, not ten times a second.
# glibc gives large arrays back to the system when they are freed, and each new one is paid for in page faults: a fifth
# of the time of a quantized denoiser. These settings let a process keep them, in large pages; other C libraries ignore
# them. Text is UTF-8 whatever the locale, in what other packages read and write as well. What a job writes says with
# which config it was made.
shell.prefix(
    f"export {CONFIG}={config_hash(config)}"
    " PYTHONUTF8=1 TQDM_MININTERVAL=5 GLIBC_TUNABLES=glibc.malloc.hugetlb=1 MALLOC_TOP_PAD_=67108864"
    " MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824; "
)


wildcard_constraints:
    name=re.escape(NAME),
    model="|".join(map(re.escape, config["models"])),
    method=f"({'|'.join(map(re.escape, METHODS))})(@[0-9]+)?",
    draw=r"\d+",
    bits=r"w\d+a\d+",
    shard=r"\d+",


def shipped(name):
    """The weights in one folder of resources/zoo."""
    return sorted(str(file) for file in Path("resources/zoo", name).rglob("*.safetensors"))


def weights(wc):
    """A retrained model reruns its cells, and so does one that was made from another checkpoint."""
    return f"results/models/{wc.model}" if MODELS[wc.model].origin else shipped(wc.model)


def setting(key):
    """What the config says of a model under `key`, or nothing."""
    return lambda wc: config["models"][wc.model].get(key, [])


def given(key):
    """The file that the config names under `key`, as an input where it is there or made by a rule.

    One that is missing does not stop a plan: the job that needs it says what to put where.
    """

    def found(wc):
        path = config["models"][wc.model].get(key)
        return [path] if path and (Path(path).exists() or path.startswith("results/checkpoints/tiny-")) else []

    return found


def at_size(cpu, cuda):
    """A resource of a job: for the small models on a CPU, or for the paper's on a GPU."""
    return cuda if DEVICE == "cuda" else cpu


def growing(cpu, cuda=None):
    """Memory [MB] or time [minutes] of a job: as much again with every attempt, should `--retries` grant more of them."""
    first = at_size(cpu, cuda or cpu)
    return lambda wc, attempt: first * attempt


def networks(wc):
    """A retrained network of the metrics means other features; one that does not ship is fetched before the jobs."""
    model = MODELS[wc.model]
    return network(model.extractor) + (network(model.clip) if model.clip else [])


def network(name):
    """What stands for a network of the metrics: its shipped weights, or that those of its name were checked."""
    if name.startswith("scenes"):
        return shipped("scenes-clip" if name == "scenes-clip" else f"{name}-extractor")
    return [f"results/networks/{name if name in CLIPS else 'inception'}.json"]


def recipe(wc):
    """What the config says of one method; a change to it reruns that method and nothing else."""
    return json.dumps(recipe_of(config, wc.method)[1], sort_keys=True)


def calibration(wc):
    """The calibration set of a cell: a quantization seed has a draw of its own."""
    _, _, seed = wc.method.partition("@")
    draw = f"-{seed}" if seed else ""
    return f"results/{NAME}/{wc.model}/calibration{draw}.safetensors"


def init(wc):
    """The checkpoint a method starts from, if its recipe names one."""
    start = start_of(config, Run(wc.model, wc.method, wc.bits))
    return f"results/{NAME}/{start.path}/model.safetensors" if start else []


def floats(wc):
    """What another method starts from keeps float weights; what is only sampled from is packed."""
    return "--floats" if Run(wc.model, wc.method, wc.bits) in STARTING_POINTS else ""


def checkpoint_of(wc):
    """The quantized denoiser of a cell; full precision has none."""
    return [] if wc.method == "fp" else f"results/{NAME}/{wc.model}/{wc.method}/{wc.bits}/model.safetensors"


def shards(wc):
    return config["models"][wc.model].get("shards", 1)


def arrays(kind, model, method, bits):
    """The `kind` files ("samples" or "features") of one cell, all shards in order."""
    shards = range(config["models"][model].get("shards", 1))
    return [f"results/{NAME}/{model}/{method}/{bits}/{kind}-{shard}.npz" for shard in shards]


def cell(kind):
    return lambda wc: arrays(kind, wc.model, wc.method, wc.bits)


def full_precision(kind):
    """What the paired metrics compare with; made even where the grid leaves it out."""
    return lambda wc: arrays(kind, wc.model, "fp", "w32a32")


def reference(wc):
    """Statistics of real images: shipped, or made from what the config names; none where it says `reference: none`."""
    if config["models"][wc.model].get("reference") == "none":
        return []
    return os.path.relpath(MODELS[wc.model].reference)


def first_samples(wc):
    """The first shard of full precision and of every method at these bits: the rows of a sample grid."""
    methods = [run.method for run in RUNS if (run.model, run.bits) == (wc.model, wc.bits)]
    return [
        arrays("samples", *cell)[0] for cell in [(wc.model, "fp", "w32a32"), *((wc.model, m, wc.bits) for m in methods)]
    ]


def optional(wc):
    """What the report shows beyond its inputs, with the time each file was made."""
    patterns = ("tables/*.csv", "figures/*.png", "questions/*.md", "questions/**/*.png")
    files = [file for pattern in patterns for file in Path("results", NAME).glob(pattern)]
    files += [file for kind in ("csv", "md") for file in Path("results/kernels").glob(f"*.{kind}")]
    made = set(TABLES) | {f"{figure}.png" for figure in CURVES + GRIDS}
    return sorted(f"{file} {file.stat().st_mtime_ns}" for file in files if file.name not in made)


def question(key):
    """What the config's questions are asked of: its model or its bits."""
    if not QUESTIONS:
        raise WorkflowError("questions: the config has no such key; e.g. questions: {model: scenes-class, bits: w4a4}")
    return QUESTIONS[key]


def of_question(wc):
    """The run of QuEST that a job is about: of its own model, if it has one, else of the model of the questions."""
    return Run(getattr(wc, "model", None) or question("model"), "quest", question("bits"))


def asked(file):
    """A file of that run or of its model as an input."""

    def found(wc):
        run = of_question(wc)
        return f"results/{NAME}/{run.path if file == 'model.safetensors' else run.model}/{file}"

    return found


def started(wc):
    """What that run starts from."""
    start = start_of(config, of_question(wc))
    return f"results/{NAME}/{start.path}/model.safetensors" if start else []


def ablations_run(wc):
    """Measured rows of the ablations that lie there and are no cells of the grid: a plan runs none for the tables."""
    rows = [run for run in ABLATION_RUNS if run not in RUNS]
    metrics = [f"results/{wc.name}/{run.path}/metrics.json" for run in rows]
    return [path for path in metrics if Path(path).exists()]


def measured(wc):
    """Metrics of the grid's cells at the model and bits of the questions, and of those ablations that lie there."""
    run = of_question(wc)
    cell = f"results/{NAME}/{run.model}/{{}}/{run.bits}/metrics.json"
    ours = [cell.format(other.method) for other in RUNS if (other.model, other.bits) == (run.model, run.bits)]
    others = {cell.format(other.method) for other in ABLATION_RUNS}
    return ours + [path for path in ablations_run(wc) if path in others]


def shown(path, caption, category, **labels):
    """An output that is not empty, and that `snakemake --report` shows with workflow/report/{caption}.rst and labels."""
    return ensure(report(path, caption=f"../report/{caption}.rst", category=category, labels=labels), non_empty=True)
