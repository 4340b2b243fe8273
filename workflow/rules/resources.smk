# What jobs ask for: memory, time, and GPUs, whole or in parts where the config says `share_gpu`.

# What `python -m quest plan CONFIG --jobs` wrote: (rule, model, method, bits) -> memory and time.
PLAN = Path("results", NAME, "jobs.csv")
PLANNED_KEYS, PLANNED_NUMBERS = ("rule", "model", "method", "bits"), ("least_mb", "mem_mb", "runtime")
PLANNED = {
    tuple(row[key] for key in PLANNED_KEYS): {key: int(row[key]) for key in PLANNED_NUMBERS}
    for row in (read_rows(PLAN, PLANNED_KEYS + PLANNED_NUMBERS) if PLAN.is_file() else [])
}
GPU_MEMORY = memory.parse(config["share_gpu"]["memory"]) if "share_gpu" in config else 1  # bytes


def of_plan(rule, wc):
    """{least_mb, mem_mb, runtime} that the plan has for a job; {} without one."""
    return PLANNED.get((rule, *(getattr(wc, key, "") for key in PLANNED_KEYS[1:])), {})


def at_size(cpu, cuda):
    """`cpu` for the small models on a CPU, `cuda` for the paper's models on a GPU."""
    return cuda if DEVICE == "cuda" else cpu


def needs(mem_mb, runtime, *, gpu=False, plan=None):
    """The resources of a job: memory [MB], time [minutes] and GPUs. With `--retries`, attempt k gets k times as much.

    mem_mb, runtime: a number, or a pair for `at_size`. gpu: whether the job takes a GPU on which the config runs. plan:
    the name of its rule where the plan has it, whose numbers come first; such jobs take a GPU, or share one.
    """

    def growing(key, first):
        first = at_size(*first) if isinstance(first, tuple) else first
        return lambda wc, attempt: of_plan(plan, wc).get(key, first) * attempt

    def parts(wc, attempt):
        """Parts of a GPU: those that the planned memory fills, or all."""
        needed = attempt * of_plan(plan, wc).get("mem_mb", math.inf) * 10**6
        return at_size(0, math.ceil(min(1, needed / GPU_MEMORY) * GPU_PARTS))

    def whole(wc, attempt):
        """Number of GPUs for this job alone: one, or none where it shares one."""
        return at_size(0, int(parts(wc, attempt) == GPU_PARTS))

    def shards(wc, attempt):
        """What a job that shares a GPU asks of Slurm, the name of a generic resource and a number; "" for others."""
        taken = parts(wc, attempt)
        return f"shard:{taken}" if 0 < taken < GPU_PARTS else ""

    grown = {"mem_mb": growing("mem_mb", mem_mb), "runtime": growing("runtime", runtime)}
    if plan:
        return grown | {"gpu": whole, "gpu_parts": parts, "gres": shards}
    return grown | ({"gpu": at_size(0, 1)} if gpu else {})
