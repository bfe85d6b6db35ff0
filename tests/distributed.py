"""Several real processes in one group, with a deadline: a hang becomes a failure, an error comes with its traceback.

On the CPU each process is a fresh fork of one that has imported everything and initialised nothing (`forked.py`).
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch.multiprocessing as mp

from tests import forked


def run(
    worker: Callable[..., Any], *args: Any, ranks: int, deadline: float = 500, accelerator: str = "cpu"
) -> list[Any]:
    """Run `worker(rank, *args)` in `ranks` processes of one group and return what each returned (picklable).

    `accelerator` is `cpu` (over gloo) or `cuda` (over nccl, a GPU for each rank).
    Raises `AssertionError` with every rank's traceback if one fails, or if they are not done after `deadline` seconds.
    """
    # CUDA must not be initialised in a fork.
    context = forked.context() if accelerator == "cpu" else mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        end = time.monotonic() + deadline
        output = Path(folder) / "output"
        output.touch()
        here = (Path.cwd(), {**os.environ, "DS_ACCELERATOR": accelerator}, output)
        processes = [
            context.Process(target=_enter, args=(worker, rank, ranks, store, results, end, args, here), daemon=True)
            for rank in range(ranks)
        ]
        # Now: a spawned process unpickles `worker` first, and DeepSpeed, which that imports, reads this once.
        with mock.patch.dict(os.environ, DS_ACCELERATOR=accelerator):
            for process in processes:
                process.start()
        answers: dict[int, Any] = {}
        failures: list[str] = []
        while len(answers) + len(failures) < ranks and time.monotonic() < end:
            if results.empty():
                if failures and all(p.exitcode is not None for p in processes):
                    break
                dead = [(i, p.exitcode) for i, p in enumerate(processes) if p.exitcode not in (None, 0)]
                if dead and results.empty():
                    failures.append(f"processes died without a word: {dead}")
                    break
                time.sleep(0.02)
                continue
            rank, answer, failure = results.get()
            if failure:
                failures.append(f"--- rank {rank}\n{failure}")
                end = min(end, time.monotonic() + 5)  # the others cannot finish a collective with it
            else:
                answers[rank] = pickle.loads(answer)
        for process in processes:
            process.join(timeout=0.1 if failures else 10)
            if process.is_alive():
                process.kill()
                process.join()
        print(output.read_text(errors="replace"), end="", flush=True)
    assert not failures, "\n".join(failures)
    assert len(answers) == ranks, f"ranks {sorted(set(range(ranks)) - set(answers))} were not done after {deadline} s"
    return [answers[rank] for rank in range(ranks)]


def _enter(
    worker: Callable[..., Any],
    rank: int,
    ranks: int,
    store: str,
    results: Any,
    end: float,
    args: tuple[Any, ...],
    here: tuple[Path, dict[str, str], Path],
) -> None:
    # The server was started elsewhere, before a test changed a variable, and with the output of another test.
    folder, variables, output = here
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    said = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    faulthandler.dump_traceback_later(max(1.0, end - time.monotonic() - 5))  # where each one hangs
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    # One ninja for all: another version would compile DeepSpeed's operators anew.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import gc
    import logging
    import warnings

    import torch

    # Of names that DeepSpeed uses: printed at each collective, since filters that change forget what was printed.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)

    torch.set_num_threads(1)
    try:
        backend = "gloo"
        if os.environ["DS_ACCELERATOR"] == "cuda":
            backend = "nccl"
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=ranks)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        gc.freeze()  # DeepSpeed collects garbage when it builds an optimizer; the modules need no second look
        deepspeed.init_distributed(dist_backend=backend)
        answer = worker(rank, *args)
        torch.distributed.barrier()
        results.put((rank, pickle.dumps(answer), None))  # by value: a tensor's shared memory ends with its process
        torch.distributed.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise
