"""Load DeepSpeed's compiled operators where this is imported: in the fork server, whose forks then have them.

Each process would otherwise ask ninja whether they are up to date, one after the other, and look at the processor for a
second whenever it makes an optimizer for the host. The largest operator is compiled in half the time.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import cpuinfo
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder import AsyncIOBuilder

for builder, name in (("ShareMemCommBuilder", "deepspeed_shm_comm"), ("CPUAdamBuilder", "cpu_adam")):
    # Nothing is compiled here that no test may need.
    if (Path(os.environ.get("TORCH_EXTENSIONS_DIR", "")) / name / f"{name}.so").exists():
        get_accelerator().create_op_builder(builder).load()

cpuinfo.get_cpu_info = cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()

_compile_and_load = AsyncIOBuilder.jit_load


def _quickly(self: AsyncIOBuilder, verbose: bool = True) -> Any:
    # By PATH and not by CXX, of which ninja would notice that other processes have another.
    with mock.patch.dict(os.environ, PATH=f"{Path(__file__).with_name('compiler')}{os.pathsep}{os.environ['PATH']}"):
        return _compile_and_load(self, verbose)


AsyncIOBuilder.jit_load = _quickly
