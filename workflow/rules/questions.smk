# `snakemake questions`: the paper's claims and open questions, measured on the models of the config. Not part of `all`;
# it starts from the calibration sets and checkpoints of the grid.


PROPERTIES = ["activations", "activation_changes", "temporal", "time_ranges", "embeddings", "sensitivity"]
# What is measured on every model, and the checkpoints that it takes, as functions of the wildcards.
FINETUNED = {"finetuned": question_file("model.safetensors")}
MEASURED = {"activations": {"init": question_init} | FINETUNED, "temporal": FINETUNED, "sensitivity": {}}
PROPERTY_FIGURES = ["activations", "imbalance", "temporal", "sensitivity"]
# Variants of finetuning: {variant: (keyword arguments of QuEST, further arguments of workflow.scripts.tuning)}.
GLOBAL = {"local_tla": False, "local_cma": False}
NOISE = "--data noise"
TUNINGS = {
    "untuned": ({"tla_iterations": 0, "cma_iterations": 0}, ""),
    "learned-scales": ({"lr_weight": 0}, ""),
    "learned-weights": ({"lr_scale": 0}, ""),
    "quest-suite": ({}, ""),
    "global-trajectories": (GLOBAL, ""),
}
# A program draws the pictures of scenes. Photographs and emoji do not ship, so no question can ask for them.
if QUESTIONS.get("model", "").startswith("scenes"):
    TUNINGS |= {"global-scenes": (GLOBAL, "--data scenes"), "global-noise": (GLOBAL, NOISE)}
    # Quantization-aware training ("qat") beside finetuning without data. 256 pictures have twice the rows that it takes.
    for seed in range(QAT_SEEDS):
        at, drawn = (f"@{seed}", {"seed": seed}) if seed else ("", {})
        TUNINGS |= {f"quest-suite{at}": (drawn, "")}
        TUNINGS |= {f"full-finetune{at}": (drawn, "--method full-finetune")}
        TUNINGS |= {f"full-finetune-global{at}": (GLOBAL | drawn, "--method full-finetune")}
        TUNINGS |= {f"qat{at}": (GLOBAL | drawn, f"--method full-finetune {NOISE} --pictures 256")}
ANSWERS = ["questions.md", "taylor.csv", "tunings.csv", "inference.csv", "comparisons.csv", "qat.csv"]
ANSWERS += ["figures/taylor.png", "figures/signals.png"]


rule questions:
    input:
        expand("results/{name}/questions/{answer}", name=NAME, answer=ANSWERS),
        expand("results/{name}/questions/figures/{figure}.png", name=NAME, figure=PROPERTY_FIGURES),


rule measure_property:
    input:
        unpack(lambda wc: {key: file(wc) for key, file in MEASURED[wc.property].items()}),
        script=lambda wc: project(f"workflow/scripts/{wc.property}.py"),
        calibration="results/{name}/{model}/calibration.safetensors",
        evaluation="results/{name}/{model}/evaluation.safetensors",
    output:
        "results/{name}/questions/{model}/{property}.json",
    log:
        "results/{name}/questions/{model}/{property}.log",
    wildcard_constraints:
        property="|".join(MEASURED),
    conda:
        "../../environment.yml"
    resources:
        **needs((3000, 64000), (30, 720)),
    params:
        bits=QUESTIONS.get("bits"),
        checkpoints=lambda wc, input: [word for key in MEASURED[wc.property] for word in (f"--{key}", input[key])],
    shell:
        "python -m workflow.scripts.{wildcards.property:q} {wildcards.model:q} {params.bits:q}"
        " --calibration {input.calibration:q} --evaluation {input.evaluation:q} {params.checkpoints:q} --threads {threads:q}"
        " -o {output:q} > {log:q} 2>&1"


rule properties:
    input:
        script=project("workflow/scripts/properties.py"),
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
    resources:
        **needs(1000, 10),
    shell:
        "python -m workflow.scripts.properties --activations {input.activations:q} --temporal {input.temporal:q}"
        " --sensitivity {input.sensitivity:q} -o results/{wildcards.name:q}/questions > {log:q} 2>&1"


rule taylor:
    input:
        script=project("workflow/scripts/taylor.py"),
        evaluation=question_file("evaluation.safetensors"),
    output:
        "results/{name}/questions/taylor.json",
    log:
        "results/{name}/questions/taylor.log",
    conda:
        "../../environment.yml"
    resources:
        **needs((3000, 64000), (30, 720)),
    params:
        model=QUESTIONS.get("model"),
    shell:
        "python -m workflow.scripts.taylor {params.model:q} --evaluation {input.evaluation:q} --threads {threads:q}"
        " -o {output:q} > {log:q} 2>&1"


rule tuning:
    input:
        script=project("workflow/scripts/tuning.py"),
        calibration=lambda wc: calibration(of_question(wc, seed_of(wc.variant))),
        evaluation=question_file("evaluation.safetensors"),
        init=lambda wc: question_init(wc, seed_of(wc.variant)),
    output:
        "results/{name}/questions/tuning/{variant}.json",
    log:
        "results/{name}/questions/tuning/{variant}.log",
    wildcard_constraints:
        variant="|".join(map(re.escape, TUNINGS)),
    conda:
        "../../environment.yml"
    resources:
        **needs((3000, 64000), (60, 1440)),
    params:
        model=QUESTIONS.get("model"),
        bits=QUESTIONS.get("bits"),
        recipe=lambda wc: json.dumps(TUNINGS[wc.variant][0]),
        rest=lambda wc: TUNINGS[wc.variant][1].split(),
    shell:
        "python -m workflow.scripts.tuning {params.model:q} {params.bits:q} --recipe {params.recipe:q} {params.rest:q}"
        " --calibration {input.calibration:q} --evaluation {input.evaluation:q} --init {input.init:q} --threads {threads:q}"
        " -o {output:q} > {log:q} 2>&1"


# This rule times calls, so it is most accurate when nothing else runs.
rule inference:
    input:
        script=project("workflow/scripts/inference.py"),
        checkpoint=question_file("model.safetensors"),
        evaluation=question_file("evaluation.safetensors"),
    output:
        "results/{name}/questions/inference.json",
    log:
        "results/{name}/questions/inference.log",
    conda:
        "../../environment.yml"
    resources:
        **needs((3000, 64000), (15, 120)),
    params:
        model=QUESTIONS.get("model"),
    shell:
        "python -m workflow.scripts.inference {params.model:q} --checkpoint {input.checkpoint:q}"
        " --evaluation {input.evaluation:q} --threads {threads:q} -o {output:q} > {log:q} 2>&1"


rule train_signals:
    output:
        "results/{name}/questions/signals.safetensors",
    log:
        "results/{name}/questions/train_signals.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(2000, 30),
    shell:
        "python -m quest.zoo.train_signals -o {output:q} --threads {threads:q} > {log:q} 2>&1"


rule signals:
    input:
        script=project("workflow/scripts/signals.py"),
        weights="results/{name}/questions/signals.safetensors",
    output:
        "results/{name}/questions/signals.json",
    log:
        "results/{name}/questions/signals.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(2000, 60),
    params:
        bits=QUESTIONS.get("bits"),
    shell:
        "python -m workflow.scripts.signals {params.bits:q} --weights {input.weights:q} --threads {threads:q}"
        " -o {output:q} > {log:q} 2>&1"


rule answers:
    input:
        script=project("workflow/scripts/questions.py"),
        properties=expand("results/{{name}}/questions/{table}.csv", table=PROPERTIES),
        cells=measured,
        floors=floors,
        taylor="results/{name}/questions/taylor.json",
        tunings=expand("results/{{name}}/questions/tuning/{variant}.json", variant=TUNINGS),
        inference="results/{name}/questions/inference.json",
        signals="results/{name}/questions/signals.json",
    output:
        expand("results/{{name}}/questions/{answer}", answer=ANSWERS),
    log:
        "results/{name}/questions/answers.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    shell:
        "python -m workflow.scripts.questions --properties {input.properties:q} --cells {input.cells:q}"
        " --taylor {input.taylor:q} --tunings {input.tunings:q} --inference {input.inference:q} --signals {input.signals:q}"
        " -o results/{wildcards.name:q}/questions > {log:q} 2>&1"


# It has no output, because it edits a tracked file, so it always runs when it is requested.
rule findings:
    input:
        script=project("workflow/scripts/findings.py"),
        cells=measured,
        floors=floors,
    log:
        f"results/{NAME}/questions/edit.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 5),
    shell:
        "python -m workflow.scripts.findings {input.cells:q} > {log:q} 2>&1"
