# Not part of `all`. Each row changes one setting of one model.
rule ablations:
    input:
        expand("results/{name}/tables/ablations.{kind}", name=NAME, kind=["csv", "md"]),
        expand("results/{name}/figures/ablations.png", name=NAME),


rule ablation_table:
    input:
        script=project("workflow/scripts/ablations.py"),
        metrics=expand("results/{{name}}/{run}/metrics.json", run=[run.path for run in ABLATION_RUNS]),
        floors=floors,
        checkpoints=expand("results/{{name}}/{run}/model.safetensors", run=[run.path for run in ABLATION_RUNS]),
    output:
        csv="results/{name}/tables/ablations.csv",
        markdown="results/{name}/tables/ablations.md",
        figure="results/{name}/figures/ablations.png",
    log:
        "results/{name}/tables/ablations.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    params:
        ablations=json.dumps(config.get("ablations", {}), sort_keys=False),
    shell:
        "python -m workflow.scripts.ablations {input.metrics:q} --ablations {params.ablations:q} --csv {output.csv:q}"
        " --markdown {output.markdown:q} --figure {output.figure:q} > {log:q} 2>&1"


# Not part of `all`. The paper's tables, with the cells of the grid and with the ablations that have already run.
rule paper_tables:
    input:
        expand("results/{name}/tables/{table}", name=NAME, table=PAPER_TABLES),


rule paper_table:
    input:
        script=project("workflow/scripts/paper_tables.py"),
        published=project("resources/published.csv"),
        metrics=expand("results/{{name}}/{run}/metrics.json", run=[run.path for run in RUNS]),
        ablations=ablations_run,
    output:
        expand("results/{{name}}/tables/{table}", table=PAPER_TABLES),
    log:
        "results/{name}/tables/paper_tables.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    shell:
        "python -m workflow.scripts.paper_tables {input.metrics:q} {input.ablations:q} -o results/{wildcards.name:q}/tables"
        " > {log:q} 2>&1"


# Not part of `all`. Models with the outlier dial at 1, 4 and 16: workflow/config/outliers.yaml.
rule outliers:
    input:
        expand("results/{name}/tables/outliers.{kind}", name=NAME, kind=["csv", "md"]),


rule outliers_table:
    input:
        script=project("workflow/scripts/outliers.py"),
        metrics=expand("results/{{name}}/{run}/metrics.json", run=[run.path for run in RUNS]),
        floors=floors,
    output:
        shown_tables("outliers.csv", "outliers.md"),
    log:
        "results/{name}/tables/outliers.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    shell:
        "python -m workflow.scripts.outliers {input.metrics:q} -o results/{wildcards.name:q}/tables > {log:q} 2>&1"
