"""Plan what a run will store, compute and send before it starts, and what to change if it does not fit."""

from trainer.planner.plan import Plan, Planner

__all__ = ["Plan", "Planner"]
