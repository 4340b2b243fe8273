# `snakemake questions`: what the paper claims and leaves open, measured on the models of the config. Not part of `all`;
# starts from the calibration sets and checkpoints of the grid.

PROPERTIES = ["activations", "activation_changes", "temporal", "embeddings", "sensitivity"]
PROPERTY_FIGURES = ["activations", "imbalance", "temporal", "sensitivity"]


rule questions:
    input:
        expand("results/{name}/questions/{table}.csv", name=NAME, table=PROPERTIES),
        expand("results/{name}/questions/figures/{figure}.png", name=NAME, figure=PROPERTY_FIGURES),


rule activations:
    input:
        script="workflow/scripts/activations.py",
        calibration="results/{name}/{model}/calibration.safetensors",
        evaluation="results/{name}/{model}/evaluation.safetensors",
        init=started,
        finetuned=asked("results/{name}/{model}/quest/{bits}/model.safetensors"),
    output:
        "results/{name}/questions/{model}/activations.json",
    log:
        "results/{name}/questions/{model}/activations.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=at_size(3000, 64000),
        runtime=at_size(30, 720),
    params:
        bits=QUESTIONS.get("bits"),
    shell:
        "python -m workflow.scripts.activations {wildcards.model} {params.bits} --calibration {input.calibration}"
        " --evaluation {input.evaluation} --init {input.init} --finetuned {input.finetuned} --threads {threads}"
        " -o {output} > {log} 2>&1"


rule temporal:
    input:
        script="workflow/scripts/temporal.py",
        calibration="results/{name}/{model}/calibration.safetensors",
        evaluation="results/{name}/{model}/evaluation.safetensors",
        finetuned=asked("results/{name}/{model}/quest/{bits}/model.safetensors"),
    output:
        "results/{name}/questions/{model}/temporal.json",
    log:
        "results/{name}/questions/{model}/temporal.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=at_size(3000, 64000),
        runtime=at_size(30, 720),
    params:
        bits=QUESTIONS.get("bits"),
    shell:
        "python -m workflow.scripts.temporal {wildcards.model} {params.bits} --calibration {input.calibration}"
        " --evaluation {input.evaluation} --finetuned {input.finetuned} --threads {threads} -o {output} > {log} 2>&1"


rule sensitivity:
    input:
        script="workflow/scripts/sensitivity.py",
        calibration="results/{name}/{model}/calibration.safetensors",
        evaluation="results/{name}/{model}/evaluation.safetensors",
    output:
        "results/{name}/questions/{model}/sensitivity.json",
    log:
        "results/{name}/questions/{model}/sensitivity.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=at_size(3000, 64000),
        runtime=at_size(30, 720),
    params:
        bits=QUESTIONS.get("bits"),
    shell:
        "python -m workflow.scripts.sensitivity {wildcards.model} {params.bits} --calibration {input.calibration}"
        " --evaluation {input.evaluation} --threads {threads} -o {output} > {log} 2>&1"


rule properties:
    input:
        script="workflow/scripts/properties.py",
        activations=expand("results/{{name}}/questions/{model}/activations.json", model=config["models"]),
        temporal=expand("results/{{name}}/questions/{model}/temporal.json", model=config["models"]),
        sensitivity=expand("results/{{name}}/questions/{model}/sensitivity.json", model=config["models"]),
    output:
        expand("results/{{name}}/questions/{table}.csv", table=PROPERTIES),
        expand("results/{{name}}/questions/figures/{figure}.png", figure=PROPERTY_FIGURES),
    log:
        "results/{name}/questions/properties.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    shell:
        "python -m workflow.scripts.properties --activations {input.activations} --temporal {input.temporal}"
        " --sensitivity {input.sensitivity} -o results/{wildcards.name}/questions > {log} 2>&1"
