# `snakemake nulls`: full precision against itself, in ways that are all full precision. Not part of `all`. Tables use the
# floors that it measures, where it has run: a difference below the floor is no verdict.

rule nulls:
    input:
        expand("results/{name}/tables/nulls.{kind}", name=NAME, kind=["csv", "md"]),


rule null_table:
    input:
        script=project("workflow/scripts/nulls.py"),
        metrics=expand("results/{{name}}/{model}/{null}/w32a32/metrics.json", model=config["models"], null=NULLS),
    output:
        shown_tables("nulls.csv", "nulls.md"),
    log:
        "results/{name}/tables/nulls.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    shell:
        "python -m workflow.scripts.nulls {input.metrics:q} -o results/{wildcards.name:q}/tables > {log:q} 2>&1"
