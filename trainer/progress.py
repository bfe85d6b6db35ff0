"""What a run says while it trains: metrics.jsonl, DeepSpeed's monitor, and a bar or plain lines on rank 0."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from trainer.step import StepResult

# Without a terminal a line now and then replaces the bar.
_LINE_SECONDS = 10.0


class Progress:
    """Rank 0 writes; on other ranks every method does nothing."""

    def __init__(
        self, folder: Path, *, engine: DeepSpeedEngine, total_steps: int, rank: int, first_step: int = 0
    ) -> None:
        """With `first_step` a run goes on after so many steps: what was recorded later is taken back."""
        self._engine = engine
        self._total = total_steps
        self._speaks = rank == 0
        self._file: TextIO | None = None
        if self._speaks:
            file = folder / "metrics.jsonl"
            if first_step and file.exists():
                _cut_after(first_step, file)
            elif not first_step:  # a lost attempt that still lives must not write into this one
                file.unlink(missing_ok=True)
            self._file = open(file, "a" if first_step else "w", encoding="utf-8")
        terminal = sys.stderr.isatty()
        self._bar = (
            tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)
            if self._speaks and terminal
            else None
        )
        self._importance: tuple[float, ...] | None = None
        self._first = first_step
        self._started = self._last_line = time.monotonic()

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
        """Record what a selector has learned of each block by step `step`, where that is news."""
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
        """Record what is known of the whole run after `step` steps."""
        if self._speaks:
            self._write({"step": step, **values})

    def say(self, text: str) -> None:
        """A line for the user, above the bar."""
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
    """Averages between log lines; reading it waits for the device."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._results: list[StepResult] = []
        self._before = (0.0, 0.0)
        self._since = time.monotonic()

    def sums(self) -> tuple[float, float]:
        """Loss and target tokens since the last reading, for a run that goes on from here."""
        loss, targets = self._before
        return (
            loss + sum(float(r.loss_sum) for r in self._results),
            targets + sum(float(r.targets) for r in self._results),
        )

    def go_on_from(self, loss: float, targets: float) -> None:
        """Begin with these sums."""
        self._before = (loss, targets)

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training time."""
        started = time.monotonic()
        yield
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


def _cut_after(step: int, file: Path) -> None:
    """Leave the lines of steps up to `step`; the last line may be cut short."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(kept, encoding="utf-8")
    partial.replace(file)


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
