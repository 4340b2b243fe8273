"""What making a checkpoint takes, by method: how often each step that `quest.planning.measure` measures is taken."""

from collections import Counter

from baselines.quest import sized
from quest.config import parse_bits
from quest.diffusion.models import Model
from quest.learning.reconstruction import CHECK


def calls(model: Model) -> tuple[int, int]:
    """Denoiser calls of a trajectory, and samples in each: both halves of a guided one."""
    return model.steps + (model.sampler == "plms"), 2 if model.guidance > 1 else 1


def quantizing(method: str, recipe: dict, bits: str, model: Model, trajectories: int) -> Counter | None:
    """What a cell takes, {what of `measure`: how often}; None for a method whose work is not written down here.

    method: a name in baselines.METHODS. recipe: its keyword arguments. trajectories: in the calibration set.
    """
    from baselines import METHODS

    w, a = parse_bits(bits)
    if method not in _WORK:
        return None
    # As the quantize script: the model's protocol, what METHODS fixes, and the recipe, which has the last word.
    recipe = model.recipe(METHODS[method], a) | getattr(METHODS[method], "keywords", {}) | recipe
    return _WORK[method](recipe, w, model, trajectories)


def _uniform(recipe, model, trajectories):
    """Rows of `baselines.adaround.uniform`."""
    from baselines.adaround import STEPS

    steps, halves = calls(model)
    kept = len(range(0, steps, max(1, steps // STEPS)))
    return kept * halves * min(trajectories, max(1, recipe.get("rows", 1024) // (kept * halves)))


def _normal(recipe, model, trajectories):
    """Rows of `baselines.ptq4dm.ndtc`."""
    halves = calls(model)[1]
    return halves * max(1, recipe.get("rows", 1024) // halves)


def _settings(recipe):
    from baselines.adaround import settings

    names = ("weight_iterations", "activation_iterations", "batch")
    return settings(recipe.get("preset", "short"), **{name: recipe.get(name) for name in names})


def _learned(what, times, rows):
    """What has a cost of its own and one for each row: how often, and with how many rows in all."""
    return Counter({what: times, f"{what} row": rows})


def _rounding(recipe, w, rows):
    """AdaRound of all weights, where there is no checkpoint to start from."""
    own = _settings(recipe)
    if recipe.get("init"):
        return Counter()
    work = Counter({"weight ranges": 1})
    if w < own.nearest_from and own.weight_iterations:
        # Both networks see the rows once, and every unit some of them before and after.
        work["call"] = 2 * rows + 2 * min(CHECK, rows)
        work += _learned("rounding", own.weight_iterations, own.weight_iterations * own.batch)
    return work


def _adaround(rows_of):
    return lambda recipe, w, model, trajectories: _rounding(recipe, w, rows_of(recipe, model, trajectories))


def _stack(rows_of):
    """Q-Diffusion's stack on some rows of the calibration set."""

    def counted(recipe, w, model, trajectories):
        own, rows = _settings(recipe), rows_of(recipe, model, trajectories)
        work = _rounding(recipe, w, rows) + Counter({"ranges": 1})
        if recipe.get("activation_ranges") in ("ema", "ema-symmetric"):  # running averages over all rows
            work["quantized call"] += rows
        if own.activation_iterations:
            work += Counter({"call": rows, "quantized call": 2 * min(CHECK, rows)})
            work += _learned("step learning", own.activation_iterations, own.activation_iterations * own.batch)
        return work

    return counted


def _ptqd(recipe, w, model, trajectories):
    steps, halves = calls(model)
    statistics = Counter({"quantized call": trajectories * steps * halves})
    return _stack(_uniform)(recipe, w, model, trajectories) + statistics


def _ptq4dm_as_released(recipe, w, model, trajectories):
    return _learned("threshold search", 1, _normal(recipe, model, trajectories))


def _tfmq_dm(recipe, w, model, trajectories):
    own = _settings(recipe)
    work = _rounding(recipe, w, _uniform(recipe, model, trajectories))
    work["ranges"] += model.steps if recipe.get("fsc_scope") == "all" else 1
    if w < own.nearest_from:
        work["temporal rounding"] += own.weight_iterations
    return work


def _efficient_dm(recipe, w, model, trajectories):
    from baselines.efficient_dm import PRESETS

    size = PRESETS[recipe.get("preset", "short")]
    iterations, batch = (recipe.get(name, size[name]) for name in ("iterations", "batch"))
    rows = iterations * batch * calls(model)[1]
    return Counter({"ranges": model.steps}) + _learned("distillation", iterations, rows)


def _aligned(what):
    """QuEST's two stages, their iterations being of one kind."""

    def counted(recipe, w, model, trajectories):
        size = sized(recipe.get("preset", "short"), recipe["selection"])
        iterations, rows = 0, 0
        for stage, published, batch in zip(("tla", "cma"), size.iterations, size.batch, strict=True):
            own = recipe.get(f"{stage}_iterations", published)
            iterations, rows = iterations + own, rows + own * (recipe.get("batch") or batch)
        steps, halves = calls(model)
        # Full precision sees the whole calibration set first, for the targets of both stages.
        work = Counter({"call": trajectories * steps * halves, "ranges": recipe["time_groups"] or model.steps})
        if not recipe.get("init"):
            work["weight ranges"] += 1
        return work + (Counter({what: rows}) if what == "training step" else _learned(what, iterations, rows))

    return counted


def _nearest(recipe, w, model, trajectories):
    from baselines.rtn import WHOLE
    from quest.learning.calibrate import static_rows

    searched = recipe.get("ranges", "minmax") != "minmax"
    rows = recipe.get("samples") or (static_rows(8) if searched else WHOLE)  # of 8-bit activations; at 4 bits fewer
    return Counter({"weight ranges": 1, "ranges": 1} if searched else {}) + Counter({"quantized call": rows})


_WORK = {
    "rtn": _nearest,
    "rtn-mse": _nearest,
    "adaround": _adaround(_uniform),
    "adaround-ndtc": _adaround(_normal),
    "q-diffusion": _stack(_uniform),
    "ptq4dm": _stack(_normal),
    "ptq4dm-as-released": _ptq4dm_as_released,
    "ptqd": _ptqd,
    "ptqd-as-released": _ptqd,
    "tfmq-dm": _tfmq_dm,
    "tfmq-dm-as-released": _tfmq_dm,
    "efficient-dm": _efficient_dm,
    "efficient-dm-as-released": _efficient_dm,
    "full-finetune": _aligned("full finetuning"),
    "qalora": _aligned("training step"),
    "quest": _aligned("training step"),
    "quest-paper": _aligned("training step"),
    "quest-official": _aligned("training step"),
}
