"""Make the pipeline of one of the paper's models from its published weights, which are downloaded if necessary.

Of a model that a config declares itself, check that it can be quantized, and record its settings.
"""

import json
from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "folder")
    checkpoint = "published weights; without it, they are downloaded if an address is known"
    parser.add_argument("--checkpoint", type=Path, nargs="?", help=checkpoint)
    parser.add_argument("--tokenizer", type=Path, nargs="?", help="folder of the CLIP tokenizer")
    parser.add_argument("--captions", type=Path, nargs="?", help="file with one caption per line")
    parser.add_argument("--fetched", type=Path, required=True, help="folder for downloads")
    parser.add_argument(
        "--declaration", type=json.loads, nargs="?", help="what a config says of a model of its own, JSON"
    )
    arguments = parser.parse_args()
    if arguments.declaration:
        declare(arguments.model, arguments.declaration, arguments.output)
        return

    from quest.diffusion.models import get
    from quest.runtime.download import fetch

    model = get(arguments.model)
    origin, checkpoint = model.origin, arguments.checkpoint
    if origin is None:
        raise SystemExit(f"{model.name}: ships with the suite; nothing to prepare")
    if checkpoint is None:
        if origin.url is None:
            known = f"models.{model.name}.checkpoint: not in the config, and no address is known"
            raise SystemExit(f"{known}; name the path of {origin.what}")
        checkpoint = fetch(origin.url, arguments.fetched / Path(origin.url).name, origin.sha256)

    from quest.diffusion.published import prepare

    try:
        prepare(model, checkpoint, arguments.output, tokenizer=arguments.tokenizer, captions=arguments.captions)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"{model.name}: {error}") from None
    print(f"{model.name}: {checkpoint} became {arguments.output}", flush=True)


def declare(name: str, settings: dict, output: Path) -> None:
    """Record a model that a config declares, if it can be quantized. Prints the layers that QuEST would tune."""
    from baselines.selection import described
    from quest.diffusion.declared import declared, prepare
    from quest.diffusion.denoisers import denoiser_of
    from quest.quantization import guards

    try:
        model = declared(name, settings)
        pipe = model.load()
        guards.check(pipe)
        prepare(name, settings, output)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"{name}: {error}") from None
    print(
        f"{name}: {type(pipe).__name__}, {model.protocol}\n{described(denoiser_of(pipe), model.selection)}", flush=True
    )


if __name__ == "__main__":
    main()
