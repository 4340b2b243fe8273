# Light work without torch runs on the node where Snakemake runs, also on a cluster (`localrule`).


rule tables:
    input:
        script=project("workflow/scripts/tables.py"),
        metrics=files_of(RUNS),
        floors=floors,
    output:
        shown_tables(*TABLES),
    log:
        f"results/{NAME}/tables/tables.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    params:
        kind="main",
        folder=subpath(output[0], parent=True),
    shell:
        "python -m workflow.scripts.tables {input.metrics:q} --kind {params.kind:q} -o {params.folder:q} > {log:q} 2>&1"


# Not part of `all`; its inputs are results of `all`. Results of optional targets, such as `snakemake seeds`, are shown
# if they exist. They are a parameter, so that new results rerun the report, but the report never starts hours of work.
rule report:
    input:
        script=project("workflow/scripts/report.py"),
        template=expand(project("workflow/report/report.{kind}"), kind=["html.j2", "css", "js"]),
        references=project("resources/references.bib"),
        tables=expand("results/{name}/tables/{table}", name=NAME, table=TABLES),
        figures=expand("results/{name}/figures/{figure}.png", name=NAME, figure=CURVES),
        samples=[
            file
            for run in RUNS
            for kind in ("samples", "features")
            for file in arrays(kind, run.model, run.method, run.bits)
        ],
    output:
        shown(f"results/{NAME}/report.html", "report", "Report"),
    log:
        f"results/{NAME}/report.log",
    conda:
        "../../environment.yml"
    resources:
        **needs((2000, 16000), (15, 60)),
    params:
        run=subpath(output[0], parent=True),
        optional=optional,
        kernels=sorted(map(str, Path("results/kernels").glob("*.csv"))),
    shell:
        "python -m workflow.scripts.report {params.run:q} --kernels {params.kernels:q} -o {output:q} > {log:q} 2>&1"


# Not part of `all`. Describes the files of a run for archives (RO-Crate 1.1); files that come later need it anew.
rule crate:
    input:
        script=project("workflow/scripts/crate.py"),
        metrics=files_of(RUNS),
        tables=expand("results/{name}/tables/{table}", name=NAME, table=TABLES),
    output:
        f"results/{NAME}/ro-crate-metadata.json",
    log:
        f"results/{NAME}/crate.log",
    localrule: True
    conda:
        "../../environment.yml"
    params:
        run=subpath(output[0], parent=True),
    shell:
        "python -m workflow.scripts.crate {params.run:q} > {log:q} 2>&1"


# Not part of `all`. Quantizes and samples again with other calibration draws.
use rule tables as seeds with:
    input:
        script=project("workflow/scripts/tables.py"),
        metrics=files_of(seeds_and_full_precision()),
        floors=floors,
    output:
        shown_tables("seeds.csv", "seeds.md"),
    log:
        f"results/{NAME}/tables/seeds.log",
    params:
        kind="seeds",
        folder=subpath(output[0], parent=True),


rule curves:
    input:
        script=project("workflow/scripts/curves.py"),
        main="results/{name}/tables/main.csv",
        eps_error="results/{name}/tables/eps_error.csv",
        ranges=expand("results/{{name}}/{model}/ranges.csv", model=config["models"]),
    output:
        [
            shown(f"results/{{name}}/figures/{figure}.png", "figures", "Figures", figure=figure.replace("_", " "))
            for figure in CURVES
        ],
    log:
        "results/{name}/figures/curves.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    shell:
        "python -m workflow.scripts.curves --main {input.main:q} --eps-error {input.eps_error:q} --ranges {input.ranges:q}"
        " -o {output:q} > {log:q} 2>&1"


rule grid:
    input:
        script=project("workflow/scripts/grid.py"),
        samples=first_samples,
    output:
        shown("results/{name}/figures/samples-{model}-{bits}.png", "samples", "Samples", model="{model}", bits="{bits}"),
    log:
        "results/{name}/figures/samples-{model}-{bits}.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 10),
    shell:
        "python -m workflow.scripts.grid {input.samples:q} -o {output:q} > {log:q} 2>&1"


# It has no output, because it edits tracked files, so it always runs when it is requested. It uses the table over
# quantization seeds if `snakemake seeds` has made it, and does not make it, because that takes hours.
rule readme:
    input:
        script=project("workflow/scripts/readme.py"),
        table=f"results/{NAME}/tables/main.md",
        main=f"results/{NAME}/tables/main.csv",
        paired=f"results/{NAME}/tables/paired.csv",
        figures=expand("results/{name}/figures/{figure}.png", name=NAME, figure=SHOWN),
    log:
        f"results/{NAME}/readme.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(1000, 5),
    params:
        seeds=lambda wc: [
            word for file in Path("results", NAME, "tables").glob("seeds.csv") for word in ("--seeds", str(file))
        ],
    shell:
        "python -m workflow.scripts.readme --table {input.table:q} --main {input.main:q} --paired {input.paired:q}"
        " {params.seeds:q} --figures {input.figures:q} > {log:q} 2>&1"
