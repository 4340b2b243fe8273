rule sample:
    input:
        script=project("workflow/scripts/sample.py"),
        evaluation="results/{name}/{model}/evaluation.safetensors",
        checkpoint=checkpoint_of,
        networks=networks,
    output:
        # The job reads these files if they exist and does not sample images again that an equal earlier run sampled.
        samples=ensure(update("results/{name}/{model}/{method}/{bits}/samples-{shard}.npz"), non_empty=True),
        features=ensure(update("results/{name}/{model}/{method}/{bits}/features-{shard}.npz"), non_empty=True),
    log:
        "results/{name}/{model}/{method}/{bits}/sample-{shard}.log",
    benchmark:
        "results/{name}/{model}/{method}/{bits}/sample-{shard}.tsv"
    conda:
        "../../environment.yml"
    resources:
        **needs((3000, 64000), (60, 1440), plan="sample"),
    params:
        null=lambda wc: ["--null", NULLS[wc.method]] if wc.method in NULLS else [],
        n=images,
        shards=lambda wc: shards(wc.model, wc.method),
        images=sampled_images,
        device=DEVICE,
    shell:
        "QUEST_GPU_PARTS={resources.gpu_parts:q}/$PARTS_OF_GPU"
        " python -m workflow.scripts.sample {wildcards.model:q} --checkpoint {input.checkpoint:q} {params.null:q}"
        " -n {params.n:q} --shard {wildcards.shard:q}/{params.shards:q} --evaluation {input.evaluation:q} {params.images:q}"
        " --threads {threads:q} --device {params.device:q} --samples {output.samples:q} --features {output.features:q} > {log:q} 2>&1"


rule metrics:
    input:
        script=project("workflow/scripts/metrics.py"),
        features=cell("features"),
        samples=cell("samples"),
        fp_features=full_precision("features"),
        fp_samples=full_precision("samples"),
        reference=reference,
    output:
        ensure("results/{name}/{model}/{method}/{bits}/metrics.json", non_empty=True),
    log:
        "results/{name}/{model}/{method}/{bits}/metrics.log",
    conda:
        "../../environment.yml"
    # With 50,000 images the intervals take tens of minutes on one thread; for the small models they take seconds.
    threads: at_size(1, 16)
    resources:
        **needs((1500, 32000), (15, 60)),
    params:
        cell=lambda wc: [wc.model, wc.method, wc.bits, *["--null"] * (wc.method in NULLS)],
    shell:
        "python -m workflow.scripts.metrics {params.cell:q} --features {input.features:q}"
        " --samples {input.samples:q} --fp-features {input.fp_features:q}"
        " --fp-samples {input.fp_samples:q} --reference {input.reference:q} -o {output:q} > {log:q} 2>&1"
