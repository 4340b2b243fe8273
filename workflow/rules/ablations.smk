# Not part of `all`. Each row changes one setting of one model.
rule ablations:
    input:
        script=project("workflow/scripts/ablations.py"),
        metrics=files_of(ABLATION_RUNS),
        floors=floors,
        checkpoints=files_of(ABLATION_RUNS, "model.safetensors"),
    output:
        csv=f"results/{NAME}/tables/ablations.csv",
        markdown=f"results/{NAME}/tables/ablations.md",
        figure=f"results/{NAME}/figures/ablations.png",
    log:
        f"results/{NAME}/tables/ablations.log",
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
use rule tables as paper_tables with:
    input:
        script=project("workflow/scripts/tables.py"),
        published=project("resources/published.csv"),
        metrics=lambda wc: files_of(RUNS) + ablations_run(wc),
    output:
        expand("results/{name}/tables/{table}", name=NAME, table=PAPER_TABLES),
    log:
        f"results/{NAME}/tables/paper_tables.log",
    params:
        kind="paper",
        folder=subpath(output[0], parent=True),


# Not part of `all`. Models with the outlier dial at 1, 4 and 16: workflow/config/outliers.yaml.
use rule tables as outliers with:
    input:
        script=project("workflow/scripts/tables.py"),
        metrics=files_of(RUNS),
        floors=floors,
    output:
        shown_tables("outliers.csv", "outliers.md"),
    log:
        f"results/{NAME}/tables/outliers.log",
    params:
        kind="outliers",
        folder=subpath(output[0], parent=True),
