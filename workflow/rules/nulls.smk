# `snakemake nulls`: full precision against itself, in ways that are all full precision. Not part of `all`. Tables use the
# floors that it measures, where it has run: a difference below the floor is no verdict.


use rule tables as nulls with:
    input:
        script=project("workflow/scripts/tables.py"),
        metrics=files_of(Run(model, null, "w32a32") for model in config["models"] for null in NULLS),
    output:
        shown_tables("nulls.csv", "nulls.md"),
    log:
        f"results/{NAME}/tables/nulls.log",
    params:
        kind="nulls",
        folder=subpath(output[0], parent=True),
