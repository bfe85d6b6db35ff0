"""What a run with a multimodal folder writes is the published folder again, but for the weights that trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import trainer.config
from tests import distributed
from tests.engine.parity import Cell, deepspeed_config, make_engine, train_step
from tests.export.trained_run import files
from tests.multimodal import gemma3_processor, tiny_multimodal, write_folder
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.checkpoint.identity import identity_of
from trainer.cli.main import main
from trainer.data.tokenizer import load_tokenizer
from trainer.export.from_engine import export, export_merged
from trainer.export.shards import write_model
from trainer.model import load as models
from trainer.model.adapters import adapt
from trainer.model.loss import Objective
from trainer.run import setup as build

# Qwen's projector is in its tower.
FAMILIES = ("gemma3", "qwen2_5_vl", "qwen3_vl", "llama4", "mistral3")
# Where published files have the language model: names in memory may be others.
LANGUAGE = (
    "language_model.",
    "model.language_model.",
    "model.layers.",
    "model.embed_tokens.",
    "model.norm.",
    "lm_head.",
)
SETTINGS = [
    "model.dtype=fp32",
    "selector={name: uniform, blocks: 1, interval: 2}",
    "bank.name=cpu",
    "train.global_batch_size=4",
    "train.steps=4",
    "data.train=owner/name",
]


def _train(rank: int, workspace: Path, cases: tuple[tuple[str, int], ...]) -> None:
    for family, stage in cases:
        base, out = workspace / family, workspace / f"{family}-{stage}"
        settings = [f"output={out}", f"model.path={base}", f"deepspeed=zero{stage}", *SETTINGS]
        config = trainer.config.load(None, settings)
        tokenizer = load_tokenizer(str(base))
        cell = Cell(stage=stage, steps=4)
        model = models.load(config.model, tokenizer, seed=0, deepspeed=deepspeed_config(cell, micro_batch=2))
        sparse = build.make_sparse(config, model.train(), 4)
        engine = make_engine(cell, model, sparse)
        sparse.attach(engine)
        fits = family != "llama4"
        identity = identity_of(model, tokenizer, blocks=sparse.structure.path)
        # As in a run with the fused loss, under which transformers would partition what is built to be compared.
        objective = Objective(model, fused=True, deepspeed=deepspeed_config(cell, micro_batch=2)) if fits else None
        checkpoints = Checkpoints(sparse, out, keep=9, asynchronous=False, identity=identity)
        for step in range(4):
            train_step(cell, engine, step, rank)
        checkpoints.save(4, {"config": config.model_dump(mode="json")})
        checkpoints.finish()
        export(engine, tokenizer, out / "model")
        engine.destroy()
        del objective


def _is_published(out: Path, base: Path) -> None:
    weights = "model.safetensors"
    assert files(out, but=weights) == files(base, but=weights)  # among them the processor's, and terms
    ours, published = load_file(out / weights), load_file(base / weights)
    assert ours.keys() == published.keys()
    changed = [name for name in ours if not torch.equal(ours[name], published[name])]
    assert changed
    assert not [name for name in changed if not any(name.startswith(part) for part in LANGUAGE)], changed


def _check(tmp_path: Path, cases: tuple[tuple[str, int], ...]) -> None:
    for family in {family for family, _ in cases}:
        write_folder(tmp_path / family, family)
    distributed.run(_train, tmp_path, cases, ranks=2, deadline=300)
    for family, stage in cases:
        base, run = tmp_path / family, tmp_path / f"{family}-{stage}"
        live = run / "model"
        out, delta, applied = (tmp_path / f"{name}-{family}-{stage}" for name in ("out", "delta", "applied"))
        _is_published(live, base)
        for command in (
            ["export", str(run), str(out)],
            ["export", str(run), str(delta), "--delta"],
            ["apply", str(base), str(delta), str(applied)],
        ):
            assert main(command) == 0, command
        assert files(out) == files(live) == files(applied)


@pytest.mark.slow
def test_exports_checkpoints_and_deltas_are_the_published_model(tmp_path: Path) -> None:
    cases = tuple((family, stage) for family in FAMILIES for stage in (2, 3))
    _check(tmp_path, (*cases, ("gemma3", 0), ("gemma3", 1)))


def _merge(rank: int, folder: Path) -> None:
    config = trainer.config.load(
        None,
        [
            "output=run",
            f"model.path={folder}/base",
            "deepspeed=zero3",
            "method=lora",
            "model.dtype=fp32",
            "model.vision=train",
            "substrate.peft={peft_type: LORA, r: 2, target_modules: all-linear, lora_dropout: 0.0}",
            "train.global_batch_size=4",
            "train.steps=4",
            "data.train=owner/name",
        ],
    )
    tokenizer, cell = load_tokenizer(f"{folder}/base"), Cell(stage=3, steps=4)
    ds = deepspeed_config(cell, micro_batch=2)
    base = models.load(config.model, tokenizer, seed=0, deepspeed=ds)
    with models.partitioned_creation(ds):
        adapters = adapt(base.train(), config.substrate, stage=3, vision="train")
    sparse = build.make_sparse(config, adapters.model, 4)
    engine = make_engine(cell, adapters.model, sparse)
    sparse.attach(engine)
    objective = Objective(base, fused=True, deepspeed=ds)
    for step in range(4):
        train_step(cell, engine, step, rank)
    export_merged(engine, adapters, tokenizer, folder / "model")
    engine.destroy()
    del objective


def test_adapters_are_merged_into_the_published_model(tmp_path: Path) -> None:
    """Those on a tower, which text does not train, leave it as it was."""
    write_folder(tmp_path / "base", "gemma3")
    distributed.run(_merge, tmp_path, ranks=2)
    _is_published(tmp_path / "model", tmp_path / "base")


def test_a_random_one_is_written_as_one_that_caches_keys(tmp_path: Path) -> None:
    model = tiny_multimodal("gemma3")
    text = model.config.text_config
    assert not text.use_cache  # while it trains
    write_model(model, gemma3_processor().tokenizer, tmp_path / "out", lambda piece: dict(piece.tensors))
    assert AutoConfig.from_pretrained(tmp_path / "out").text_config.use_cache and not text.use_cache


def test_one_of_them(tmp_path: Path) -> None:
    _check(tmp_path, (("qwen2_5_vl", 3),))
