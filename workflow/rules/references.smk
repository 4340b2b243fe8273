# Statistics of real images for the models whose own do not ship. Made once for all configs, like the models themselves:
# another source under the same model is another file name in the config, so `--forcerun reference` replaces them.
rule reference:
    output:
        "results/references/{model}.npz",
    log:
        "results/references/{model}.log",
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        mem_mb=8000,
        runtime=240,
    params:
        source=setting("reference"),
        extractor=lambda wc: MODELS[wc.model].extractor,
        size=lambda wc: config["models"][wc.model].get("resize", 256),
    shell:
        "python -m workflow.scripts.reference {params.source:q} --extractor {params.extractor} --size {params.size}"
        " --threads {threads} -o {output} > {log} 2>&1"
