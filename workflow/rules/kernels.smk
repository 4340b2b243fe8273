# Not part of `all`. It has no output, because it adds rows for this machine to a tracked folder, so it always runs when
# it is requested. It takes all cores, so that no other job disturbs the times.
rule kernels:
    input:
        script=project("workflow/scripts/kernels.py"),
    log:
        "results/kernels/kernels.log",
    conda:
        "../../environment.yml"
    threads: lambda wc: workflow.cores
    resources:
        **needs(16000, 60),
    shell:
        "python -m workflow.scripts.kernels --threads 1 {threads:q} > {log:q} 2>&1"
