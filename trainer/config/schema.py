"""The run configuration as frozen, typed models."""

from collections.abc import Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from trainer.config.deepspeed.presets import PRESETS
from trainer.config.methods import DEFAULT_PARTS, METHODS, NEW_ROWS, expand_method
from trainer.config.rules import rule_problems
from trainer.config.sources import FORMATS, source_list
from trainer.selectors import REGISTRY as SELECTORS
from trainer.selectors import Selector, Uniform
from trainer.settings import Count, CountOrZero, Decay, Positive, PositiveOrZero, Section, Text
from trainer.settings.banks import REGISTRY as BANKS
from trainer.settings.banks import BankSettings, DiscardSettings
from trainer.settings.updates import REGISTRY as UPDATES
from trainer.settings.updates import UpdateSettings

# The context of a validation whose values are expanded already, and whose rules the caller checks.
EXPANDED = {"expanded": True}

# The members of transformers' SchedulerType that `get_scheduler` builds from warm-up and total steps alone.
ScheduleName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


def _each(descriptions: Mapping[str, str]) -> str:
    """Return the names of a registry with their descriptions, for the help of a key that chooses one of them."""
    return "; ".join(f"{name}: {description}" for name, description in descriptions.items())


class ModelConfig(Section):
    path: Text | None = Field(None, description="Hugging Face folder or Hub name. Set exactly one of path and random.")
    random: dict[str, Any] | None = Field(
        None,
        description="A transformers configuration (model_type and its fields); the weights are random, by `seed`.",
    )
    tokenizer: Text | None = Field(
        None, description="A folder, a Hub name or `bytes` (built in); null: model.path, or `bytes` with model.random."
    )
    add_tokens: tuple[Text, ...] = Field(
        (),
        strict=False,
        description="Tokens to add to the tokenizer. Their rows of embeddings and head begin as the mean of the others "
        "and train by always_on.",
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Data type of the weights in forward and backward; fp16 uses dynamic loss scaling."
    )
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = Field(
        "auto", description="Attention kernel; auto: the fastest one available on the machine."
    )
    quantization: Literal["nf4"] | None = Field(
        None,
        description="Store the frozen base model in 4 bits (bitsandbytes; install strata-trainer[4bit]). Requires "
        "adapters and ZeRO stage 2 or lower.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in backward: less memory, about a third more compute."
    )
    trust_remote_code: bool = Field(False, description="Allow running Python code that the model folder contains.")
    vision: Literal["frozen", "train"] = Field(
        "frozen",
        description="train: the towers of a multimodal model (images, video, sound) train in every interval; with "
        "adapters, those that sit on them and on the projector.",
    )
    blocks: Text | None = Field(
        None,
        description="Module path of the list of blocks (model.layers); set it if Strata cannot tell which list it is.",
    )

    @field_validator("add_tokens")
    @classmethod
    def _are_tokens(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for number, token in enumerate(value):
            problem = None
            if token in value[:number]:
                problem = "twice"
            elif not token.isprintable():
                problem = "with a character that cannot be printed"
            elif not token.strip():
                problem = "of nothing but spaces"
            if problem:
                raise ValueError(f"got {token!r} {problem}; allowed: distinct texts of printable characters")
        return value

    @field_validator("random")
    @classmethod
    def _names_its_type(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("model_type"), str):
            raise ValueError(f"got keys {sorted(map(str, value))} without model_type: set model.random.model_type")
        return value


class FullSubstrate(Section):
    name: Literal["full"] = Field("full", description="All weights of a block can train.")


class AdapterSubstrate(Section):
    name: Literal["adapter"] = Field("adapter", description="The PEFT adapters in a block can train.")
    peft: dict[str, Any] | None = Field(
        None,
        description="PEFT configuration: peft_type (LORA, IA3, ...) and its fields; not together with adapter.",
    )
    adapter: Text | None = Field(
        None, description="Folder of a PEFT adapter to continue training; not together with peft."
    )
    frozen: tuple[Text, ...] = Field(
        (),
        strict=False,
        description="Adapter weights to freeze: those with one of these texts in their name. [lora_A] gives "
        "LoRA-FA as published in 2023 (frozen A, without the gradient correction of its 2026 version).",
    )
    merge: Literal["auto"] | bool = Field(
        "auto",
        description="Also write model/ with the adapters merged into the base model; auto: only with model.random, "
        "whose base model is not on disk.",
    )

    @field_validator("peft")
    @classmethod
    def _names_its_type(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and not isinstance(value.get("peft_type"), str):
            raise ValueError(
                f"got keys {sorted(map(str, value))} without peft_type: set substrate.peft.peft_type, such as LORA"
            )
        return value


Substrate = Annotated[FullSubstrate | AdapterSubstrate, Field(discriminator="name")]


def _one_of(registry: Mapping[str, type[Section]]) -> Any:
    return Annotated[reduce(or_, registry.values()), Field(discriminator="name")]


# A type checker knows the common base of what a registry lists.
if TYPE_CHECKING:
    Format: TypeAlias = str
    Method: TypeAlias = str
    AnySelector: TypeAlias = Selector
    AnyUpdate: TypeAlias = UpdateSettings
    AnyBank: TypeAlias = BankSettings
else:
    Format, Method = Literal[("auto", *FORMATS)], Literal[tuple(METHODS)]
    AnySelector, AnyUpdate, AnyBank = _one_of(SELECTORS), _one_of(UPDATES), _one_of(BANKS)


_WITH_ADAPTERS = "The default is false with substrate.name=adapter."


class AlwaysOn(Section):
    embeddings: Literal["new_rows"] | bool = Field(
        True,
        description="Train the input embeddings in every interval; new_rows: only the rows of model.add_tokens, of the "
        f"head as well unless you set head. {_WITH_ADAPTERS}",
    )
    head: Literal["new_rows"] | bool = Field(
        True,
        description="Train the output head in every interval; new_rows: only the rows of model.add_tokens, of the "
        f"embeddings as well unless you set embeddings. {_WITH_ADAPTERS}",
    )
    norm: bool = Field(True, description=f"Train the final norm in every interval. {_WITH_ADAPTERS}")
    projector: bool = Field(
        False,
        description="Train what turns a multimodal model's images, video or sound into what its language model reads, "
        "in every interval.",
    )

    @property
    def parts(self) -> tuple[str, ...]:
        """Return what trains, for people."""
        return tuple(f"{part} (new rows)" if on == NEW_ROWS else part for part, on in self.model_dump().items() if on)

    @property
    def new_rows(self) -> tuple[Literal["embeddings", "head"], ...]:
        """Return the parts of which only the rows of new tokens train."""
        values: dict[Literal["embeddings", "head"], object] = {"embeddings": self.embeddings, "head": self.head}
        return tuple(part for part, value in values.items() if value == NEW_ROWS)


class OptimizerConfig(Section):
    name: Literal["adamw", "adam", "adamw_8bit"] = Field(
        "adamw",
        description="adamw decouples weight decay, adam does not. adamw_8bit stores the moments in a quarter of the "
        "bytes (bitsandbytes; install strata-trainer[8bit]).",
    )
    lr: Positive = Field(2e-5, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), strict=False, description="Decay rates of Adam's two moments.")
    eps: Positive = Field(1e-8, description="Adam's epsilon.")
    weight_decay: PositiveOrZero = Field(0.0, description="Weight decay; never applied to norms and biases (1-D).")
    lr_always_on: Positive | None = Field(None, description="Learning rate of the always-on parts; null: optimizer.lr.")


class ScheduleConfig(Section):
    name: ScheduleName = Field("cosine", description="Learning-rate schedule, by its name in transformers.")
    warmup_steps: CountOrZero | None = Field(None, description="Warm-up steps; not together with warmup_ratio.")
    warmup_ratio: Decay | None = Field(None, description="Warm-up as a share of steps; not together with warmup_steps.")


class TrainConfig(Section):
    steps: Count | None = Field(None, description="Optimizer steps. Set exactly one of steps and epochs.")
    epochs: Positive | None = Field(
        None,
        description="Passes over the training data. Set exactly one of steps and epochs. With weighted sources, an "
        "epoch is as many samples as all sources contain together.",
    )
    global_batch_size: Count = Field(description="Sequences (or packed rows) per optimizer step, over all ranks.")
    micro_batch_size: Count = Field(1, description="Sequences per rank in one forward pass.")
    gradient_clipping: PositiveOrZero = Field(1.0, description="Maximum gradient norm; 0 disables clipping.")
    fused_loss: Literal["auto"] | bool = Field(
        "auto",
        description="Compute output head and loss in tiles, without ever storing all logits (TRL's fused head); "
        "auto: for vocabularies of 32768 or more.",
    )
    router_loss: bool = Field(
        True,
        description="Add the load-balancing loss of a mixture of experts, scaled by the model's router_aux_loss_coef.",
    )
    log_every: Count = Field(1, description="Steps between lines in metrics.jsonl.")
    max_skipped_steps: CountOrZero = Field(
        5,
        description="Consecutive steps that may be skipped for NaN or infinite values; one more stops the run.",
    )
    guard_every: CountOrZero = Field(
        50,
        description="Steps between checks that the weights of active blocks changed and no others did. 0 disables "
        "these checks and the check that a gradient reaches everything that trains.",
    )
    timeout_minutes: Annotated[float, Field(ge=0.1, le=10_080)] = Field(
        30.0, description="Minutes that a rank waits for the others in a collective before the run fails with an error."
    )


class EvalConfig(Section):
    every: Count | None = Field(None, description="Steps between evaluations; null: only before and after training.")
    max_samples: Count | None = Field(None, description="Evaluate on at most this many samples; null: all.")
    micro_batch_size: Count | None = Field(
        None, description="Sequences per rank in one forward pass of evaluation; null: train.micro_batch_size."
    )


class DataSource(Section):
    path: Text = Field(
        description="File (.jsonl, .json, .csv, .parquet, .arrow), folder of a data set, or Hub name (owner/name, "
        "owner/name:split)."
    )
    format: Format = Field(
        "auto",
        description=f"auto: chosen by the columns; {_each(FORMATS)}. The column system may also be named "
        "system_prompt.",
    )
    subset: Text | None = Field(None, description="Which configuration, if a Hub data set or folder has several.")
    split: Text | None = Field(
        None, description="Split of a Hub data set or folder, or a slice (`train[:10%]`); null: train."
    )
    ignore: tuple[Text, ...] = Field(
        (),
        strict=False,
        description="Columns, and keys of messages, to leave out. Any other column whose content no sample contains is "
        "an error, unless it only tells where a row comes from (id, source, url, ...): the report lists these columns.",
    )


class TrainSource(DataSource):
    weight: Positive | None = Field(
        None,
        description="Share of this source among the samples (or packed rows) that training sees, relative to the other "
        "weights. Set it for all sources or for none; null: every sample once per epoch.",
    )


class DataConfig(Section):
    train: tuple[TrainSource, ...] = Field(
        strict=False, description="Training data: a path, a mapping of the keys below, or a list of these."
    )
    eval: tuple[DataSource, ...] | None = Field(
        None, strict=False, description="Evaluation data, in the form of data.train but without weights."
    )
    eval_fraction: Decay = Field(
        0.0, description="Share of each source of data.train to hold out for evaluation if data.eval is null."
    )
    max_length: Count = Field(1024, description="Maximum tokens per sample; with packing, also tokens per packed row.")
    overflow: Literal["truncate", "truncate_at_turn", "drop", "error"] = Field(
        "truncate",
        description="What to do with samples longer than max_length; truncate_at_turn cuts a conversation after the "
        "last answer that is whole.",
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error",
        description="What to do with a row that cannot be read or that the chat template refuses: end with its place "
        "and the reason, or leave it out; such rows are counted, and the first three are named.",
    )
    special_tokens_in_text: Literal["text", "allow"] = Field(
        "text",
        description="What becomes of control tokens, such as <|im_end|>, that messages, questions and answers spell: "
        "they stay text, or become tokens. {text} and texts in {prompt, completion} are taken as they are.",
    )
    packing: bool = Field(
        False,
        description="Pack several samples into each row of max_length tokens; a sample attends only to itself. Batch "
        "sizes, epochs and eval.max_samples then count rows.",
    )
    cache: Text | None = Field(None, description="Folder for tokenised data; null: cache/ beside the run folder.")
    streaming: bool = Field(
        False,
        description="Read and tokenise training data while training, and store nothing, for sets that do not fit on a "
        "disk. Requires train.steps; evaluation data, named by data.eval, is tokenised into the cache as ever.",
    )
    shuffle_rows: Count | None = Field(
        None,
        description="With streaming, how many rows are shuffled (and packed) together; null: 2048. They come from "
        "units of the files (64 KiB of lines, row groups of Parquet), which are shuffled before.",
    )

    @field_validator("train", "eval", mode="before")
    @classmethod
    def _spell_out(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("got an empty list; name at least one source")
        return source_list(value)


class MonitorConfig(Section):
    tensorboard: bool = Field(False, description="Write TensorBoard files to tensorboard/ in the run folder.")


class CheckpointConfig(Section):
    model_config = ConfigDict(serialize_by_alias=True)

    every: Count | None = Field(
        100,
        description="Steps between checkpoints; another one is saved at the end. null disables checkpoints; a signal "
        "then ends the run without saving.",
    )
    keep: Count = Field(3, description="Newest checkpoints to keep, besides the one with the lowest evaluation loss.")
    on_failure: Literal["stop", "continue"] = Field(
        "stop",
        description="What to do if a checkpoint cannot be written, for example on a full disk: end the run with the "
        "error, or print a warning and continue.",
    )
    # `async` is a keyword of the language.
    asynchronous: bool = Field(
        True,
        alias="async",
        description="Write checkpoint files in the background; training waits only for a copy in host memory.",
    )


class RunConfig(Section):
    """The configuration of a run. Built from a mapping, in which `method` supplies what the parts leave out."""

    method: Method | None = Field(
        None,
        description="Set substrate, selector, update, bank and always_on as published; keys you set take precedence. "
        "null: these parts have LISA's values, but with substrate.name=adapter the bank is device and always_on is "
        "false.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of random weights, block draws, data order and splits."
    )
    output: Text = Field("runs/strata", description="Run folder: config.yaml, metrics.jsonl, checkpoints/, model/.")
    model: ModelConfig = ModelConfig()
    substrate: Substrate = FullSubstrate()
    selector: AnySelector = Uniform()
    update: AnyUpdate = UPDATES[DEFAULT_PARTS["update"]["name"]]()
    bank: AnyBank = DiscardSettings()
    always_on: AlwaysOn = AlwaysOn()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    data: DataConfig
    deepspeed: Text = Field(
        "zero3",
        description=f"Preset in ds_configs/ (without .json), or path of a DeepSpeed JSON file. {_each(PRESETS)}.",
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: Text = Field(
        "auto",
        description="auto: resume the run in `output` if there is one, and do nothing if it is finished; never: start "
        "a new run in the next free folder; or a path: resume from another run's folder, or from one of its "
        "checkpoints (RUN/checkpoints/step-00000100.json).",
    )
    monitor: MonitorConfig = MonitorConfig()

    @property
    def saves(self) -> bool:
        """Return whether checkpoints are written."""
        # How 8-bit Adam quantises its moments depends on the layout of the groups; see `rule_problems`.
        return self.checkpoint.every is not None and self.optimizer.name != "adamw_8bit"

    @property
    def merges(self) -> bool:
        """Return whether adapters are merged into their base at the end."""
        if self.substrate.name != "adapter":
            return False
        return self.model.path is None if self.substrate.merge == "auto" else self.substrate.merge

    @property
    def must_merge(self) -> bool:
        """Return whether a merge was requested explicitly, so that its failure is an error."""
        return self.substrate.name == "adapter" and self.substrate.merge is True

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, values: Any, info: ValidationInfo) -> Any:
        return expand_method(values) if isinstance(values, Mapping) and info.context is not EXPANDED else values

    @model_validator(mode="after")
    def _check_rules(self, info: ValidationInfo) -> "RunConfig":
        if info.context is EXPANDED:  # the caller reports rules beside other problems
            return self
        values = self.model_dump()
        if "seed" in self.selector.model_fields_set:  # which is not dumped
            values["selector"]["seed"] = self.selector.seed
        problems = rule_problems(values)
        if problems:
            raise ValueError("; ".join(problems))
        return self
