rule trajectories:
    input:
        script=project("workflow/scripts/trajectories.py"),
        weights=weights,
    output:
        calibration=ensure("results/{name}/{model}/calibration.safetensors", non_empty=True),
        ranges=ensure("results/{name}/{model}/ranges.csv", non_empty=True),
    log:
        "results/{name}/{model}/trajectories.log",
    priority: 1  # other jobs wait for it
    conda:
        "../../environment.yml"
    resources:
        **needs((2000, 64000), (30, 720), plan="trajectories"),
    params:
        device=DEVICE,
        calibration=lambda wc: config["models"][wc.model].get("trajectories", MODELS[wc.model].trajectories),
    shell:
        "QUEST_GPU_PARTS={resources.gpu_parts:q}/$PARTS_OF_GPU"
        " python -m workflow.scripts.trajectories {wildcards.model:q} -n {params.calibration:q} --calibration {output.calibration:q}"
        " --ranges {output.ranges:q} --threads {threads:q} --device {params.device:q} > {log:q} 2>&1"


# A separate rule from the calibration set, so that another number of held-out trajectories does not rerun quantization.
rule evaluation:
    input:
        script=project("workflow/scripts/trajectories.py"),
        weights=weights,
    output:
        ensure("results/{name}/{model}/evaluation.safetensors", non_empty=True),
    log:
        "results/{name}/{model}/evaluation.log",
    priority: 1  # other jobs wait for it
    conda:
        "../../environment.yml"
    resources:
        **needs((2000, 64000), (30, 720), plan="evaluation"),
    params:
        device=DEVICE,
        evaluation=lambda wc: config["models"][wc.model].get("evaluation", 16),
    shell:
        "QUEST_GPU_PARTS={resources.gpu_parts:q}/$PARTS_OF_GPU"
        " python -m workflow.scripts.trajectories {wildcards.model:q} --evaluation {output:q} -e {params.evaluation:q}"
        " --threads {threads:q} --device {params.device:q} > {log:q} 2>&1"


# Draws other calibration trajectories for another quantization seed.
rule redraw:
    input:
        script=project("workflow/scripts/trajectories.py"),
        weights=weights,
    output:
        ensure("results/{name}/{model}/calibration-{draw}.safetensors", non_empty=True),
    log:
        "results/{name}/{model}/calibration-{draw}.log",
    priority: 1  # other jobs wait for it
    conda:
        "../../environment.yml"
    resources:
        **needs((2000, 64000), (30, 720), plan="redraw"),
    params:
        device=DEVICE,
        calibration=lambda wc: config["models"][wc.model].get("trajectories", MODELS[wc.model].trajectories),
    shell:
        "QUEST_GPU_PARTS={resources.gpu_parts:q}/$PARTS_OF_GPU"
        " python -m workflow.scripts.trajectories {wildcards.model:q} -n {params.calibration:q} --draw {wildcards.draw:q}"
        " --calibration {output:q} --threads {threads:q} --device {params.device:q} > {log:q} 2>&1"


rule quantize:
    input:
        script=project("workflow/scripts/quantize.py"),
        calibration=calibration,
        init=init,
    output:
        ensure("results/{name}/{model}/{method}/{bits}/model.safetensors", non_empty=True),
    log:
        "results/{name}/{model}/{method}/{bits}/quantize.log",
    priority: 1  # other jobs wait for it
    conda:
        "../../environment.yml"
    resources:
        **needs((3000, 128000), (60, 4320), plan="quantize"),
    params:
        method=lambda wc: recipe_of(config, wc.method)[0],
        recipe=recipe,
        floats=floats,
        device=DEVICE,
    shell:
        "QUEST_GPU_PARTS={resources.gpu_parts:q}/$PARTS_OF_GPU"
        " python -m workflow.scripts.quantize {wildcards.model:q} {params.method:q} {wildcards.bits:q}"
        " --recipe {params.recipe:q} --calibration {input.calibration:q} --init {input.init:q} {params.floats:q}"
        " --threads {threads:q} --device {params.device:q} -o {output:q} > {log:q} 2>&1"
