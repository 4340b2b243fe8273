"""Quantized diffusion models, measured. `snakemake -n` shows what would run, `snakemake --cores all` runs it."""

from snakemake.utils import min_version

min_version("9.19")


include: "workflow/rules/paths.smk"


# With `--software-deployment-method apptainer` every job runs in this image: `apptainer build quest.sif apptainer.def`.
containerized: "quest.sif"


# Snakemake merges config files key by key, so a default loaded beside another config would leak its recipes into it.
if not workflow.overwrite_configfiles:

    configfile: project("workflow/config/default.yaml")


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/inputs.smk"
include: "workflow/rules/resources.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/quantize.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/references.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/nulls.smk"
include: "workflow/rules/rankings.smk"
include: "workflow/rules/questions.smk"
include: "workflow/rules/ablations.smk"
include: "workflow/rules/settle.smk"
include: "workflow/rules/search.smk"
include: "workflow/rules/leaderboard.smk"
include: "workflow/rules/zoo.smk"
include: "workflow/rules/kernels.smk"
include: "workflow/rules/growth.smk"


rule all:
    default_target: True
    input:
        expand("results/{name}/tables/{table}", name=NAME, table=TABLES),
        expand("results/{name}/figures/{figure}.png", name=NAME, figure=CURVES + GRIDS),


# A dry run needs no external files; a real run checks before its first job that all of them exist, and that the layers
# are there whose bits a recipe keeps.
onstart:
    jobs = list(workflow.dag.needrun_jobs())
    named = {"model": FILES[:-1], "reference": FILES[-1:]}
    lines = [
        line
        for job in jobs
        if job.rule.name in named
        for line in missing_files(config, job.wildcards.model, named[job.rule.name])
    ]
    # What the config's `memory` is too little for, by the plan's jobs.
    most = memory.parse(config["memory"]) if "memory" in config else math.inf
    for job in jobs:
        needed = of_plan(job.rule.name, job.wildcards).get("least_mb", 0) if PLANNED else 0
        if needed * 10**6 > most:
            cell = " ".join(job.wildcards)
            lines.append(
                f"{job.rule.name} {cell}: needs {needed / 1e3:.1f} GB; memory: {most / 1e9:.1f} GB is too little"
            )
    if lines:
        raise WorkflowError("; ".join(lines))
    wildcards = [job.wildcards for job in jobs if job.rule.name == "quantize"]
    try:
        keep.check(config, (Run(wc.model, wc.method, wc.bits) for wc in wildcards))
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


onerror:
    print(f"A job failed. Its own log, named above after 'log:', says why; Snakemake's log is {', '.join(log)}.")
