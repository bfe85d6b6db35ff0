"""What a run will hold, compute and send, before it starts; and what to change where it does not fit."""

from trainer.planner.plan import Plan, Planner

__all__ = ["Plan", "Planner"]
