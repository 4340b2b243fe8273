"""Every method the suite can run. To add one: write a file that exports `METHOD`, and add its name to MODULES."""

from importlib import import_module

from baselines.method import Method

MODULES = (
    "full_precision",
    "rtn",
    "dynamic",
    "smoothquant",
    "hadamard",
    "dilate",
    "mixed_precision",
    "adaround",
    "gptq",
    "svdquant",
    "dmq",
    "fp4",
    "ptq4dm",
    "q_diffusion",
    "ptqd",
    "tfmq_dm",
    "efficient_dm",
    "full_finetune",
    "qalora",
    "quest",
)

METHODS: dict[str, Method] = {
    row.name: row for module in MODULES for row in import_module(f"baselines.{module}").METHOD.rows()
}
