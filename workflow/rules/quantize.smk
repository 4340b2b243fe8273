rule trajectories:
    input:
        script="workflow/scripts/trajectories.py",
        weights=weights,
    output:
        calibration="results/{name}/{model}/calibration.safetensors",
        evaluation="results/{name}/{model}/evaluation.safetensors",
        ranges="results/{name}/{model}/ranges.csv",
    log:
        "results/{name}/{model}/trajectories.log",
    priority: 1  # others wait for it
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=30,
    params:
        calibration=lambda wc: config["models"][wc.model].get("trajectories", MODELS[wc.model].trajectories),
        evaluation=lambda wc: config["models"][wc.model].get("evaluation", 16),
    shell:
        "python -m workflow.scripts.trajectories {wildcards.model} -n {params.calibration} {params.evaluation}"
        " --calibration {output.calibration} --evaluation {output.evaluation} --ranges {output.ranges}"
        " --threads {threads} > {log} 2>&1"


rule quantize:
    input:
        script="workflow/scripts/quantize.py",
        calibration="results/{name}/{model}/calibration.safetensors",
        init=init,
    output:
        "results/{name}/{model}/{method}/{bits}/model.safetensors",
    log:
        "results/{name}/{model}/{method}/{bits}/quantize.log",
    priority: 1  # others wait for it
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=3000,
        runtime=60,
    params:
        recipe=recipe,
    shell:
        "python -m workflow.scripts.quantize {wildcards.model} {wildcards.method} {wildcards.bits}"
        " --recipe {params.recipe:q} --calibration {input.calibration} --init {input.init}"
        " --threads {threads} -o {output} > {log} 2>&1"
