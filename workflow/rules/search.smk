# `snakemake search`: recipes of several methods on drawn models. Not part of `all`. The log of trials is no output: Snakemake
# would delete it before the job runs again, but the job goes on from it.
SEARCH = config.get("search", {})
LOGGED = ("name", "models", "methods", "search")


rule search:
    input:
        script=project("workflow/scripts/search.py"),
        calibration=expand(
            "results/{name}/{model}/calibration{draw}.safetensors",
            name=NAME,
            model=config["models"],
            draw=["", *(f"-{seed}" for seed in SEARCH.get("seeds", []))],
        ),
        starts=files_of(SEARCH_STARTS, "model.safetensors"),
    output:
        f"results/{NAME}/search.md",
    log:
        f"results/{NAME}/search.log",
    conda:
        "../../environment.yml"
    resources:
        **needs((4000, 64000), (240, 4320)),
    params:
        config=json.dumps({key: config[key] for key in LOGGED if key in config}),
        folder=subpath(output[0], parent=True),
    shell:
        "python -m workflow.scripts.search {params.folder:q} --config {params.config:q} --log {params.folder:q}/search.csv"
        " --threads {threads:q} -o {output:q} > {log:q} 2>&1"
