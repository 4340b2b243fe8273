"""Make the pipeline of one of the paper's models from its published weights, which are downloaded if necessary."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "model", "folder")
    checkpoint = "published weights; without it, they are downloaded if an address is known"
    parser.add_argument("--checkpoint", type=Path, nargs="?", help=checkpoint)
    parser.add_argument("--tokenizer", type=Path, nargs="?", help="folder of the CLIP tokenizer")
    parser.add_argument("--captions", type=Path, nargs="?", help="file with one caption per line")
    parser.add_argument("--fetched", type=Path, required=True, help="folder for downloads")
    arguments = parser.parse_args()

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


if __name__ == "__main__":
    main()
