rule sample:
    input:
        script="workflow/scripts/sample.py",
        evaluation="results/{name}/{model}/evaluation.safetensors",
        checkpoint=checkpoint_of,
        networks=networks,
    output:
        samples="results/{name}/{model}/{method}/{bits}/samples-{shard}.npz",
        features="results/{name}/{model}/{method}/{bits}/features-{shard}.npz",
    log:
        "results/{name}/{model}/{method}/{bits}/sample-{shard}.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=60,
    params:
        n=lambda wc: config["models"][wc.model]["images"],
        shards=shards,
    shell:
        "python -m workflow.scripts.sample {wildcards.model} --checkpoint {input.checkpoint} -n {params.n}"
        " --shard {wildcards.shard}/{params.shards} --evaluation {input.evaluation}"
        " --threads {threads} --samples {output.samples} --features {output.features} > {log} 2>&1"


rule metrics:
    input:
        script="workflow/scripts/metrics.py",
        features=cell("features"),
        samples=cell("samples"),
        fp_features=full_precision("features"),
        fp_samples=full_precision("samples"),
        reference=reference,
    output:
        "results/{name}/{model}/{method}/{bits}/metrics.json",
    log:
        "results/{name}/{model}/{method}/{bits}/metrics.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1500,
        runtime=15,
    shell:
        "python -m workflow.scripts.metrics {wildcards.model} {wildcards.method} {wildcards.bits}"
        " --features {input.features} --samples {input.samples} --fp-features {input.fp_features}"
        " --fp-samples {input.fp_samples} --reference {input.reference} -o {output} > {log} 2>&1"
