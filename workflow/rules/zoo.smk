# `snakemake zoo` retrains the models of resources/zoo from scratch, into results/zoo; it takes hours of CPU time. The
# shipped files change only with `snakemake zoo_accept`.

ZOO_DENOISERS = ["scenes-text", "scenes-class", "scenes-uncond"]
# Models of real pictures -> the kind of pictures. Each kind has its own autoencoder and latents.
ZOO_PICTURES = {"emoji-text": "emoji", "emoji-uncond": "emoji", "photos-class": "photos", "photos-dit": "photos"}
# The networks that tell what samples show.
ZOO_JUDGES = dict.fromkeys(ZOO_DENOISERS, "results/zoo/scenes-extractor") | {"emoji-text": "results/zoo/emoji-clip"}
ZOO_JUDGES |= dict.fromkeys(("photos-class", "photos-dit"), "results/zoo/photos-classifier")
ZOO_MODELS = dict.fromkeys(ZOO_DENOISERS, "scenes") | ZOO_PICTURES
ZOO_STARTS = {"scenes-class": "scenes-text", "emoji-uncond": "emoji-text"}  # model -> the one that it starts from
# A program draws the scenes; they have no data.
ZOO_DATA = {"emoji": "results/zoo/emoji.npz", "photos": "results/zoo/photos.data"}


wildcard_constraints:
    kind="|".join(["scenes", *ZOO_DATA]),


rule zoo:
    input:
        expand("results/zoo/{part}", part=["scenes-extractor", "scenes-clip", "scenes.npz"]),
        expand("results/zoo/{denoiser}{part}", denoiser=ZOO_DENOISERS, part=["", ".json", ".png"]),


# Trains the models of real pictures and judges them: about 10 hours of CPU time. The data need npm, librsvg and internet
# access.
rule zoo_pictures:
    input:
        expand("results/zoo/{model}{part}", model=ZOO_PICTURES, part=["", ".json", ".png"]),
        expand("results/zoo/{kind}-reference.npz", kind=ZOO_DATA),


rule zoo_emoji:
    output:
        ensure("results/zoo/emoji.npz", non_empty=True),
    log:
        "results/zoo/emoji.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(2000, 60),
    shell:
        "python -u -m quest.zoo.emoji_data -o {output:q} > {log:q} 2>&1"


rule zoo_photos:
    output:
        directory("results/zoo/photos.data"),
    log:
        "results/zoo/photos.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(2000, 60),
    params:
        fetch="from torchvision.datasets import CIFAR10; import sys; CIFAR10(sys.argv[1], download=True)",
    shell:
        "python -c {params.fetch:q} {output:q} > {log:q} 2>&1"


# Lite0's whitened components, and the features of the reference split. They hold no pictures, and ship with the suite.
rule zoo_picture_statistics:
    input:
        lambda wc: ZOO_DATA[wc.kind],
    output:
        components=ensure("results/zoo/lite0-{kind}.safetensors", non_empty=True),
        reference=ensure("results/zoo/{kind}-reference.npz", non_empty=True),
        captions="results/zoo/{kind}-captions.txt",  # empty for photographs
    log:
        "results/zoo/{kind}-statistics.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(3000, 60),
    shell:
        "python -u -m quest.zoo.picture_statistics {wildcards.kind:q} --data {input:q} --components {output.components:q}"
        " --captions {output.captions:q} -o {output.reference:q} --threads {threads:q} > {log:q} 2>&1"


# The network that tells whether a photograph shows its class.
rule zoo_photos_classifier:
    input:
        ZOO_DATA["photos"],
    output:
        directory("results/zoo/photos-classifier"),
    log:
        "results/zoo/photos-classifier.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(3000, 120),
    shell:
        "python -u -m quest.zoo.train_classifier --data {input:q} -o {output:q} --threads {threads:q} > {log:q} 2>&1"


# The image-text model that tells whether an image of emoji shows its caption.
rule zoo_emoji_clip:
    input:
        ZOO_DATA["emoji"],
    output:
        directory("results/zoo/emoji-clip"),
    log:
        "results/zoo/emoji-clip.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(3000, 120),
    shell:
        "python -u -m quest.zoo.train_clip --pictures emoji --data {input:q} -o {output:q} --iterations 2000"
        " --threads {threads:q} > {log:q} 2>&1"


rule zoo_autoencoder:
    input:
        lambda wc: ZOO_DATA.get(wc.kind, []),
    output:
        directory("results/zoo/autoencoder-{kind}"),
    log:
        "results/zoo/autoencoder-{kind}.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(3000, 240),
    shell:
        "python -u -m quest.zoo.train_autoencoder {wildcards.kind:q} --data {input:q} -o {output:q}"
        " --threads {threads:q} > {log:q} 2>&1"


rule zoo_latents:
    input:
        autoencoder="results/zoo/autoencoder-{kind}",
        data=lambda wc: ZOO_DATA.get(wc.kind, []),
    output:
        ensure("results/zoo/latents-{kind}.safetensors", non_empty=True),
    log:
        "results/zoo/latents-{kind}.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(3000, 60),
    shell:
        "python -u -m quest.zoo.latents {input.autoencoder:q} --pictures {wildcards.kind:q} --data {input.data:q}"
        " -o {output:q} --threads {threads:q} > {log:q} 2>&1"


rule zoo_denoiser:
    input:
        autoencoder=lambda wc: f"results/zoo/autoencoder-{ZOO_MODELS[wc.model]}",
        latents=lambda wc: f"results/zoo/latents-{ZOO_MODELS[wc.model]}.safetensors",
        data=lambda wc: ZOO_DATA.get(ZOO_MODELS[wc.model], []),
        start=lambda wc: f"results/zoo/{ZOO_STARTS[wc.model]}" if wc.model in ZOO_STARTS else [],
    output:
        directory("results/zoo/{model}"),
    log:
        "results/zoo/{model}.log",
    wildcard_constraints:
        model="|".join(ZOO_MODELS),
    conda:
        "../../environment.yml"
    resources:
        **needs(4000, 900),
    params:
        start=lambda wc, input: ["--start-from", input.start] if input.start else [],
    shell:
        "python -u -m quest.zoo.train_denoiser {wildcards.model:q} --autoencoder {input.autoencoder:q}"
        " {params.start:q} --latents {input.latents:q} --data {input.data:q} -o {output:q} --threads {threads:q} > {log:q} 2>&1"


# Distances to held-out pictures, whether samples show what was asked for, copies, and a grid: look at them first.
rule zoo_judge:
    input:
        model="results/zoo/{model}",
        data=lambda wc: ZOO_DATA.get(ZOO_MODELS[wc.model], []),
        judge=lambda wc: ZOO_JUDGES.get(wc.model, []),
        reference=lambda wc: "results/zoo/scenes.npz" if wc.model in ZOO_DENOISERS else [],
    output:
        numbers=ensure("results/zoo/{model}.json", non_empty=True),
        grid=ensure("results/zoo/{model}.png", non_empty=True),
    log:
        "results/zoo/{model}.judge.log",
    wildcard_constraints:
        model="|".join(ZOO_MODELS),
    conda:
        "../../environment.yml"
    resources:
        **needs(4000, 60),
    shell:
        "python -u -m quest.zoo.acceptance {input.model:q} --model {wildcards.model:q} --data {input.data:q}"
        " --judge {input.judge:q} --reference {input.reference:q} -o {output.numbers:q} --grid {output.grid:q}"
        " --threads {threads:q} > {log:q} 2>&1"


# This rule replaces the models of pictures that the suite ships, with their statistics and captions.
rule zoo_pictures_accept:
    input:
        rules.zoo_pictures.input,
    log:
        "results/zoo/accept_pictures.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(200, 5),
    params:
        folders=expand("results/zoo/{part}", part=[*ZOO_PICTURES, "emoji-clip"]),
        accepted=expand("resources/zoo/{part}", part=[*ZOO_PICTURES, "emoji-clip"]),
        components=expand("results/zoo/lite0-{kind}.safetensors", kind=ZOO_DATA),
    shell:
        "{{ cp -rv {params.folders:q} -t resources/zoo && cp -v {params.components:q} -t resources/reference"
        " && for kind in emoji photos; do cp -v results/zoo/$kind-reference.npz resources/reference/$kind.npz; done"
        " && cp -v results/zoo/emoji-captions.txt resources/reference"
        " && python -m quest.runtime.sums {params.accepted:q}; }} > {log:q} 2>&1"


rule zoo_extractor:
    input:
        "results/zoo/autoencoder-scenes",
    output:
        directory("results/zoo/scenes-extractor"),
    log:
        "results/zoo/scenes-extractor.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(3000, 120),
    shell:
        "python -u -m quest.zoo.train_extractor --autoencoder {input:q} -o {output:q} --threads {threads:q} > {log:q} 2>&1"


rule zoo_clip:
    output:
        directory("results/zoo/scenes-clip"),
    log:
        "results/zoo/scenes-clip.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(3000, 120),
    shell:
        "python -u -m quest.zoo.train_clip -o {output:q} --threads {threads:q} > {log:q} 2>&1"


rule zoo_reference:
    input:
        "results/zoo/scenes-extractor",
    output:
        ensure("results/zoo/scenes.npz", non_empty=True),
    log:
        "results/zoo/reference.log",
    conda:
        "../../environment.yml"
    resources:
        **needs(2000, 30),
    shell:
        "python -u -m quest.zoo.reference --extractor {input:q} -o {output:q} --threads {threads:q} > {log:q} 2>&1"


# Look at the grids and numbers first: this rule replaces the models and networks that the suite ships.
rule zoo_accept:
    input:
        rules.zoo.input,
    log:
        "results/zoo/accept.log",
    localrule: True
    conda:
        "../../environment.yml"
    resources:
        **needs(200, 5),
    params:
        folders=expand("results/zoo/{part}", part=[*ZOO_DENOISERS, "scenes-extractor", "scenes-clip"]),
        accepted=expand("resources/zoo/{part}", part=[*ZOO_DENOISERS, "scenes-extractor", "scenes-clip"]),
    shell:
        "{{ cp -rv {params.folders:q} -t resources/zoo && cp -v results/zoo/scenes.npz resources/reference"
        " && python -m quest.runtime.sums {params.accepted:q}; }} > {log:q} 2>&1"
