# How jobs that need a GPU ask for it: whole, or in parts where the config says `share_gpu`.
GPU_MEMORY = memory.parse(config["share_gpu"]["memory"]) if "share_gpu" in config else 1  # bytes


def gpu_parts(rule):
    """Parts of a GPU that a job takes: those that its planned memory fills, or all. With `--retries` as `growing`."""

    def resource(wc, attempt):
        needed = attempt * of_plan(rule, wc).get("mem_mb", math.inf) * 10**6
        return at_size(0, math.ceil(min(1, needed / GPU_MEMORY) * GPU_PARTS))

    return resource


def gpu_whole(rule):
    """Number of GPUs that a job has for itself: one, or none where it shares one."""
    return lambda wc, attempt: at_size(0, int(gpu_parts(rule)(wc, attempt) == GPU_PARTS))


def gpu_shards(rule):
    """What a job that shares a GPU asks of Slurm, the name of a generic resource and a number; "" for other jobs."""

    def resource(wc, attempt):
        parts = gpu_parts(rule)(wc, attempt)
        return f"shard:{parts}" if 0 < parts < GPU_PARTS else ""

    return resource
