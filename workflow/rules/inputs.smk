# Functions of the inputs and parameters of settle and of questions. Rule files hold rules alone, as `snakemake --lint` asks.
from quest.config.settled import told
from quest.report.settle import RECORDS, identity


def look_before(wc):
    """What the look before decided; nothing for the first one."""
    before = int(wc.look) - 1
    return checkpoints.look.get(name=wc.name, look=before).output[0] if before >= 0 else []


def asked_for(wc):
    """Records of the cells that the look before asked for."""
    before = look_before(wc)
    runs = json.loads(Path(before).read_text(encoding="utf-8"))["wanted"] if before else []
    return [f"results/{wc.name}/{run}/evidence.json" for run in runs]


def lottery_evidence(wc):
    """Records of the cells of `lottery`."""
    if not LOTTERY_RUNS:
        raise WorkflowError(
            "settle.lottery: the config has no such key; e.g. lottery: {model: [photos-class], method: [quest-suite], "
            "draw: [3, 4], seed: [3, 4]}, or --configfile workflow/config/settle.yaml"
        )
    return files_of(LOTTERY_RUNS, "evidence.json")


def families(wc):
    if "settle" not in config:
        raise WorkflowError(
            "settle: the config has no such key; e.g. settle: {bits: [w4a4], families: {mine: [[rtn-mse, rtn]]}}, or "
            "--configfile workflow/config/settle.yaml"
        )
    return json.dumps(families_of(config))


def identities(wc):
    """[[model, bits, row, identity]] of all rows of `settle`."""
    rows = dict.fromkeys((run.model, run.bits, parts_of(run.method)[0]) for run in SETTLE_RUNS)
    return json.dumps(
        [[*row, identity(told(config, Run(row[0], row[2], row[1]), MODELS[row[0]], RECORDS))] for row in rows]
    )


def question(key):
    """The model or the bits in the config's `questions`."""
    if not QUESTIONS:
        raise WorkflowError("questions: the config has no such key; e.g. questions: {model: scenes-class, bits: w4a4}")
    return QUESTIONS[key]


def of_question(wc, at=""):
    """QuEST's run that a job evaluates: on the job's model if the job has one, else on the model of the questions.

    at: "" or a quantization seed such as "@1".
    """
    return Run(getattr(wc, "model", None) or question("model"), f"quest-suite{at}", question("bits"))


def seed_of(variant):
    """The end of a variant's name that says its quantization seed, or ""."""
    return "".join(variant.partition("@")[1:])


def question_file(file):
    """A file of the run `of_question`, or of its model, as an input."""

    def path(wc):
        run = of_question(wc)
        return f"results/{NAME}/{run.path if file == 'model.safetensors' else run.model}/{file}"

    return path


def question_init(wc, at=""):
    """The checkpoint that the run `of_question` starts from."""
    start = start_of(config, of_question(wc, at))
    return f"results/{NAME}/{start.path}/model.safetensors" if start else []
