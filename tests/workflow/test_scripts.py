"""The scripts that see arrays only, from made-up arrays to the README, as the rules call them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from quest.metrics.frechet import Statistics

ROOT = Path(__file__).parents[2]
N, CALLS = 40, 3
TORCH_FREE = (
    "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__');"
    "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
)


def script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run one script in a process of its own, which fails if torch was imported."""
    command = [sys.executable, "-c", TORCH_FREE, f"workflow.scripts.{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def succeed(*arguments: object) -> None:
    run = script(*arguments)
    assert run.returncode == 0, run.stderr


def sample(folder: Path, seed: int, noise: float) -> None:
    """What the sample script would write for a cell, in two shards: the same draws everywhere, and noise on top."""
    common, own = np.random.default_rng(0), np.random.default_rng(seed)
    drawn = {"latents": (N, 2, 4, 4), "pool": (N, 6), "spatial": (N, 7), "logits": (N, 5)}
    arrays = {name: common.normal(size=shape) + noise * own.normal(size=shape) for name, shape in drawn.items()}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    images = (64 * common.random((N, 8, 8, 3)) + 64 * noise * own.random((N, 8, 8, 3))).astype(np.uint8)
    made = {"commit": "abc", "dirty": False, "versions": {}, "machine": {}}
    footprint = {"bytes": 1_500_000, "bops": 2_000_000_000, "effective_bits": 4.2}
    metadata = json.dumps({"footprint": footprint, "provenance": made})
    folder.mkdir(parents=True)
    for shard, index in enumerate((np.arange(0, N // 2), np.arange(N // 2, N))):
        features = {name: arrays[name][index] for name in ("pool", "spatial", "logits")}
        if shard == 0 and noise:
            features |= {"eps_error": noise * own.random((4, CALLS)), "timesteps": np.array([801, 401, 1])}
        np.savez(folder / f"features-{shard}.npz", index=index, **features, metadata=metadata)
        kept = {"images": images[index], "latents": arrays["latents"][index]}
        np.savez(folder / f"samples-{shard}.npz", index=index, **kept, metadata=metadata)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Metrics, tables and figures of three cells."""
    from quest.metrics.frechet import save_reference

    folder = tmp_path_factory.mktemp("run")
    model = folder / "scenes-class"
    cells = {"fp/w32a32": 0.0, "rtn/w4a4": 0.5, "quest-suite/w4a4": 0.1}
    for seed, (cell, noise) in enumerate(cells.items(), 1):
        sample(model / cell, seed, noise)
    reference = folder / "reference.npz"
    real = np.random.default_rng(9)
    pool, spatial = (Statistics.from_features(real.normal(size=(200, d))) for d in (6, 7))
    save_reference(reference, pool, spatial, {"what": "made up", "extractor": "scenes"})

    def files(cell, kind):
        return [model / cell / f"{kind}-{shard}.npz" for shard in (1, 0)]

    for cell in cells:
        arguments = ["--features", *files(cell, "features"), "--samples", *files(cell, "samples")]
        full = ["--fp-features", *files("fp/w32a32", "features"), "--fp-samples", *files("fp/w32a32", "samples")]
        rest = [*full, "--reference", reference, "-o", model / cell / "metrics.json"]
        succeed("metrics", "scenes-class", *cell.split("/"), *arguments, *rest)
    succeed("tables", *[model / cell / "metrics.json" for cell in cells], "-o", folder / "tables")
    (model / "ranges.csv").write_text(
        "layer_class,timestep,low,high\nattention,801,-1,2\nattention,1,-2,3\n", encoding="utf-8"
    )
    figures = [folder / f"figures/{name}.png" for name in ("fid_vs_bits", "eps_error_vs_timestep")]
    figures += [folder / "figures/activation_ranges_vs_timestep.png"]
    tables = ["--main", folder / "tables/main.csv", "--eps-error", folder / "tables/eps_error.csv"]
    succeed("curves", *tables, "--ranges", model / "ranges.csv", "-o", *figures)
    rows = [model / cell / "samples-0.npz" for cell in cells]
    succeed("grid", *rows, "-n", 4, "-o", folder / "figures/samples-scenes-class-w4a4.png")
    return folder


def test_tables_are_the_same_bytes_in_a_locale_without_their_signs(run, tmp_path):
    metrics = [run / "scenes-class" / cell / "metrics.json" for cell in ("fp/w32a32", "rtn/w4a4", "quest-suite/w4a4")]
    plain = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    command = [sys.executable, "-m", "workflow.scripts.tables", *map(str, metrics), "-o", str(tmp_path / "tables")]
    made = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True)
    assert made.returncode == 0, made.stderr.decode("ascii", "replace")
    assert b"\\xb1" in made.stdout  # the sign before half an interval
    for file in (run / "tables").iterdir():
        assert (tmp_path / "tables" / file.name).read_bytes() == file.read_bytes()


def test_cells_become_tables_and_figures(run):
    main = pd.read_csv(run / "tables/main.csv").set_index(["method", "metric"])
    assert main.loc[("quest-suite", "latent_mse"), "value"] == pytest.approx(0.01, rel=0.2)
    assert main.loc[("rtn", "latent_mse"), "value"] == pytest.approx(0.25, rel=0.2)
    assert ("fp", "latent_mse") not in main.index
    assert set(main["n"].drop("eps_error", level="metric")) == {N}
    assert set(main["protocol"].str.partition(";")[0]) == {"ddim 20, eta 0, guidance 3"}
    assert set(main["size_mb"]) == {1.5} and set(main["bops"]) == {2e9} and set(main["effective_bits"]) == {4.2}
    assert "| fp | w32a32 | 1.5 | 0.002 |" in (run / "tables/main.md").read_text(encoding="utf-8")
    paired = pd.read_csv(run / "tables/paired.csv").set_index(["method", "versus", "metric"])
    assert paired.loc[("quest-suite", "rtn", "latent_mse"), "better"] == "quest-suite"
    for figure in (
        "fid_vs_bits",
        "eps_error_vs_timestep",
        "activation_ranges_vs_timestep",
        "samples-scenes-class-w4a4",
    ):
        assert (run / f"figures/{figure}.png").stat().st_size > 1000


def test_cells_become_ablations_and_the_papers_tables(run, tmp_path, write_checkpoint):
    cells = [shutil.copytree(run / "scenes-class" / name, tmp_path / name) for name in ("rtn/w4a4", "quest-suite/w4a4")]
    for cell in cells:
        write_checkpoint(cell / "model.safetensors", seconds=90.0, peak_memory=2000, cost={"stages": []})
    metrics = [cell / "metrics.json" for cell in cells]
    block = {"against": "rtn", "rows": {"quest-suite": {"method": "quest-suite", "time_groups": 1}}}
    outputs = {f"--{kind}": tmp_path / f"ablations.{kind}" for kind in ("csv", "markdown", "figure")}
    outputs["--figure"] = tmp_path / "ablations.png"
    files = [word for option in outputs.items() for word in option]
    succeed("ablations", *metrics, "--ablations", json.dumps(block), *files)
    rows = pd.read_csv(tmp_path / "ablations.csv").set_index(["row", "metric"])
    assert rows.loc[("quest-suite", "latent_mse"), "better"] == "quest-suite" and set(rows["seconds"]) == {90.0}
    assert "method=quest-suite; time_groups=1" in (tmp_path / "ablations.markdown").read_text(encoding="utf-8")
    assert (tmp_path / "ablations.png").stat().st_size > 1000
    refused = script("ablations", *metrics, "--ablations", "{}", *files)
    assert refused.returncode == 2 and "the config has no ablations" in refused.stderr
    succeed("tables", *metrics, "--kind", "paper", "-o", tmp_path)
    assert "| scenes-class | quest (quest-suite) | w4a4 | 1.43 |" in (tmp_path / "table4.md").read_text(
        encoding="utf-8"
    )


MARKED = "before\n<!-- results: begin -->\nstale\n<!-- results: end -->\nafter\n"


def put_into(page: Path, run: Path, *options: object) -> subprocess.CompletedProcess:
    names = {"--table": "main.md", "--main": "main.csv", "--paired": "paired.csv"}
    tables = [word for option, name in names.items() for word in (option, run / "tables" / name)]
    figures = ["--figures", *(run / "figures" / f"{name}.png" for name in ("samples-scenes-class-w4a4", "fid_vs_bits"))]
    return script("readme", *tables, *options, *figures, "--page", page)


@pytest.fixture()
def page(tmp_path) -> Path:
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text(MARKED, encoding="utf-8")
    return page


def test_results_go_between_the_markers_of_their_page(run, page, tmp_path):
    assert put_into(page, run).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- results: begin -->\n") and text.endswith("<!-- results: end -->\nafter\n")
    assert "stale" not in text and "commit abc" in text
    assert (run / "tables/main.md").read_text(encoding="utf-8").strip() in text
    assert "| scenes-class | w4a4 | quest-suite | rtn |" in text and "| log10 latent MSE to FP | FID to FP |" in text
    assert (
        "In log10 latent MSE to FP, PSNR to FP and FID to FP, quest-suite's checkpoint is better than rtn's on" in text
    )
    assert "not on methods" in text
    for link in ("samples-scenes-class-w4a4.png", "fid_vs_bits.png", "main.csv", "paired.csv"):
        assert f"(assets/{link})" in text
        assert (tmp_path / "docs/assets" / link).is_file()
    assert put_into(page, run).returncode == 0
    assert page.read_text(encoding="utf-8") == text


def test_a_file_beside_the_page_is_replaced_and_never_half_written(run, page, tmp_path):
    asset, before = tmp_path / "docs/assets/main.csv", tmp_path / "before.csv"
    asset.parent.mkdir()
    asset.write_text("stale", encoding="utf-8")
    before.hardlink_to(asset)  # would change with the file if that were written in place
    assert put_into(page, run).returncode == 0
    assert before.read_text(encoding="utf-8") == "stale"
    assert asset.read_bytes() == (run / "tables/main.csv").read_bytes()


def test_verdicts_speak_of_methods_over_seeds_only(run, page, tmp_path):
    """In the words of the table over seeds, which here contradicts the checkpoints of the run."""
    seeds = tmp_path / "seeds.csv"
    row = {"model": "scenes-class", "bits": "w4a4", "metric": "psnr", "method": "quest-suite", "versus": "rtn"}
    pd.DataFrame([row | {"better": "neither", "seeds": "0,1,2", "n": 40}]).to_csv(seeds, index=False)
    assert put_into(page, run, "--seeds", seeds).returncode == 0
    text = page.read_text(encoding="utf-8")
    assert "At W4A4, over quantization seeds 0,1,2, the methods as configured here (n = 40):" in text
    assert "In PSNR to FP, quest-suite is not told apart from rtn on scenes-class." in text
    assert "checkpoint is better than rtn" not in text
    assert "(assets/seeds.csv)" in text and (tmp_path / "docs/assets/seeds.csv").is_file()


def test_a_page_without_markers_is_left_alone(run, page):
    page.write_text("no markers", encoding="utf-8")
    said = put_into(page, run)
    assert said.returncode != 0 and "<!-- results: begin -->" in said.stderr
    assert page.read_text(encoding="utf-8") == "no markers"


def test_the_readme_has_the_two_commands_and_the_results_their_markers():
    results, text = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/results.md", "README.md"))
    assert results.count("<!-- results: begin -->") == results.count("<!-- results: end -->") == 1
    assert "\n    pip install -e . && snakemake --cores all\n" in text
    assert "\n    pip install -e '.[test]' && pytest\n" in text


def test_findings_go_between_the_markers_of_their_document(run, tmp_path):
    cells, document = [*run.glob("scenes-class/*/w4a4/metrics.json")], tmp_path / "document.md"
    document.write_text("before\n<!-- findings: begin -->\nstale\n<!-- findings: end -->\nafter\n", encoding="utf-8")
    succeed("findings", *cells, "--document", document)
    text = document.read_text(encoding="utf-8")
    assert text.startswith(
        "before\n<!-- findings: begin -->\n\nUnless a line names another model, these are results of"
    )
    assert "of scenes-class at W4A4" in text and "- quest-wide against quest-suite: NOT RUN (quest-wide)" in text
    assert text.endswith("\n\n<!-- findings: end -->\nafter\n") and "stale" not in text
    document.write_text("<!-- findings: end --><!-- findings: begin -->", encoding="utf-8")
    said = script("findings", *cells, "--document", document)
    assert said.returncode != 0 and "once each and in this order" in said.stderr
    assert "<!-- findings: begin -->" in (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
