"""The run configuration as frozen, typed models; the published methods; the rules that tie several keys together."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]

# The members of transformers' SchedulerType that `get_scheduler` builds from warm-up and total steps alone.
ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


Format = Literal["auto", "alpaca", "qa", "prompt", "messages", "sharegpt", "text"]
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w.-]+?)(?::(\w[^/]*))?")


class Section(BaseModel):
    """A group of keys: values keep their YAML type (no `"5"` for 5), unknown keys are errors, nothing changes later."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class ModelConfig(Section):
    path: Text | None = Field(None, description="Hugging Face folder or hub name; exactly one of path and random.")
    random: dict[str, Any] | None = Field(
        None, description="A transformers configuration (model_type and its fields), initialised from `seed`."
    )
    tokenizer: Text | None = Field(
        None, description="`bytes` (shipped), a folder or a hub name; null: model.path, or `bytes` with model.random."
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Type of the weights in forward and backward; fp16 with dynamic loss scaling."
    )
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto", description="Attention kernel; auto takes the fastest one that the machine has."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in backward: less memory, about a third more compute."
    )
    trust_remote_code: bool = Field(False, description="Allow a model folder to run Python code of its own.")
    blocks: Text | None = Field(
        None, description="Module path of the list of blocks (model.layers) where the search for it is ambiguous."
    )

    @field_validator("random")
    @classmethod
    def _names_its_type(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("model_type"), str):
            raise ValueError(f"got keys {sorted(map(str, value))} without model_type: set model.random.model_type")
        return value


class FullSubstrate(Section):
    name: Literal["full"] = Field("full", description="What may train inside a block: all of its weights.")


class UniformSelector(Section):
    name: Literal["uniform"] = Field("uniform", description="Blocks drawn uniformly without replacement (LISA).")
    blocks: Count = Field(2, description="Active blocks at a time (LISA's gamma).")
    interval: Count = Field(20, description="Optimizer steps per draw (LISA's K).")


class CyclicSelector(Section):
    name: Literal["cyclic"] = Field("cyclic", description="All blocks in turn (BAdam).")
    blocks: Count = Field(1, description="Active blocks at a time.")
    interval: Count = Field(100, description="Optimizer steps per draw (BAdam's K).")
    order: Literal["ascending", "descending", "reshuffled"] = Field(
        "reshuffled", description="Order of a pass over the blocks; reshuffled: a new permutation for every pass."
    )


class FixedSelector(Section):
    name: Literal["fixed"] = Field("fixed", description="The same blocks throughout.")
    blocks: tuple[int, ...] = Field(strict=False, description="Indices of blocks; negative ones count from the end.")
    interval: Count = Field(20, description="Optimizer steps per draw (the draw is always the same).")

    @field_validator("blocks")
    @classmethod
    def _some_and_distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            raise ValueError("got an empty list; name at least one block, such as selector.blocks=[0,-1]")
        twice = sorted({index for index in value if value.count(index) > 1})
        if twice:
            raise ValueError(f"got {list(value)}; each block at most once, {twice} stands there more often")
        return value


class AllSelector(Section):
    name: Literal["all"] = Field("all", description="Every block: full fine-tuning.")
    interval: Count = Field(20, description="Optimizer steps per draw (the draw is always the same).")


class DenseUpdate(Section):
    name: Literal["dense"] = Field("dense", description="How a block trains: the optimizer on all of its weights.")


class DiscardBank(Section):
    name: Literal["discard"] = Field("discard", description="Forget optimizer state and fp32 masters at a switch.")


class CpuBank(Section):
    name: Literal["cpu"] = Field("cpu", description="Keep optimizer state and fp32 masters in host memory.")


Selector = Annotated[UniformSelector | CyclicSelector | FixedSelector | AllSelector, Field(discriminator="name")]
Bank = Annotated[DiscardBank | CpuBank, Field(discriminator="name")]


class AlwaysOn(Section):
    embeddings: bool = Field(True, description="Train the input embeddings in every interval.")
    head: bool = Field(True, description="Train the output head in every interval.")
    norm: bool = Field(True, description="Train the final norm in every interval.")


class OptimizerConfig(Section):
    name: Literal["adamw", "adam", "adamw_8bit"] = Field(
        "adamw",
        description="adamw decouples weight decay, adam does not; adamw_8bit: moments in a quarter of the bytes "
        "(bitsandbytes, the extra strata-trainer[8bit]).",
    )
    lr: Positive = Field(2e-5, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), strict=False, description="Decay of Adam's two moments.")
    eps: Positive = Field(1e-8, description="Adam's epsilon.")
    weight_decay: PositiveOrZero = Field(0.0, description="Weight decay; norms and biases (1-D) never decay.")
    lr_always_on: Positive | None = Field(None, description="Learning rate of the always-on parts; null: lr.")


class ScheduleConfig(Section):
    name: ScheduleName = Field("cosine", description="Learning-rate schedule, by transformers' name.")
    warmup_steps: CountOrZero | None = Field(None, description="Warm-up in steps; not together with warmup_ratio.")
    warmup_ratio: Decay | None = Field(None, description="Warm-up as a share of all steps; not with warmup_steps.")


class TrainConfig(Section):
    steps: Count | None = Field(None, description="Optimizer steps; exactly one of steps and epochs.")
    epochs: Positive | None = Field(
        None,
        description="Passes over the training data, exactly one of steps and epochs. A mix with weights counts as many "
        "samples as its sources hold together.",
    )
    global_batch_size: Count = Field(description="Sequences (packed rows) per optimizer step, over all ranks.")
    micro_batch_size: Count = Field(1, description="Sequences per rank and forward.")
    gradient_clipping: PositiveOrZero = Field(1.0, description="Largest gradient norm; 0 switches clipping off.")
    fused_loss: Literal["auto"] | bool = Field(
        "auto",
        description="Compute head and loss tile by tile, so that logits never exist as a whole (TRL's fused head); "
        "auto: for vocabularies of 32768 and more.",
    )
    router_loss: bool = Field(
        True, description="Add a mixture of experts' load-balancing loss, at its own router_aux_loss_coef."
    )
    log_every: Count = Field(1, description="Steps between lines in metrics.jsonl.")
    max_skipped_steps: CountOrZero = Field(
        5, description="Consecutive steps skipped for NaN or infinite values after which the run stops."
    )
    guard_every: CountOrZero = Field(
        50, description="Steps between checks that active blocks moved and no others did; 0 switches them off."
    )


class EvalConfig(Section):
    every: Count | None = Field(None, description="Steps between evaluations; null: only before and after training.")
    max_samples: Count | None = Field(None, description="Evaluate on this many samples at most; null: on all.")
    micro_batch_size: Count | None = Field(
        None, description="Sequences per rank and forward in evaluation; null: train.micro_batch_size."
    )


class DataSource(Section):
    path: Text = Field(
        description="File (.jsonl, .json, .csv, .parquet, .arrow), folder of a data set, or Hub name (owner/name, "
        "owner/name:split)."
    )
    format: Format = Field(
        "auto",
        description="alpaca {instruction, input, output}, qa {question, answer}, prompt {prompt, completion}, messages "
        "(OpenAI's, with tools), sharegpt {conversations}, text (loss on every token); auto: by the columns.",
    )
    subset: Text | None = Field(None, description="Of a Hub name or folder that has several: which configuration.")
    split: Text | None = Field(None, description="Of a Hub name or folder, slices too (`train[:10%]`); null: train.")


class TrainSource(DataSource):
    weight: Positive | None = Field(
        None,
        description="Share of this source among the samples (packed rows) seen, relative to the other weights; for all "
        "sources or none. null: every sample once per epoch.",
    )


class DataConfig(Section):
    train: tuple[TrainSource, ...] = Field(
        strict=False, description="What to train on: a path, a source with its keys, or a list of these."
    )
    eval: tuple[DataSource, ...] | None = Field(
        None, strict=False, description="What to evaluate on, as for data.train, without weights."
    )
    eval_fraction: Decay = Field(
        0.0, description="Share of each source of data.train to evaluate on where data.eval is null."
    )
    max_length: Count = Field(1024, description="Tokens per sample at most; with packing, also tokens per packed row.")
    overflow: Literal["truncate", "drop", "error"] = Field("truncate", description="What to do with longer samples.")
    packing: bool = Field(
        False,
        description="Put several samples into a row of max_length tokens, each attending to itself alone. Batch sizes, "
        "epochs and eval.max_samples then count rows.",
    )
    cache: Text | None = Field(None, description="Folder of tokenised data; null: cache/ beside the run folder.")

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _spell_out(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("got an empty list; name at least one source")
        return source_list(value)


class MonitorConfig(Section):
    tensorboard: bool = Field(False, description="Write TensorBoard files to tensorboard/ in the run folder.")


PARTS = ("substrate", "selector", "update", "bank", "always_on")

_ALL_ON = {"embeddings": True, "head": True, "norm": True}
_ALL_OFF = dict.fromkeys(_ALL_ON, False)
_COMMON = {"substrate": {"name": "full"}, "update": {"name": "dense"}, "bank": {"name": "discard"}}

# Each method's published point.
METHODS: dict[str, dict[str, dict[str, Any]]] = {
    # LISA, arXiv 2403.17919, Algorithm 1. gamma = 2 and K = 20: defaults and fine-tuning script of the authors' LMFlow.
    # Embeddings, head and final norm are never frozen there; state of re-frozen layers "is treated as being discarded".
    "lisa": {**_COMMON, "selector": {"name": "uniform", "blocks": 2, "interval": 20}, "always_on": _ALL_ON},
    # BAdam, arXiv 2404.02827. K = 100 and random reshuffling: the paper's scripts (the code's own defaults, 50 and
    # descending, differ). One layer at a time, embeddings and head frozen, state and master dropped with the block.
    "badam": {
        **_COMMON,
        "selector": {"name": "cyclic", "blocks": 1, "interval": 100, "order": "reshuffled"},
        "always_on": _ALL_OFF,
    },
    "full": {**_COMMON, "selector": {"name": "all", "interval": 20}, "always_on": _ALL_ON},
}
# What stands for a part that neither a method nor the user names.
DEFAULT_PARTS = METHODS["lisa"]


class RunConfig(Section):
    """One run. Built from a mapping, in which `method` fills what the parts leave open."""

    method: Literal["lisa", "badam", "full"] | None = Field(
        None, description="Fills substrate, selector, update, bank and always_on with the published point."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of random weights, block draws, data order and splits."
    )
    output: Text = Field("runs/strata", description="Run folder: config.yaml, metrics.jsonl, model/.")
    model: ModelConfig = ModelConfig()
    substrate: FullSubstrate = FullSubstrate()
    selector: Selector = UniformSelector()
    update: DenseUpdate = DenseUpdate()
    bank: Bank = DiscardBank()
    always_on: AlwaysOn = AlwaysOn()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    data: DataConfig
    deepspeed: Text = Field("zero3", description="A preset in ds_configs/ (without .json) or the path of a JSON file.")
    monitor: MonitorConfig = MonitorConfig()

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any) -> Any:
        return expand_method(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _check_rules(self) -> "RunConfig":
        problems = rule_problems(self.model_dump())
        if problems:
            raise ValueError("; ".join(problems))
        return self


SECTIONS = ("model", "optimizer", "schedule", "train", "eval", "data", "monitor")


def expand_method(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with every section present and every part laid over the method's point (or over the defaults).

    A part with another `name` than the point's starts from that member's own defaults. Null counts as absent.
    """
    method = values.get("method")
    point = METHODS.get(method, DEFAULT_PARTS) if isinstance(method, str) else DEFAULT_PARTS
    expanded = dict(values)
    for section in SECTIONS:
        expanded[section] = {} if values.get(section) is None else values[section]
    for part in PARTS:
        expanded[part] = _lay_over(point[part], values.get(part))
    return expanded


def _lay_over(point: Mapping[str, Any], given: Any) -> Any:
    if given is None:
        return dict(point)
    if not isinstance(given, Mapping) or given.get("name", point.get("name")) != point.get("name"):
        return given
    return {**point, **given}


def source_list(value: Any) -> Any:
    """The sources that `data.train` or `data.eval` names, each a mapping; what is of a wrong type stays as it is."""
    if isinstance(value, str | Mapping | DataSource):
        value = [value]
    return [_spelled_out(entry) for entry in value] if isinstance(value, list | tuple) else value


def _spelled_out(source: Any) -> Any:
    if not isinstance(source, str):
        return source
    name, split = hub_name(source) or (source, None)
    return {"path": name, "split": split} if split else {"path": source}


def hub_name(path: str) -> tuple[str, str | None] | None:
    """(owner/name, split or None) of a path that may stand for a data set on the Hub; None for a file's name."""
    match = _HUB_NAME.fullmatch(path)
    return None if match is None or path.endswith(DATA_SUFFIXES) else (match[1], match[2])


def rule_problems(values: Mapping[str, Any]) -> list[str]:
    """Contradictions between keys of a nested mapping; values of a wrong type are left to the models."""
    return [
        *_exactly_one(values, "model.path", "model.random"),
        *_exactly_one(values, "train.steps", "train.epochs"),
        *_batch_rules(values),
        *_schedule_rules(values),
        *_eval_rules(values),
        *_weight_rules(values),
        *_optimizer_rules(values),
    ]


def _get(values: Any, path: str) -> Any:
    for name in path.split("."):
        values = values.get(name) if isinstance(values, Mapping) else None
    return values


def _number(values: Mapping[str, Any], path: str, default: float = 0) -> float:
    value = _get(values, path)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _exactly_one(values: Mapping[str, Any], first: str, second: str) -> list[str]:
    given = [path for path in (first, second) if _get(values, path) is not None]
    if len(given) == 1:
        return []
    return [f"{first}, {second}: {'both' if given else 'neither'} given; set exactly one of them"]


def _batch_rules(values: Mapping[str, Any]) -> list[str]:
    global_batch, micro_batch = _number(values, "train.global_batch_size"), _number(values, "train.micro_batch_size", 1)
    whole = isinstance(global_batch, int) and isinstance(micro_batch, int)
    if not whole or global_batch < 1 or micro_batch < 1 or global_batch % micro_batch == 0:
        return []
    return [
        f"train.micro_batch_size: {micro_batch} does not divide train.global_batch_size {global_batch}; "
        "the global batch is ranks x micro-batch x accumulation steps"
    ]


def _schedule_rules(values: Mapping[str, Any]) -> list[str]:
    problems = []
    steps, ratio = _get(values, "schedule.warmup_steps"), _get(values, "schedule.warmup_ratio")
    name, total = _get(values, "schedule.name"), _number(values, "train.steps")
    if steps is not None and ratio is not None:
        problems.append(f"schedule.warmup_steps, schedule.warmup_ratio: got {steps} and {ratio}; set one to null")
    if name == "constant" and (steps or ratio):
        problems.append("schedule.name: constant has no warm-up; use constant_with_warmup, or set no warm-up")
    if total and _number(values, "schedule.warmup_steps") > total:
        problems.append(f"schedule.warmup_steps: {steps} is more than train.steps {total}")
    if name == "polynomial" and _number(values, "optimizer.lr", 1.0) <= 1e-7:
        problems.append(
            f"optimizer.lr: got {_get(values, 'optimizer.lr')}; allowed with schedule polynomial: number > 1e-7"
        )
    return problems


def _eval_rules(values: Mapping[str, Any]) -> list[str]:
    problems = []
    file, fraction = _get(values, "data.eval"), _number(values, "data.eval_fraction")
    if file is not None and fraction:
        problems.append(f"data.eval, data.eval_fraction: got {file!r} and {fraction}; set null or 0 for one")
    if _get(values, "eval.every") is not None and file is None and not fraction:
        problems.append("eval.every: no evaluation data; set data.eval or data.eval_fraction, or eval.every=null")
    return problems


def _weight_rules(values: Mapping[str, Any]) -> list[str]:
    sources = source_list(_get(values, "data.train"))
    given = [_get(source, "weight") is not None for source in sources] if isinstance(sources, list) else []
    if all(given) or not any(given):
        return []
    return [
        f"data.train: weight given for {sum(given)} of {len(given)} sources; give it for all of them, or for none, and "
        "every sample is seen once per epoch"
    ]


def _optimizer_rules(values: Mapping[str, Any]) -> list[str]:
    bank = _get(expand_method(values), "bank.name")
    if _get(values, "optimizer.name") == "adamw_8bit" and bank not in (None, "discard"):
        return [
            f"bank.name: {bank}, but the moments of optimizer.name=adamw_8bit are quantised for where they lie and "
            "cannot be kept; allowed: discard, or optimizer.name=adamw"
        ]
    return []
