"""The device of a run and its distribution over processes, applied to a model from outside."""

from khaosz.parallel.module import ParallelContext, data_parallel, sum_over_ranks
from khaosz.parallel.setup import available_devices, setup_parallel

__all__ = [
    "ParallelContext",
    "available_devices",
    "data_parallel",
    "setup_parallel",
    "sum_over_ranks",
]
