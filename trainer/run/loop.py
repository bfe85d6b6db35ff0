"""The training loop: steps, log lines, evaluations and checkpoints, until the last step or a request to stop."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from deepspeed import DeepSpeedEngine

from trainer.checkpoint.lease import LeaseError
from trainer.checkpoint.store import CheckpointError
from trainer.config import RunConfig
from trainer.data.order import Order
from trainer.data.rank_batches import RankBatches
from trainer.engine.sparse import Sparse
from trainer.errors import StrataError
from trainer.model.loss import Objective
from trainer.run.interruption import Interrupted, Interruption
from trainer.run.progress import Meter, Progress
from trainer.run.step import StepResult, evaluate, train_step
from trainer.run.training_record import TrainingRecord
from trainer.updates import UpdateError


class StoppedError(StrataError, RuntimeError):
    """Training could not continue; no model was written."""


@dataclass
class Loop:
    """Run optimizer steps; log, evaluate and save between them."""

    config: RunConfig
    engine: DeepSpeedEngine
    objective: Objective
    sparse: Sparse
    feed: RankBatches
    batches: Order
    history: TrainingRecord
    progress: Progress
    num_steps: int
    interruption: Interruption
    meter: Meter

    def run(self) -> None:
        """Run all remaining steps. Raises `Interrupted`, after a checkpoint, if a rank was asked to stop, and
        `StoppedError` if training cannot continue."""
        config, history = self.config, self.history
        stopped = not self._evaluate()
        while not stopped and history.step < self.num_steps:
            result = self._step()
            history.step += 1
            stopped = config.saves and bool(result.must_stop)
            if not stopped and config.eval.every and history.step % config.eval.every == 0:
                stopped = not self._evaluate()
            # The last step is saved below, after its evaluation.
            if config.saves and history.step < self.num_steps and history.step % (config.checkpoint.every or 1) == 0:
                self._save()
        if not stopped:
            stopped = not self._evaluate(last=True)
        last_loss = history.evaluations.get(history.step, history.last_loss)
        if not stopped and not math.isfinite(last_loss):
            raise self._stopped_error(f"the loss is {last_loss}", step=history.step)
        if config.saves:
            self._save_last()
        if stopped:
            raise Interrupted

    def _step(self) -> StepResult:
        config, step = self.config, self.history.step
        lr = self.engine.get_lr()[0]  # of this step; afterwards the engine returns the next one
        chosen = self.batches.choose(step)
        try:
            result = train_step(self.engine, self.objective, self.feed.micro_batches(chosen), self.interruption)
        except UpdateError as error:
            raise StoppedError(f"stopped at step {step + 1}: {error}; no model was written") from error
        except Exception as error:
            if "loss scale" not in str(error):  # DeepSpeed raises a plain Exception at the smallest scale
                raise
            raise self._stopped_error(str(error)) from error
        self.meter.add(result)
        self._count_skipped(result)
        if (step + 1) % config.train.log_every == 0 or step + 1 == self.num_steps:
            rounded = {} if self.sparse.rounded_away is None else {"rounded_away": self.sparse.rounded_away}
            figures = self.meter.read(self.engine)
            self.history.last_loss = figures["loss"]
            figures |= rounded | self.sparse.update.figures()
            self.progress.step(step + 1, active=self.sparse.active, lr=lr, **figures)
        self.progress.importance(step + 1, self.sparse.selector.importance())
        return result

    def _count_skipped(self, result: StepResult) -> None:
        # In fp16, overflows are expected: each lowers the loss scale, until DeepSpeed raises at its minimum.
        fp16 = self.config.model.dtype == "fp16"
        expected = result.applied or (fp16 and bool(torch.isfinite(result.loss_sum)))
        self.history.skipped = 0 if expected else self.history.skipped + 1
        # ZeRO skips steps with infinite or NaN gradients; stage 0 (the fp32 reference) applies them to the weights.
        allowed = self.config.train.max_skipped_steps if self.engine.zero_optimization_stage() else 0
        if self.history.skipped > allowed:
            configured = self.config.train.max_skipped_steps
            why = f"(train.max_skipped_steps is {configured}"
            why += ")" if allowed == configured else ", but ZeRO stage 0 cannot skip steps)"
            raise self._stopped_error(
                f"{self.history.skipped} steps in a row had NaN or infinite loss or gradients {why}"
            )

    def _evaluate(self, *, last: bool = False) -> bool:
        """Evaluate if due (or `last`) and not done yet. Returns False, with no result, if a rank was asked to stop."""
        history, step = self.history, self.history.step
        if self.feed.has_evaluation and step not in history.evaluations and (last or step % self._eval_every == 0):
            with self.meter.paused():
                loss = evaluate(self.engine, self.objective, self.feed.eval_batches(), self.interruption)
            if loss is None:
                return False
            history.evaluations[step] = loss
            self.progress.evaluation(step, loss)
            if step and self.config.saves and history.checkpoints.is_best(step, loss):
                self._save()
        return True

    @property
    def _eval_every(self) -> int:
        return self.config.eval.every or self.num_steps

    def _save(self) -> None:
        with self.meter.paused():
            self._try_to_save(self.history.checkpoints.finish)  # the previous save
            self._try_to_save(partial(self.history.save, self.meter))

    def _save_last(self) -> None:
        """Save the last checkpoint. A failure does not end the run: the model can still be exported, and the run
        resumed from an earlier checkpoint."""
        with self.meter.paused():
            for action in (
                self.history.checkpoints.finish,
                partial(self.history.save, self.meter),
                self.history.checkpoints.finish,
            ):
                self._try_to_save(action, stop=False)

    def _try_to_save(self, action: Callable[[], None], *, stop: bool | None = None) -> None:
        """Run `action`. If it fails, raise or warn as `stop` says, by default as configured."""
        try:
            action()
        except LeaseError:  # another job has taken over the run
            raise
        except CheckpointError as error:
            if self.config.checkpoint.on_failure == "stop" if stop is None else stop:
                raise
            self.progress.say(f"WARNING: {error}")

    def _stopped_error(self, reason: str, *, step: int | None = None) -> StoppedError:
        """Return the error that stops the run at `step` (default: the current one)."""
        config, step = self.config, step or self.history.step + 1
        clipping = config.train.gradient_clipping
        clip = f"lower train.gradient_clipping ({clipping})" if clipping else "set train.gradient_clipping (0: none)"
        return StoppedError(
            f"stopped at step {step}: {reason}; no model was written. Lower optimizer.lr "
            f"({config.optimizer.lr}), {clip}, or check the data"
        )
