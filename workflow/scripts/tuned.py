"""Write the share of weights that QuEST tunes of each model, from its shapes alone: docs/assets/tuned.csv."""

from pathlib import Path

from quest.runtime import command_line

ROOT = Path(__file__).parents[2]


def main() -> None:
    command_line.parser(__doc__).parse_args()

    import pandas as pd

    from baselines.selection import shares
    from quest.diffusion.models import MODELS
    from quest.diffusion.published import denoiser
    from quest.report import rendering

    rows = []
    for name, model in MODELS.items():
        if not name.startswith("tiny-"):
            one = denoiser(model)
            told = {"model": name, "selection": model.selection, "parameters": sum(p.numel() for p in one.parameters())}
            rows.append(told | shares(one, model.selection))
    rendering.write(ROOT / "docs" / "assets" / "tuned.csv", pd.DataFrame(rows).round(6))


if __name__ == "__main__":
    main()
