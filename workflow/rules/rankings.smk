# `snakemake rankings`: do cheap measures, such as distances to full precision and errors of layers, rank methods as endpoints
# do? Not part of `all`; it starts from the tables and checkpoints of the grid, and samples nothing.


rule rankings:
    input:
        expand("results/{name}/tables/{table}", name=NAME, table=["rankings.csv", "rankings.md", "breakage.csv"]),
        expand("results/{name}/figures/rankings.png", name=NAME),


rule layer_errors:
    input:
        script=project("workflow/scripts/layer_errors.py"),
        evaluation="results/{name}/{model}/evaluation.safetensors",
        checkpoints=lambda wc: [
            f"results/{wc.name}/{run.path}/model.safetensors"
            for run in RUNS
            if run.model == wc.model and run.method != "fp"
        ],
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


rule rankings_table:
    input:
        script=project("workflow/scripts/rankings.py"),
        main="results/{name}/tables/main.csv",
        paired="results/{name}/tables/paired.csv",
        layers=expand("results/{{name}}/{model}/layer_errors.csv", model=config["models"]),
    output:
        shown_tables("rankings.csv", "rankings.md", "breakage.csv", caption="rankings"),
        shown("results/{name}/figures/rankings.png", "rankings", "Figures", figure="rankings"),
    log:
        "results/{name}/tables/rankings.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    shell:
        "python -m workflow.scripts.rankings --main {input.main:q} --paired {input.paired:q} --layers {input.layers:q}"
        " -o results/{wildcards.name:q} > {log:q} 2>&1"
