# `snakemake nulls`: full precision against itself, in ways that are all full precision. Not part of `all`. Tables use the
# floors that it measures, where it has run: a difference below the floor is no verdict.


rule nulls:
    input:
        script=project("workflow/scripts/tables.py"),
        metrics=files_of(Run(model, null, "w32a32") for model in config["models"] for null in NULLS),
    output:
        shown_tables("nulls.csv", "nulls.md"),
    log:
        f"results/{NAME}/tables/nulls.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    params:
        folder=subpath(output[0], parent=True),
    shell:
        "python -m workflow.scripts.tables {input.metrics:q} --kind nulls -o {params.folder:q} > {log:q} 2>&1"
