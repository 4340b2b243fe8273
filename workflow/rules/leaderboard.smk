# `snakemake leaderboard` checks and scores every submission in results/leaderboard by PROTOCOL.md's images and endpoints. Not part
# of `all`. Full precision is sampled once on the judged images, and once for each submission on its fresh ones.
from quest.report import leaderboard

ENTRIES = sorted(file.parent.name for file in Path("results/leaderboard").glob("*/entry.yaml"))


localrules:
    leaderboard,


rule leaderboard:
    input:
        expand("results/scored/leaderboard.{kind}", kind=["csv", "md"]),


rule leaderboard_table:
    input:
        script=project("workflow/scripts/leaderboard.py"),
        checked=expand("results/scored/{entry}/checked.txt", entry=ENTRIES),
        metrics=expand("results/scored/{entry}/metrics.json", entry=ENTRIES),
        fresh=expand("results/scored/{place}/samples-fresh.npz", place=[*ENTRIES, *(f"{e}/full" for e in ENTRIES)]),
    output:
        expand("results/scored/leaderboard.{kind}", kind=["csv", "md"]),
    log:
        "results/scored/leaderboard.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        entries=expand("results/leaderboard/{entry}", entry=ENTRIES),
        scored=subpath(output[0], parent=True),
    shell:
        "python -m workflow.scripts.leaderboard {params.entries:q} --scored {params.scored:q} -o {params.scored:q} > {log:q} 2>&1"


# What breaks a rule ends here, before anything is sampled.
rule leaderboard_check:
    input:
        script=project("workflow/scripts/leaderboard.py"),
        entry="results/leaderboard/{entry}/entry.yaml",
        checkpoint="results/leaderboard/{entry}/model.safetensors",
    output:
        "results/scored/{entry}/checked.txt",
    log:
        "results/scored/{entry}/check.log",
    wildcard_constraints:
        entry="[^/]+",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=5,
    params:
        entry=subpath(input.entry, parent=True),
    shell:
        "python -m workflow.scripts.leaderboard {params.entry:q} > {output:q} 2> {log:q}"


rule leaderboard_trajectories:
    input:
        script=project("workflow/scripts/trajectories.py"),
    output:
        ensure("results/scored/evaluation.safetensors", non_empty=True),
    log:
        "results/scored/evaluation.log",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(2000),
        runtime=growing(30),
    params:
        model=leaderboard.MODEL,
    shell:
        "python -m workflow.scripts.trajectories {params.model:q} --evaluation {output:q} -e 16 --threads {threads:q} > {log:q} 2>&1"


# place: `full` and `ENTRY/full` for full precision, `ENTRY` for a submission.
rule leaderboard_sample:
    input:
        script=project("workflow/scripts/sample.py"),
        evaluation="results/scored/evaluation.safetensors",
        checked=lambda wc: [] if is_full(wc) else f"results/scored/{wc.place}/checked.txt",
        checkpoint=lambda wc: [] if is_full(wc) else f"results/leaderboard/{wc.place}/model.safetensors",
    output:
        samples=ensure("results/scored/{place}/samples-{part}.npz", non_empty=True),
        features=ensure("results/scored/{place}/features-{part}.npz", non_empty=True),
    log:
        "results/scored/{place}/sample-{part}.log",
    wildcard_constraints:
        place="[^/]+(/full)?",
        part="judged|fresh",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(3000),
        runtime=growing(60),
    params:
        model=leaderboard.MODEL,
        images=sampled_part,
    shell:
        "python -m workflow.scripts.sample {params.model:q} --checkpoint {input.checkpoint:q} {params.images:q}"
        " --evaluation {input.evaluation:q} --threads {threads:q} --samples {output.samples:q} --features {output.features:q} > {log:q} 2>&1"


rule leaderboard_metrics:
    input:
        script=project("workflow/scripts/metrics.py"),
        samples="results/scored/{entry}/samples-judged.npz",
        features="results/scored/{entry}/features-judged.npz",
        fp_samples="results/scored/full/samples-judged.npz",
        fp_features="results/scored/full/features-judged.npz",
        reference=os.path.relpath(leaderboard.reference()),
    output:
        ensure("results/scored/{entry}/metrics.json", non_empty=True),
    log:
        "results/scored/{entry}/metrics.log",
    wildcard_constraints:
        entry="[^/]+",
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=growing(1500),
        runtime=growing(15),
    params:
        model=leaderboard.MODEL,
        bits=lambda wc: leaderboard.declared(Path("results/leaderboard", wc.entry), "bits"),
    shell:
        "python -m workflow.scripts.metrics {params.model:q} {wildcards.entry:q} {params.bits:q} --features {input.features:q}"
        " --samples {input.samples:q} --fp-features {input.fp_features:q} --fp-samples {input.fp_samples:q}"
        " --reference {input.reference:q} -o {output:q} > {log:q} 2>&1"
