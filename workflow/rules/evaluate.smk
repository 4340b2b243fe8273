rule sample:
    input:
        script="workflow/scripts/sample.py",
        evaluation="results/{name}/{model}/evaluation.safetensors",
        checkpoint=checkpoint_of,
        networks=networks,
    output:
        samples=ensure("results/{name}/{model}/{method}/{bits}/samples-{shard}.npz", non_empty=True),
        features=ensure("results/{name}/{model}/{method}/{bits}/features-{shard}.npz", non_empty=True),
    log:
        "results/{name}/{model}/{method}/{bits}/sample-{shard}.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(3000, 64000),
        runtime=growing(60, 1440),
        gpu=at_size(0, 1),
    params:
        n=setting("images"),
        shards=shards,
        images=lambda wc: "" if wc.model in PICTURED else "--drop-images",
        device=DEVICE,
    shell:
        "python -m workflow.scripts.sample {wildcards.model} --checkpoint {input.checkpoint} -n {params.n}"
        " --shard {wildcards.shard}/{params.shards} --evaluation {input.evaluation} {params.images}"
        " --threads {threads} --device {params.device} --samples {output.samples} --features {output.features} > {log} 2>&1"


rule metrics:
    input:
        script="workflow/scripts/metrics.py",
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
    # Intervals of 50,000 images' distances are tens of minutes of one thread; those of the small models' are seconds.
    threads: at_size(1, 16)
    resources:
        mem_mb=growing(1500, 32000),
        runtime=growing(15, 60),
    shell:
        "python -m workflow.scripts.metrics {wildcards.model} {wildcards.method} {wildcards.bits}"
        " --features {input.features} --samples {input.samples} --fp-features {input.fp_features}"
        " --fp-samples {input.fp_samples} --reference {input.reference} -o {output} > {log} 2>&1"
