# Calibration set and held-out trajectories are jobs of their own, so that another number of held-out ones does not rerun
# quantization.
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
        # Apart from the files: nothing is made again for the sake of a parameter that depends on the output.
        drawn=calibration_draw,
        files=lambda wc, output: ["--calibration", output.calibration, "--ranges", output.ranges],
    shell:
        "QUEST_GPU_PARTS={resources.gpu_parts:q}/$PARTS_OF_GPU"
        " python -m workflow.scripts.trajectories {wildcards.model:q} {params.drawn:q} {params.files:q}"
        " --threads {threads:q} --device {params.device:q} > {log:q} 2>&1"


use rule trajectories as evaluation with:
    output:
        ensure("results/{name}/{model}/evaluation.safetensors", non_empty=True),
    log:
        "results/{name}/{model}/evaluation.log",
    resources:
        **needs((2000, 64000), (30, 720), plan="evaluation"),
    params:
        device=DEVICE,
        drawn=lambda wc: ["-e", config["models"][wc.model].get("evaluation", 16)],
        files=lambda wc, output: ["--evaluation", *output],


# Draws other calibration trajectories for another quantization seed.
use rule trajectories as redraw with:
    output:
        ensure("results/{name}/{model}/calibration-{draw}.safetensors", non_empty=True),
    log:
        "results/{name}/{model}/calibration-{draw}.log",
    resources:
        **needs((2000, 64000), (30, 720), plan="redraw"),
    params:
        device=DEVICE,
        drawn=lambda wc: [*calibration_draw(wc), "--draw", wc.draw],
        files=lambda wc, output: ["--calibration", *output],


rule quantize:
    input:
        script=project("workflow/scripts/quantize.py"),
        calibration=calibration,
        init=init,
    output:
        ensure("results/{name}/{model}/{method}/{bits}/model.safetensors", non_empty=True),
    log:
        "results/{name}/{model}/{method}/{bits}/quantize.log",
    benchmark:
        "results/{name}/{model}/{method}/{bits}/quantize.tsv"
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
