"""Write the tables and figures of the three properties from the measurements of each model. Imports no torch."""

from pathlib import Path

from quest.runtime import command_line


def main() -> None:
    parser = command_line.parser(__doc__, "folder")
    for name in ("activations", "temporal", "sensitivity"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True, help=f"{name}.json of every model")
    arguments = parser.parse_args()

    from quest.report import properties, property_figures
    from quest.report.rendering import write
    from quest.runtime.files import read_json

    activations, temporal, sensitivity = (
        [read_json(file) for file in files]
        for files in (arguments.activations, arguments.temporal, arguments.sensitivity)
    )
    frames = {
        "activations": properties.activation_frame(activations),
        "activation_changes": properties.change_frame(activations),
        "temporal": properties.temporal_frame(temporal),
        "time_ranges": properties.range_frame(temporal),
        "embeddings": properties.embeddings_frame(temporal),
        "sensitivity": properties.sensitivity_frame(sensitivity),
    }
    for name, frame in frames.items():
        write(arguments.output / f"{name}.csv", frame)
    folder = arguments.output / "figures"
    property_figures.histograms(activations, folder / "activations.png")
    property_figures.imbalance(frames["activations"], folder / "imbalance.png")
    property_figures.temporal(frames["temporal"], frames["embeddings"], folder / "temporal.png")
    property_figures.sensitivity(frames["sensitivity"], folder / "sensitivity.png")


if __name__ == "__main__":
    main()
