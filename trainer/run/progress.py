"""Report on a run while it trains: metrics.jsonl, DeepSpeed's monitor, and a bar or plain lines on rank 0."""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from trainer.checkpoint import disk
from trainer.config.text import printable
from trainer.run.step import StepResult

FILE = "metrics.jsonl"
# A record with none of these keys is a summary, which is written at the end of the run.
_OF_STEPS = ("loss", "eval_loss", "importance")
# Without a terminal, lines at this interval replace the bar.
_LINE_SECONDS = 10.0


class Progress:
    """Write metrics and lines for the user on rank 0; on other ranks every method does nothing."""

    def __init__(
        self, folder: Path, *, engine: DeepSpeedEngine, total_steps: int, rank: int, first_step: int = 0
    ) -> None:
        """Open the file of metrics. A run that resumes after `first_step` steps removes later records, and drops and
        names lines that cannot be read."""
        self._engine = engine
        self._total = total_steps
        self._speaks = rank == 0
        self._file: TextIO | None = None
        self._importance: tuple[float, ...] | None = None
        dropped = ""
        if self._speaks:
            file = folder / FILE
            kept, dropped = _up_to(first_step, file) if first_step else ([], "")
            # A new file: an earlier attempt that still runs must not write into this one.
            disk.publish(file, b"".join(line for line, _ in kept))
            self._file = open(file, "a", encoding="utf-8", opener=_without_links)
            learned = [record["importance"] for _, record in kept if record.get("importance")]
            self._importance = tuple(learned[-1]) if learned else None
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
            if self._speaks and terminal
            else None
        )
        self._first = first_step
        self._started = self._last_line = time.monotonic()
        if dropped:
            self.say(dropped)

    def step(self, step: int, *, active: Sequence[int], **values: float) -> None:
        """Record a training step (counted from 1): `loss`, `lr`, `grad_norm`, `tokens_per_second`, ..."""
        if not self._speaks:
            return
        self._write({"step": step, **values, "active_blocks": list(active)})
        self._engine.monitor.write_events([(f"Train/{key}", value, step) for key, value in values.items()])
        short = f"loss {values['loss']:.4f}, {values['tokens_per_second']:,.0f} tokens/s, blocks {_ranges(active)}"
        if self._bar is not None:
            self._bar.set_postfix_str(short, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._last_line >= _LINE_SECONDS or step == self._total:
            self._last_line = time.monotonic()
            left = (self._last_line - self._started) / (step - self._first) * (self._total - step)
            print(f"step {step}/{self._total}: {short}, {left:.0f} s left", file=sys.stderr, flush=True)

    def importance(self, step: int, learned: tuple[float, ...] | None) -> None:
        """Record the importance of each block that a selector has learned by step `step`, if it has changed."""
        if not self._speaks or learned == self._importance:
            return
        self._importance = learned
        self._write({"step": step, "importance": list(learned or ())})

    def evaluation(self, step: int, loss: float) -> None:
        """Record an evaluation after `step` steps (0: before training)."""
        if not self._speaks:
            return
        self._write({"step": step, "eval_loss": loss})
        self._engine.monitor.write_events([("Eval/loss", loss, step)])
        self.say(f"evaluation after {step} steps: loss {loss:.4f}")

    def summary(self, step: int, **values: int | None) -> None:
        """Record values of the whole run, after `step` steps."""
        if self._speaks:
            self._write({"step": step, **values})

    def say(self, text: str) -> None:
        """Print a line for the user, above the bar."""
        text = printable(text)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._speaks:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._file is not None:
            self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        assert self._file is not None
        # JSON has no NaN and no infinity.
        known = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
        self._file.write(json.dumps(known, allow_nan=False) + "\n")
        self._file.flush()


class Meter:
    """Average over the steps between log lines. Reading it waits for the device."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._results: list[StepResult] = []
        self._before = (0.0, 0.0)
        self._since = time.monotonic()

    def sums(self) -> tuple[float, float]:
        """Return the sums of loss and of target tokens since the last reading, for a checkpoint."""
        loss, targets = self._before
        return (
            loss + sum(float(r.loss_sum) for r in self._results),
            targets + sum(float(r.targets) for r in self._results),
        )

    def resume_from(self, loss: float, targets: float) -> None:
        """Begin with these sums, which a checkpoint recorded."""
        self._before = (loss, targets)

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside from training time."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - started

    def read(self, engine: DeepSpeedEngine) -> dict[str, float]:
        loss, targets = self.sums()
        seconds = time.monotonic() - self._since
        values = {
            "loss": loss / max(1.0, targets),
            "grad_norm": float(engine.get_global_grad_norm() or 0.0),
            "tokens_per_second": sum(float(r.tokens) for r in self._results) / seconds,
            "step_seconds": seconds / len(self._results),
        }
        if get_accelerator().device_name() != "cpu":
            values["peak_gib"] = get_accelerator().max_memory_allocated() / 2**30
        self._reset()
        return values


def read_metrics(file: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], list[int]]:
    """Read the lines of a metrics.jsonl: each that can be read with its record, and the numbers of the others."""
    lines = io.BytesIO(disk.read(file)).readlines() if file.exists() else []
    readable, damaged = [], []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is None:
            damaged.append(number)
        else:
            readable.append((line, record))
    return readable, damaged


def _record(line: bytes) -> dict[str, Any] | None:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    if not line.endswith(b"\n"):  # cut short
        return None
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _up_to(step: int, file: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], str]:
    """Return the lines of steps up to `step`, without the summary at a run's end, and a message about those that cannot
    be read."""
    if file.is_symlink():
        return [], f"{file} was a link, which is never followed: the file starts anew"
    readable, damaged = read_metrics(file)
    kept = [(line, record) for line, record in readable if record["step"] <= step and record.keys() & {*_OF_STEPS}]
    if not damaged:
        return kept, ""
    lines = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines ({_ranges(damaged)})"
    return kept, f"{file}: {lines} cannot be read, as after a power cut, and dropped; the others are kept"


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _ranges(numbers: Sequence[int]) -> str:
    """Return `numbers` as ranges: [0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
