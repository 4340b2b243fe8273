import json
import re
from pathlib import Path

from snakemake.exceptions import WorkflowError

from quest.config import ConfigError, check_names, runs, validate
from quest.models import MODELS

try:
    validate(config)
    check_names([*Path(workflow.basedir, "workflow/config").glob("*.yaml"), *workflow.overwrite_configfiles])
except ConfigError as error:
    raise WorkflowError(str(error)) from None

NAME = config["name"]
RUNS = runs(config)
CELLS = sorted({(run.model, run.bits) for run in RUNS if run.method != "fp"})
TABLES = ["main.csv", "main.md", "main.tex", "paired.csv", "eps_error.csv"]

# People read logs, also while the job runs: progress bars write to them every five seconds, not ten times a second.
shell.prefix("export TQDM_MININTERVAL=5; ")


wildcard_constraints:
    name=re.escape(NAME),
    model="|".join(map(re.escape, config["models"])),
    method="|".join(map(re.escape, config["methods"])),
    bits=r"w\d+a\d+",
    shard=r"\d+",


def weights(wc):
    """The shipped files of a model: a retrained model reruns its cells."""
    return sorted(str(file) for file in Path("resources/zoo", wc.model).rglob("*.safetensors"))


def recipe(wc):
    """What the config says of one method; a change to it reruns that method and nothing else."""
    return json.dumps(config["methods"][wc.method], sort_keys=True)


def init(wc):
    """The checkpoint a method starts from, if its recipe names one."""
    start = config["methods"][wc.method].get("init")
    return f"results/{NAME}/{wc.model}/{start}/{wc.bits}/model.safetensors" if start else []


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
    return str(Path(MODELS[wc.model].reference).relative_to(Path.cwd()))
