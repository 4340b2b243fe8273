rule trajectories:
    input:
        script="workflow/scripts/trajectories.py",
        weights=weights,
    output:
        calibration=ensure("results/{name}/{model}/calibration.safetensors", non_empty=True),
        evaluation=ensure("results/{name}/{model}/evaluation.safetensors", non_empty=True),
        ranges=ensure("results/{name}/{model}/ranges.csv", non_empty=True),
    log:
        "results/{name}/{model}/trajectories.log",
    priority: 1  # others wait for it
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(2000, 64000),
        runtime=growing(30, 720),
        gpu=at_size(0, 1),
    params:
        device=DEVICE,
        calibration=lambda wc: config["models"][wc.model].get("trajectories", MODELS[wc.model].trajectories),
        evaluation=lambda wc: config["models"][wc.model].get("evaluation", 16),
    shell:
        "python -m workflow.scripts.trajectories {wildcards.model} -n {params.calibration} --calibration {output.calibration}"
        " --evaluation {output.evaluation} -e {params.evaluation} --ranges {output.ranges}"
        " --threads {threads} --device {params.device} > {log} 2>&1"


# Other trajectories for another quantization seed.
rule redraw:
    input:
        script="workflow/scripts/trajectories.py",
        weights=weights,
    output:
        ensure("results/{name}/{model}/calibration-{draw}.safetensors", non_empty=True),
    log:
        "results/{name}/{model}/calibration-{draw}.log",
    priority: 1  # others wait for it
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(2000, 64000),
        runtime=growing(30, 720),
        gpu=at_size(0, 1),
    params:
        device=DEVICE,
        calibration=lambda wc: config["models"][wc.model].get("trajectories", MODELS[wc.model].trajectories),
    shell:
        "python -m workflow.scripts.trajectories {wildcards.model} -n {params.calibration} --draw {wildcards.draw}"
        " --calibration {output} --threads {threads} --device {params.device} > {log} 2>&1"


rule quantize:
    input:
        script="workflow/scripts/quantize.py",
        calibration=calibration,
        init=init,
    output:
        ensure("results/{name}/{model}/{method}/{bits}/model.safetensors", non_empty=True),
    log:
        "results/{name}/{model}/{method}/{bits}/quantize.log",
    priority: 1  # others wait for it
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(3000, 128000),
        runtime=growing(60, 4320),
        gpu=at_size(0, 1),
    params:
        method=lambda wc: recipe_of(config, wc.method)[0],
        recipe=recipe,
        floats=floats,
        device=DEVICE,
    shell:
        "python -m workflow.scripts.quantize {wildcards.model} {params.method} {wildcards.bits}"
        " --recipe {params.recipe:q} --calibration {input.calibration} --init {input.init} {params.floats}"
        " --threads {threads} --device {params.device} -o {output} > {log} 2>&1"
