"""The run configuration as frozen, typed models."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from trainer.config.methods import expand_method
from trainer.config.rules import rule_problems
from trainer.config.sources import source_list

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]

# The members of transformers' SchedulerType that `get_scheduler` builds from warm-up and total steps alone.
ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


Format = Literal["auto", "alpaca", "qa", "prompt", "messages", "sharegpt", "text"]


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
    quantization: Literal["nf4"] | None = Field(
        None,
        description="Hold the frozen base in four bits (bitsandbytes, the extra strata-trainer[4bit]): for adapters "
        "under ZeRO-2 or below.",
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


class AdapterSubstrate(Section):
    name: Literal["adapter"] = Field("adapter", description="What may train inside a block: adapters, made by PEFT.")
    peft: dict[str, Any] | None = Field(
        None, description="PEFT's own configuration: peft_type (LORA, IA3, LOHA, ...) and its fields. This or adapter."
    )
    adapter: Text | None = Field(None, description="Folder of a PEFT adapter to go on training. This or peft.")
    frozen: tuple[Text, ...] = Field(
        (), strict=False, description="Adapter weights that stay as they are, by part of a name: [lora_A] is LoRA-FA."
    )
    merge: Literal["auto"] | bool = Field(
        "auto",
        description="Also write model/ with the adapters merged into the base; auto: if the base is in no folder "
        "(model.random).",
    )

    @field_validator("peft")
    @classmethod
    def _names_its_type(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("peft_type"), str):
            raise ValueError(
                f"got keys {sorted(map(str, value))} without peft_type: set substrate.peft.peft_type, such as LORA"
            )
        return value


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


class ProbeConfig(Section):
    batch_size: Count = Field(16, description="Sequences (packed rows) that a probe looks at, over all ranks.")
    data: Literal["train", "eval"] = Field("train", description="Where they come from: training or evaluation data.")


class ImportanceSelector(Section):
    name: Literal["importance"] = Field(
        "importance", description="Learns which blocks matter, and trains those more often (IST)."
    )
    active_share: Share = Field(0.25, description="Share of the blocks that are active at a time, rounded down.")
    interval: Count = Field(1, description="Optimizer steps per draw.")
    update_every: Count = Field(10, description="Optimizer steps between two updates of what was learned.")
    probes: Annotated[int, Field(ge=2)] = Field(3, description="Sets of blocks suppressed and compared per update.")
    suppressed_share: Share = Field(0.5, description="Share of the blocks that a probe suppresses, rounded down.")
    suppression_factor: Annotated[float, Field(ge=0, le=1)] = Field(
        0.25, description="What is left of a suppressed block's contribution; with adapters of theirs."
    )
    reward_rate: Positive = Field(10.0, description="Step size of what is learned from a probe.")
    probe: ProbeConfig = ProbeConfig()


class DenseUpdate(Section):
    name: Literal["dense"] = Field("dense", description="How a block trains: the optimizer on all of its weights.")


class UnmaskUpdate(Section):
    name: Literal["unmask"] = Field(
        "unmask",
        description="How the model trains: single weights, unmasked step by step up to a budget (ID3); of what is "
        "always on as well, so that nothing else moves.",
    )
    budget: Count = Field(100_000, description="Weights to unmask in all, over all tensors.")
    exp: PositiveOrZero = Field(
        0.0, description="Exponent of the score |gradient| / (eps + |weight|)^exp; higher prefers small weights."
    )
    eps: PositiveOrZero = Field(1e-3, description="Keeps the score finite for small weights.")
    growth_steps: Count | None = Field(
        None, description="Optimizer steps over which the mask grows, as much at each; null: all of the run's."
    )
    bias_correction: Literal["global", "local"] = Field(
        "global",
        description="Where Adam begins to count a weight's steps: global, with the run (the paper); local, when it is "
        "unmasked.",
    )


class DiscardBank(Section):
    name: Literal["discard"] = Field("discard", description="Forget optimizer state and fp32 masters at a switch.")


class DeviceBank(Section):
    name: Literal["device"] = Field(
        "device", description="Keep copies of optimizer state and fp32 masters where they are."
    )


class CpuBank(Section):
    name: Literal["cpu"] = Field("cpu", description="Keep optimizer state and fp32 masters in host memory.")


Substrate = Annotated[FullSubstrate | AdapterSubstrate, Field(discriminator="name")]
Selector = Annotated[
    UniformSelector | CyclicSelector | FixedSelector | AllSelector | ImportanceSelector, Field(discriminator="name")
]
Update = Annotated[DenseUpdate | UnmaskUpdate, Field(discriminator="name")]
Bank = Annotated[DiscardBank | DeviceBank | CpuBank, Field(discriminator="name")]


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
    timeout_minutes: Positive = Field(
        30.0, description="How long a rank waits for the others in a collective before the run ends with an error."
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


# `async` is a word of the language.
CheckpointConfig = create_model(
    "CheckpointConfig",
    __base__=Section,
    every=(
        Count | None,
        Field(100, description="Steps between checkpoints, one more in the end; null: none, and signals end a run."),
    ),
    keep=(Count, Field(3, description="Newest checkpoints to keep, beside the one with the least evaluation loss.")),
    on_failure=(
        Literal["stop", "continue"],
        Field("stop", description="What a run does that cannot write a checkpoint, as on a full disk; it says so."),
    ),
    **{
        "async": (
            bool,
            Field(True, description="Write files beside training, which then waits for a copy in host memory only."),
        )
    },
)


class RunConfig(Section):
    """One run. Built from a mapping, in which `method` fills what the parts leave open."""

    method: Literal["lisa", "badam", "ist", "id3", "lora", "full"] | None = Field(
        None, description="Fills substrate, selector, update, bank and always_on with the published point."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of random weights, block draws, data order and splits."
    )
    output: Text = Field("runs/strata", description="Run folder: config.yaml, metrics.jsonl, checkpoints/, model/.")
    model: ModelConfig = ModelConfig()
    substrate: Substrate = FullSubstrate()
    selector: Selector = UniformSelector()
    update: Update = DenseUpdate()
    bank: Bank = DiscardBank()
    always_on: AlwaysOn = AlwaysOn()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    data: DataConfig
    deepspeed: Text = Field("zero3", description="A preset in ds_configs/ (without .json) or the path of a JSON file.")
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: Text = Field(
        "auto",
        description="auto: go on where the run in `output` stopped, if it did; never; or the folder of another run or "
        "one of its checkpoints (RUN/checkpoints/step-00000100.json).",
    )
    monitor: MonitorConfig = MonitorConfig()

    @property
    def saves(self) -> bool:
        """Whether checkpoints are written."""
        # The moments of 8-bit Adam are quantised for where they lie.
        return self.checkpoint.every is not None and self.optimizer.name != "adamw_8bit"

    @property
    def merges(self) -> bool:
        """Whether adapters are merged into their base at the end."""
        if self.substrate.name != "adapter":
            return False
        return self.model.path is None if self.substrate.merge == "auto" else self.substrate.merge

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
