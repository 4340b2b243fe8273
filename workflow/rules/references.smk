# Statistics of real images for the models whose own do not ship. Made once for all configs, like the models themselves:
# another source under the same model is another file name in the config, so `--forcerun reference` replaces them.
rule reference:
    input:
        networks=networks,
    output:
        ensure("results/references/{model}.npz", non_empty=True),
    log:
        "results/references/{model}.log",
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        mem_mb=growing(8000),
        runtime=growing(240),
        gpu=at_size(0, 1),
    params:
        source=setting("reference"),
        extractor=lambda wc: MODELS[wc.model].extractor,
        size=lambda wc: config["models"][wc.model].get("resize", 256),
        device=DEVICE,
    shell:
        "python -m workflow.scripts.reference {params.source:q} --extractor {params.extractor:q} --size {params.size:q}"
        " --threads {threads:q} --device {params.device:q} -o {output:q} > {log:q} 2>&1"


# Inception and CLIP, fetched unless they lie there, and checked. Before the jobs that use them: many jobs that start at
# once would fetch one file into one place.
rule network:
    output:
        ensure("results/networks/{network}.json", non_empty=True),
    log:
        "results/networks/{network}.log",
    wildcard_constraints:
        network="inception|ViT-B-16",
    localrule: True
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=60,
    shell:
        "python -m workflow.scripts.network {wildcards.network:q} -o {output:q} > {log:q} 2>&1"
