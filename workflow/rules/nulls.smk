# `snakemake nulls`: full precision against itself, in ways that are all full precision. Not part of `all`. Tables use the
# floors that it measures, where it has run: a difference below the floor is no verdict.

NULL_IMAGES = 100
NULLS = [kind for kind in KINDS if DEVICE == "cpu" or kind in ("batches", "bf16")]


rule nulls:
    input:
        expand("results/{name}/tables/nulls.{kind}", name=NAME, kind=["csv", "md"]),


rule null_sample:
    input:
        script=project("workflow/scripts/sample.py"),
        evaluation="results/{name}/{model}/evaluation.safetensors",
        networks=networks,
    output:
        samples=ensure("results/{name}/{model}/fp-{null}/w32a32/samples-0.npz", non_empty=True),
        features=ensure("results/{name}/{model}/fp-{null}/w32a32/features-0.npz", non_empty=True),
    log:
        "results/{name}/{model}/fp-{null}/w32a32/sample-0.log",
    wildcard_constraints:
        null="|".join(NULLS),
    conda:
        "../../environment.yml"
    resources:
        **needs((3000, 64000), (60, 1440), gpu=True),
    params:
        n=lambda wc: min(NULL_IMAGES, config["models"][wc.model]["images"]),
        images=sampled_images,
        device=DEVICE,
    shell:
        "python -m workflow.scripts.sample {wildcards.model:q} --null {wildcards.null:q} -n {params.n:q} {params.images:q}"
        " --evaluation {input.evaluation:q} --threads {threads:q} --device {params.device:q} --samples {output.samples:q}"
        " --features {output.features:q} > {log:q} 2>&1"


rule null_metrics:
    input:
        script=project("workflow/scripts/metrics.py"),
        features="results/{name}/{model}/fp-{null}/w32a32/features-0.npz",
        samples="results/{name}/{model}/fp-{null}/w32a32/samples-0.npz",
        fp_features=full_precision("features"),
        fp_samples=full_precision("samples"),
        reference=reference,
    output:
        ensure("results/{name}/{model}/fp-{null}/w32a32/metrics.json", non_empty=True),
    log:
        "results/{name}/{model}/fp-{null}/w32a32/metrics.log",
    wildcard_constraints:
        null="|".join(NULLS),
    conda:
        "../../environment.yml"
    resources:
        **needs((1500, 32000), (15, 60)),
    shell:
        "python -m workflow.scripts.metrics {wildcards.model:q} fp-{wildcards.null:q} w32a32 --null"
        " --features {input.features:q} --samples {input.samples:q} --fp-features {input.fp_features:q}"
        " --fp-samples {input.fp_samples:q} --reference {input.reference:q} -o {output:q} > {log:q} 2>&1"


rule null_table:
    input:
        script=project("workflow/scripts/nulls.py"),
        metrics=expand("results/{{name}}/{model}/fp-{null}/w32a32/metrics.json", model=config["models"], null=NULLS),
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
