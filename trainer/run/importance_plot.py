"""Draw what a selector learned: the importance of blocks over time, and how often each of them trained."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint import disk
from trainer.run.progress import FILE, read_metrics

# matplotlib takes a second to import, and few runs draw.


def draw_importance(folder: Path, times_active: Sequence[int]) -> list[tuple[str, Path]]:
    """Write `importance.png` from the metrics of a run folder, if its selector learned anything.

    Returns the files written, as (label, path). `times_active`: steps in which each block trained.
    """
    updates = [record for _, record in read_metrics(folder / FILE)[0] if record.get("importance")]
    if len(updates) < 2:  # the first record is the initial importance
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = len(times_active)
    figure = Figure(figsize=(9, max(3.0, min(12.0, 1.2 + 0.22 * blocks))), layout="constrained")
    scores, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    values = [record["importance"] for record in updates]
    largest = max(abs(value) for column in values for value in column) or 1.0
    steps = [record["step"] for record in updates]
    image = scores.pcolormesh(
        [*steps, 2 * steps[-1] - steps[-2]],
        [block - 0.5 for block in range(blocks + 1)],
        list(zip(*values, strict=True)),
        cmap="RdBu_r",
        vmin=-largest,
        vmax=largest,
    )
    scores.set(xlabel="optimizer step", ylabel="block", title="importance (red: matters more)")
    scores.yaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=scores, pad=0.01)
    bars.barh(range(blocks), times_active, color="0.4")
    bars.set(xlabel="steps trained", title="training")
    path, drawn = folder / "importance.png", io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    disk.publish(path, drawn.getvalue())
    return [("Importance", path)]
