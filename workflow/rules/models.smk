# The paper's models: their checkpoints, named in the config or fetched, become pipelines in results/models. That is done
# once, whatever the configs that use them.


# Random weights in CompVis's format, for the rehearsal.
rule tiny_checkpoint:
    output:
        ensure("results/checkpoints/{tiny}.ckpt", non_empty=True),
    log:
        "results/checkpoints/{tiny}.log",
    wildcard_constraints:
        tiny="tiny-[a-z]+",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(1000),
        runtime=growing(5),
    shell:
        "python -m quest.diffusion.random_checkpoints {wildcards.tiny:q} -o {output:q} > {log:q} 2>&1"


rule model:
    input:
        script="workflow/scripts/model.py",
        checkpoint=given("checkpoint"),
        tokenizer=given("tokenizer"),
        captions=given("captions"),
    output:
        directory("results/models/{model}"),
    log:
        "results/models/{model}.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(2000, 32000),
        runtime=growing(10, 240),
    params:
        checkpoint=setting("checkpoint"),
        tokenizer=setting("tokenizer"),
        captions=setting("captions"),
    shell:
        "python -m workflow.scripts.model {wildcards.model:q} --checkpoint {params.checkpoint:q}"
        " --tokenizer {params.tokenizer:q} --captions {params.captions:q}"
        " --fetched results/checkpoints -o {output:q} > {log:q} 2>&1"
