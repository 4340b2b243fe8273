# `snakemake rankings`: do cheap measures, such as distances to full precision and errors of layers, rank methods as endpoints
# do? Not part of `all`; it starts from the tables and checkpoints of the grid, and samples nothing.


rule layer_errors:
    input:
        script=project("workflow/scripts/layer_errors.py"),
        evaluation="results/{name}/{model}/evaluation.safetensors",
        checkpoints=lambda wc: files_of(
            [run for run in RUNS if run.model == wc.model and run.method != "fp"], "model.safetensors"
        ),
    output:
        ensure("results/{name}/{model}/layer_errors.csv", non_empty=True),
    log:
        "results/{name}/{model}/layer_errors.log",
    conda:
        "../../environment.yml"
    resources:
        **needs((3000, 64000), (30, 720), gpu=True),
    params:
        device=DEVICE,
    shell:
        "python -m workflow.scripts.layer_errors {wildcards.model:q} --evaluation {input.evaluation:q}"
        " --checkpoints {input.checkpoints:q} --threads {threads:q} --device {params.device:q} -o {output:q} > {log:q} 2>&1"


rule rankings:
    input:
        script=project("workflow/scripts/rankings.py"),
        main=f"results/{NAME}/tables/main.csv",
        paired=f"results/{NAME}/tables/paired.csv",
        layers=expand("results/{name}/{model}/layer_errors.csv", name=NAME, model=config["models"]),
    output:
        shown_tables("rankings.csv", "rankings.md", "breakage.csv", caption="rankings"),
        shown(f"results/{NAME}/figures/rankings.png", "rankings", "Figures", figure="rankings"),
    log:
        f"results/{NAME}/tables/rankings.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    params:
        folder=subpath(output[0], ancestor=2),
    shell:
        "python -m workflow.scripts.rankings --main {input.main:q} --paired {input.paired:q} --layers {input.layers:q}"
        " -o {params.folder:q} > {log:q} 2>&1"
