"""The same training twice: through Strata on DeepSpeed, and as a plain single-process PyTorch loop."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor

import trainer
from tests.comparing import largest_difference  # noqa: F401 - for the tests around this
from tests.models import FAMILIES, tiny_llama, tiny_model
from tests.multimodal import MULTIMODAL
from trainer.engine import banks
from trainer.engine.banks import Bank
from trainer.model.blocks import find
from trainer.model.load import DTYPES
from trainer.selectors import build

# Adam's eps is large and the rate small, so that a changed summation order stays at 1e-7 (measured: 6e-5 at lr 1e-2).
ADAM: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-3}
SEQUENCE = 16


@dataclass(frozen=True)
class Cell:
    """One combination under test."""

    stage: int = 3
    ranks: int = 2
    selector: str = "uniform"
    blocks: Any = 2
    interval: int = 2
    steps: int = 8
    bank: str = "discard"
    redrawn: str = "reset"  # of bank discard
    accumulation: int = 1
    clipping: float = 0.0
    weight_decay: float = 0.0
    schedule: str | None = None
    offload: bool = False
    hidden: int = 32
    depth: int = 4  # blocks
    tied: bool = False
    checkpointing: bool = False
    always_on: tuple[str, ...] = ("embeddings", "head", "norm")
    dtype: str = "fp32"
    evaluate: bool = False
    family: str | None = None  # of tests.models.FAMILIES, MORE or MULTIMODAL; None: a Llama of `depth` blocks
    reward_rate: float = 10.0  # of selector importance
    dora: bool = False
    lora: int = 0  # rank of adapters, which then train in place of the weights; the head is in PEFT's modules_to_save
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        changed = [
            f"{k}={v}" for k, v in vars(self).items() if v != Cell.__dataclass_fields__[k].default and k != "extra"
        ]
        return " ".join(changed) or "default"


def make_selector(cell: Cell) -> Any:
    # Of four blocks, 55 draws all within four intervals, never the same twice, and one that left again in the third.
    settings = {} if cell.selector == "all" else {"blocks": cell.blocks}
    if cell.selector == "importance":  # probes at every other step
        settings = {"active_share": 0.4, "update_every": 2, "reward_rate": cell.reward_rate}
    return build(cell.selector, seed=55, interval=cell.interval, **settings)


def make_bank(cell: Cell) -> Bank:
    return banks.build(cell.bank, **({"redrawn": cell.redrawn} if cell.bank == "discard" else {}))


def batch(step: int, micro: int, *, ranks: int, rank: int, vocab: int = 64) -> Tensor:
    """Return [2, SEQUENCE] token ids; a step's global batch is 4 sequences per accumulation step on any ranks."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    whole = torch.randint(vocab, (4, SEQUENCE), generator=generator).to(get_accelerator().current_device_name())
    return whole.chunk(ranks)[rank] if ranks <= 4 else whole


def probe_batch(number: int, *, ranks: int, rank: int) -> Tensor:
    """Return this rank's token ids of a probe: of three sequences, so that ranks weigh differently."""
    generator = torch.Generator().manual_seed(777_000 + number)
    return torch.randint(64, (3, SEQUENCE), generator=generator)[rank::ranks]


def summed_loss(module: torch.nn.Module, ids: Tensor) -> tuple[Tensor, int]:
    """Return (cross-entropy summed over the tokens that are predicted, their number)."""
    logits = module(input_ids=ids).logits
    targets = ids[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, targets.numel()


@torch.no_grad()
def plain_probe(model: torch.nn.Module, trials: Any, factor: float, number: int) -> tuple[float, ...]:
    """Return the loss for each trial on the whole probe batch: the scaling of LoRA multiplied by hand, and without
    adapters what each layer adds."""
    losses = []
    ids = torch.cat([probe_batch(number, ranks=3, rank=rank) for rank in range(3)])
    adapted = hasattr(model, "base_model") and hasattr(model, "peft_config")
    layers = model.get_submodule("base_model.model.model.layers" if adapted else "model.layers")
    for trial in trials:
        if not adapted:
            for i in trial:
                layers[i].forward = partial(_turned_down, layers[i].forward, factor)
            loss, count = summed_loss(model, ids)
            for i in trial:
                del layers[i].forward
            losses.append(float(loss / count))
            continue
        scaled = [m for i in trial for m in layers[i].modules() if hasattr(m, "scaling") and hasattr(m, "lora_A")]
        before = [dict(module.scaling) for module in scaled]
        for module in scaled:
            module.scaling["default"] *= factor
        loss, count = summed_loss(model, ids)
        for module, values in zip(scaled, before, strict=True):
            module.scaling = values
        losses.append(float(loss / count))
    return tuple(losses)


def _turned_down(forward: Any, factor: float, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden + factor * (forward(hidden, *args, **kwargs) - hidden)


def learning_rate(cell: Cell, step: int) -> float:
    """Return the multiplier of the base rate at `step`."""
    return 0.5 * (1 + math.cos(math.pi * step / cell.steps)) if cell.schedule == "cosine" else 1.0


def build_model(cell: Cell) -> torch.nn.Module:
    if cell.family is not None:
        model = tiny_model(cell.family).to(DTYPES[cell.dtype])
    else:
        model = tiny_llama(layers=cell.depth, hidden=cell.hidden, tied=cell.tied, dtype=DTYPES[cell.dtype])
    if cell.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    if cell.lora:
        targets = ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(
            r=cell.lora,
            target_modules=targets,
            modules_to_save=["lm_head"],
            lora_dropout=0.0,
            lora_alpha=8 * cell.lora,
            # Adapters that do nothing yet would not be missed when they are suppressed.
            init_lora_weights=cell.selector != "importance",
            use_dora=cell.dora,
        )
        model = get_peft_model(model, config)
    return model.to(get_accelerator().current_device_name()).train()  # built on the CPU: the same weights everywhere


def reference(cell: Cell) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    """Return the weights after training in one process with Adam state by parameter, and each step's active set."""
    model = build_model(cell)
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    known = FAMILIES.get(cell.family or "llama")  # found by hand, so that finding is tested too
    path = "base_model.model." * bool(cell.lora) + (known[0] if known else find(model).path)
    layers = [
        {n: p for n, p in names.items() if n.startswith(f"{path}.{i}.")} for i in range(len(model.get_submodule(path)))
    ]
    outside = {n: p for n, p in names.items() if not n.startswith(f"{path}.")}
    # The parts of other families have other names; they all train.
    on = outside if cell.family or cell.lora else {n: p for n, p in outside.items() if _part(n) in cell.always_on}
    if cell.family in MULTIMODAL and "vision" not in cell.always_on:
        on = {n: p for n, p in on.items() if any(part in n for part in ("language_model.", "text_model.", "lm_head."))}
    selector = make_selector(cell)
    state: dict[str, dict[str, Tensor]] = {}
    step_counts: dict[str, int] = {}
    previous: set[str] = set()
    draws = []
    for step in range(cell.steps):
        wanted = selector.needs(step)
        if wanted is not None:
            number = step // selector.update_every
            selector.observe(wanted, plain_probe(model, wanted.trials, wanted.factor, number))
        drawn = selector.select(step // cell.interval, len(layers))
        draws.append(drawn)
        active = {n: p for i in drawn for n, p in layers[i].items()} | on
        if cell.bank == "discard" and step % cell.interval == 0 and selector.changes(len(layers)):
            # As published: a block that is drawn twice in a row starts anew as well; what is always on goes on.
            kept = on.keys() if cell.redrawn == "reset" else active.keys() & previous
            for name in state.keys() - kept:
                del state[name], step_counts[name]
        previous = set(active)
        for name, p in names.items():
            p.requires_grad_(name in active)
            p.grad = None
        for micro in range(cell.accumulation):
            # Rank by rank, because the load-balancing loss of experts is a rank's own.
            for rank in range(cell.ranks):
                ids = batch(step, micro, ranks=cell.ranks, rank=rank)
                (model(input_ids=ids, labels=ids).loss / (cell.accumulation * cell.ranks)).backward()
        # An expert without tokens has no gradient; in DeepSpeed it is zero, as on a rank of which others have some.
        gradients = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in active.items()}
        if cell.clipping:
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients.values()]))
            scale = min(1.0, cell.clipping / (norm.item() + 1e-6))
            gradients = {n: g * scale for n, g in gradients.items()}
        lr = ADAM["lr"] * learning_rate(cell, step)
        with torch.no_grad():
            for name, p in active.items():
                s = state.setdefault(name, {"m": torch.zeros_like(p), "v": torch.zeros_like(p)})
                t = step_counts[name] = step_counts.get(name, 0) + 1
                g, (b1, b2) = gradients[name], ADAM["betas"]
                if p.dim() >= 2:
                    p.mul_(1 - lr * cell.weight_decay)
                s["m"].mul_(b1).add_(g, alpha=1 - b1)
                s["v"].mul_(b2).addcmul_(g, g, value=1 - b2)
                denominator = (s["v"] / (1 - b2**t)).sqrt().add_(ADAM["eps"])
                p.addcdiv_(s["m"] / (1 - b1**t), denominator, value=-lr)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return weights | _scores(selector), draws


def _scores(selector: Any) -> dict[str, Tensor]:
    """Compare as at the usual reward rate, which multiplies the rounding of the losses as well."""
    learned = selector.importance()
    return {} if learned is None else {"importance": torch.tensor(learned) * 10.0 / selector.reward_rate}


def _part(name: str) -> str:
    return {"model.embed_tokens.weight": "embeddings", "lm_head.weight": "head"}.get(name, "norm")


def deepspeed_config(cell: Cell, *, micro_batch: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": cell.stage,
        "reduce_bucket_size": 20_000,
        "allgather_bucket_size": 20_000,
        "overlap_comm": False,
        "contiguous_gradients": True,
        # Small limits, so that parameters really are released and gathered.
        "stage3_max_live_parameters": 10_000,
        "stage3_max_reuse_distance": 10_000,
        "stage3_prefetch_bucket_size": 10_000,
        "stage3_param_persistence_threshold": 100,
    }
    if cell.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_clipping": cell.clipping,
        "zero_optimization": zero | cell.extra.get("zero", {}),
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": cell.dtype == "bf16"},
        "fp16": {"enabled": cell.dtype == "fp16", "hysteresis": 1},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # as trainer.config.deepspeed resolves it, and why
    } | cell.extra.get("config", {})


def make_engine(cell: Cell, model: torch.nn.Module, sparse: trainer.Sparse) -> Any:
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    groups = sparse.param_groups(weight_decay=cell.weight_decay)
    if cell.offload:
        optimizer = DeepSpeedCPUAdam(groups, **ADAM)
    else:  # fused where trainer/run/setup.py has it
        optimizer = torch.optim.AdamW(groups, fused=get_accelerator().device_name() == "cuda", **ADAM)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(cell, step))
    config = deepspeed_config(cell, micro_batch=4 // cell.ranks)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=scheduler if cell.schedule else None, config=config
    )
    return engine


def full_weights(engine: Any) -> dict[str, Tensor]:
    """Return every parameter's full weights (fp32 copies), gathered; frozen ones too."""
    import deepspeed

    engine.empty_partition_cache()
    weights = {}
    for name, p in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=hasattr(p, "ds_id")):
            weights[name] = p.detach().float().clone()
    return weights


def train_step(cell: Cell, engine: Any, step: int, rank: int) -> None:
    for micro in range(cell.accumulation):
        ids = batch(step, micro, ranks=cell.ranks, rank=rank)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()


def start(cell: Cell, rank: int) -> tuple[Any, trainer.Sparse]:
    """Return the cell's engine with its model attached, in each rank."""
    model = build_model(cell)
    sparse = trainer.prepare(
        model,
        selector=make_selector(cell),
        bank=make_bank(cell),
        always_on=None if cell.lora else cell.always_on,
        substrate="adapter" if cell.lora else "full",
    )
    engine = make_engine(cell, model, sparse)
    probes = (probe_batch(number, ranks=cell.ranks, rank=rank) for number in itertools.count(1))
    measures = {"probe_batches": probes, "loss_function": summed_loss} if sparse.selector.measures else {}
    sparse.attach(engine, guard_every=1, **measures)
    return engine, sparse


def strata(rank: int, cell: Cell) -> tuple[dict[str, Tensor], list[tuple[int, ...]]]:
    """Train the same through `prepare` and `attach`; runs in each rank."""
    engine, sparse = start(cell, rank)
    draws = []
    for step in range(cell.steps):
        train_step(cell, engine, step, rank)
        if cell.evaluate:
            engine.eval()
            with torch.no_grad():
                engine(input_ids=batch(step, 9, ranks=cell.ranks, rank=rank))
            engine.train()
        draws.append(sparse.active)
    weights = full_weights(engine) | _scores(sparse.selector)
    engine.destroy()
    return weights, draws
