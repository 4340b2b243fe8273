# `snakemake settle`: compare the pairs of rows in `settle` after 3, 5, 8 and 12 quantization seeds, until each is decided. Not part
# of `all`. Each look says which cells the next one needs. What cells show accumulates in results/settled, which is tracked;
# so looks have no file of it as an input, and begin anew in every run.
from quest.report.settle import LOOKS


checkpoint look:
    input:
        script=project("workflow/scripts/settle.py"),
        before=look_before,
        evidence=asked_for,
    output:
        "results/{name}/settle/look-{look}.json",
    log:
        "results/{name}/settle/look-{look}.log",
    wildcard_constraints:
        look="[0-4]",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        families=families,
        identities=identities,
        started=STARTED,  # another value in every run, so that looks begin anew
        hours=HOURS or 0,
    shell:
        "python -m workflow.scripts.settle {wildcards.look:q} --evidence {input.evidence:q} --families {params.families:q}"
        " --identities {params.identities:q} --started {params.started:q} --hours {params.hours:q} -o {output:q} > {log:q} 2>&1"


rule settle:
    input:
        last=f"results/{NAME}/settle/look-{len(LOOKS)}.json",
    output:
        multiext(f"results/{NAME}/settle/settled", ".csv", ".md"),
    log:
        f"results/{NAME}/settle/settled.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    params:
        folder=subpath(output[0], parent=True),
    shell:
        "python -m workflow.scripts.settle {input.last:q} --tables {params.folder:q} > {log:q} 2>&1"


# How far the calibration draw and the quantization seed move a cell, each alone. Verdicts leave cells out whose draw is not
# their seed.
rule lottery:
    input:
        script=project("workflow/scripts/settle.py"),
        evidence=lottery_evidence,
    output:
        f"results/{NAME}/settle/lottery.csv",
    log:
        f"results/{NAME}/settle/lottery.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    shell:
        "python -m workflow.scripts.settle lottery --evidence {input.evidence:q} -o {output:q} > {log:q} 2>&1"


rule evidence:
    input:
        script=project("workflow/scripts/evidence.py"),
        metrics="results/{name}/{model}/{method}/{bits}/metrics.json",
        checkpoint=checkpoint_of,
        features=cell("features"),
        samples=cell("samples"),
        fp_features=full_precision("features"),
        fp_samples=full_precision("samples"),
    output:
        ensure("results/{name}/{model}/{method}/{bits}/evidence.json", non_empty=True),
    log:
        "results/{name}/{model}/{method}/{bits}/evidence.log",
    conda:
        "../../environment.yml"
    resources:
        **needs((1500, 32000), (15, 60)),
    params:
        told=lambda wc: json.dumps(told(config, Run(wc.model, wc.method, wc.bits), MODELS[wc.model], RECORDS)),
    shell:
        "python -m workflow.scripts.evidence --metrics {input.metrics:q} --checkpoint {input.checkpoint:q}"
        " --features {input.features:q} --samples {input.samples:q} --fp-features {input.fp_features:q}"
        " --fp-samples {input.fp_samples:q} --told {params.told:q} -o {output:q} > {log:q} 2>&1"
