# `snakemake growth`: how processor time and memory of jobs grow. Not part of `all`. A quarter of an hour of one core.
rule growth:
    input:
        script=project("workflow/scripts/growth.py"),
    output:
        multiext("results/growth/growth", ".csv", ".md", ".png"),
    log:
        "results/growth/growth.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(8000, 60),
    params:
        folder=subpath(output[0], parent=True),
    shell:
        "python -m workflow.scripts.growth -o {params.folder:q} > {log:q} 2>&1"
