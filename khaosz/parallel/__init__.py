"""The device of a run and its distribution over processes, applied to a model from outside."""

from khaosz.parallel.module import ParallelContext, across, data_parallel
from khaosz.parallel.setup import available_devices, setup_parallel

__all__ = ["ParallelContext", "across", "available_devices", "data_parallel", "setup_parallel"]
