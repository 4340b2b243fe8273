# Not part of `all`. No output: it adds to the rows of this machine in a folder that is tracked, and runs whenever it is
# asked for. All cores, so that nothing else of a run falls into what it times.
rule kernels:
    input:
        script="workflow/scripts/kernels.py",
    log:
        "results/kernels/kernels.log",
    conda:
        "../../environment.yml"
    threads: lambda wc: workflow.cores
    resources:
        mem_mb=growing(16000),
        runtime=growing(60),
    shell:
        "python -m workflow.scripts.kernels --threads 1 {threads:q} > {log:q} 2>&1"
