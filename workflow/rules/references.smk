# Statistics of real images for models whose statistics do not ship. Like the models they are made once for all configs;
# after naming another source for a model, use `--forcerun reference` to replace its statistics.
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
        **needs(8000, 240, gpu=True),
    params:
        source=setting("reference"),
        extractor=lambda wc: MODELS[wc.model].extractor,
        size=lambda wc: config["models"][wc.model].get("resize", 256),
        device=DEVICE,
    shell:
        "python -m workflow.scripts.reference {params.source:q} --extractor {params.extractor:q} --size {params.size:q}"
        " --threads {threads:q} --device {params.device:q} -o {output:q} > {log:q} 2>&1"


# Downloads Inception and CLIP if they are missing, and checks them. This runs before the jobs that use them, because jobs
# that start together would download one file to the same place.
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
    resources:
        **needs(1000, 60),
    shell:
        "python -m workflow.scripts.network {wildcards.network:q} -o {output:q} > {log:q} 2>&1"
