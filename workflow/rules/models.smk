# The paper's models: rule `model` converts a checkpoint, named in the config or downloaded, to a pipeline in
# results/models. This happens once for all configs. Of a model that a config declares itself it keeps a record there.


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
    resources:
        **needs(1000, 5),
    shell:
        "python -m quest.diffusion.random_checkpoints {wildcards.tiny:q} -o {output:q} > {log:q} 2>&1"


rule model:
    input:
        script=project("workflow/scripts/model.py"),
        checkpoint=file_setting("checkpoint"),
        tokenizer=file_setting("tokenizer"),
        captions=file_setting("captions"),
        prompts=file_setting("prompts"),
        pipeline=pipeline_files,
    output:
        directory("results/models/{model}"),
    log:
        "results/models/{model}.log",
    conda:
        "../../environment.yml"
    resources:
        **needs((2000, 32000), (10, 240)),
    params:
        checkpoint=setting("checkpoint"),
        tokenizer=setting("tokenizer"),
        captions=setting("captions"),
        declaration=declaration,
    shell:
        "python -m workflow.scripts.model {wildcards.model:q} --checkpoint {params.checkpoint:q}"
        " --tokenizer {params.tokenizer:q} --captions {params.captions:q}"
        " --declaration {params.declaration:q} --fetched results/checkpoints -o {output:q} > {log:q} 2>&1"
