# `snakemake leaderboard` checks and scores every submission in results/leaderboard by PROTOCOL.md's images and endpoints. Not part
# of `all`. A submission that is refused is a row of the table with the reason, and is not sampled.
from quest.report import leaderboard

SUBMITTED = sorted(file.parent.name for file in Path("results/leaderboard").glob("*/entry.yaml"))
ENTRIES = [entry for entry in SUBMITTED if leaderboard.is_place(entry)]


rule leaderboard:
    input:
        script=project("workflow/scripts/leaderboard.py"),
        draw="results/scored/draw.txt",
        checked=expand("results/scored/{entry}/checked.json", entry=ENTRIES),
        full=expand("results/scored/full/samples-{part}.npz", part=["judged", "fresh"]),
        scores=scores,
    output:
        expand("results/scored/leaderboard.{kind}", kind=["csv", "md"]),
    log:
        "results/scored/leaderboard.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(2000, 10),
    params:
        # A function, since a folder that is refused may have braces in its name.
        entries=lambda wc: [f"results/leaderboard/{entry}" for entry in SUBMITTED],
        scored=subpath(output[0], parent=True),
    shell:
        "python -m workflow.scripts.leaderboard {params.entries:q} --scored {params.scored:q} -o {params.scored:q} > {log:q} 2>&1"


# Another submission or another file draws anew, so nobody knows the images while making a file.
rule leaderboard_draw:
    input:
        entries=expand("results/leaderboard/{entry}/entry.yaml", entry=ENTRIES),
        sent=[f for f in (Path("results/leaderboard", e, "model.safetensors") for e in ENTRIES) if f.exists()],
    output:
        "results/scored/draw.txt",
    log:
        "results/scored/draw.log",
    localrule: True
    conda:
        "../../environment.yml"
    shell:
        "python -m workflow.scripts.leaderboard --draw {output:q} > {log:q} 2>&1"


# What breaks a rule ends here, before anything is sampled.
checkpoint leaderboard_check:
    input:
        script=project("workflow/scripts/leaderboard.py"),
        entry="results/leaderboard/{entry}/entry.yaml",
        checkpoint=submitted,
    output:
        "results/scored/{entry}/checked.json",
    log:
        "results/scored/{entry}/check.log",
    wildcard_constraints:
        entry="[^/]+",
    conda:
        "../../environment.yml"
    resources:
        **needs(2000, 10),
    params:
        entry=subpath(input.entry, parent=True),
    shell:
        "python -m workflow.scripts.leaderboard {params.entry:q} --checked {output:q} > {log:q} 2>&1"


rule leaderboard_trajectories:
    input:
        script=project("workflow/scripts/trajectories.py"),
    output:
        ensure("results/scored/evaluation.safetensors", non_empty=True),
    log:
        "results/scored/evaluation.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(2000, 30),
    params:
        model=leaderboard.MODEL,
    shell:
        "python -m workflow.scripts.trajectories {params.model:q} --evaluation {output:q} -e 16 --threads {threads:q} > {log:q} 2>&1"


# place: `full` for full precision, or a submission.
rule leaderboard_sample:
    input:
        script=project("workflow/scripts/sample.py"),
        evaluation="results/scored/evaluation.safetensors",
        draw=lambda wc: "results/scored/draw.txt" if wc.part == "fresh" else [],
        checked=lambda wc: [] if wc.place == leaderboard.FULL else f"results/scored/{wc.place}/checked.json",
        checkpoint=lambda wc: (
            [] if wc.place == leaderboard.FULL else leaderboard.checkpoint_of(leaderboard_folder(wc.place))
        ),
    output:
        samples=ensure("results/scored/{place}/samples-{part}.npz", non_empty=True),
        features=ensure("results/scored/{place}/features-{part}.npz", non_empty=True),
    log:
        "results/scored/{place}/sample-{part}.log",
    wildcard_constraints:
        place="[^/]+",
        part="judged|fresh",
    conda:
        "../../environment.yml"
    resources:
        **needs(3000, 60),
    params:
        model=leaderboard.MODEL,
        n=lambda wc: leaderboard.FRESH if wc.part == "fresh" else leaderboard.IMAGES,
        first=leaderboard.FIRST,
    # The shell reads the draw: it does not exist yet when jobs are planned. The judged images have none.
    shell:
        "first=$(cat /dev/null {input.draw:q}); python -m workflow.scripts.sample {params.model:q} --checkpoint {input.checkpoint:q}"
        " -n {params.n:q} --first ${{first:-{params.first:q}}} --evaluation {input.evaluation:q} --threads {threads:q} --samples {output.samples:q} --features {output.features:q} > {log:q} 2>&1"


# Images that were sent stand for those that sampling makes.
rule leaderboard_images:
    input:
        script=project("workflow/scripts/leaderboard.py"),
        entry="results/leaderboard/{entry}/entry.yaml",
        checked="results/scored/{entry}/checked.json",
        sent=submitted,
    output:
        samples=ensure("results/scored/{entry}/samples-images.npz", non_empty=True),
        features=ensure("results/scored/{entry}/features-images.npz", non_empty=True),
    log:
        "results/scored/{entry}/images.log",
    wildcard_constraints:
        entry="[^/]+",
    conda:
        "../../environment.yml"
    resources:
        **needs(2000, 10),
    params:
        entry=subpath(input.entry, parent=True),
        scored=subpath(output.samples, parent=True),
    shell:
        "python -m workflow.scripts.leaderboard {params.entry:q} --images {params.scored:q} > {log:q} 2>&1"


use rule metrics as leaderboard_metrics with:
    input:
        script=project("workflow/scripts/metrics.py"),
        samples=lambda wc: f"results/scored/{wc.entry}/samples-{judged_part(wc.entry)}.npz",
        features=lambda wc: f"results/scored/{wc.entry}/features-{judged_part(wc.entry)}.npz",
        fp_samples="results/scored/full/samples-judged.npz",
        fp_features="results/scored/full/features-judged.npz",
        reference=os.path.relpath(find(leaderboard.MODEL).reference),
    output:
        ensure("results/scored/{entry}/metrics.json", non_empty=True),
    log:
        "results/scored/{entry}/metrics.log",
    wildcard_constraints:
        entry="[^/]+",
    threads: 1
    resources:
        **needs(1500, 15),
    params:
        cell=lambda wc: [leaderboard.MODEL, wc.entry, leaderboard.declared(leaderboard_folder(wc.entry), "bits")],
