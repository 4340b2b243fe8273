"""No quantization: all other rows are compared with this one."""

from baselines.method import Method


def quantize(pipe, calibration, w: int, a: int):
    """Return the pipeline unchanged. Raises ValueError for bits other than w32a32."""
    if (w, a) != (32, 32):
        raise ValueError(f"method fp is full precision: its bits are w32a32, not w{w}a{a}")
    return pipe


METHOD = Method("fp", quantize, about="full precision: nothing is quantized", bits=("w32a32",))
