"""The rules that tie several keys of a configuration together."""

from collections.abc import Mapping
from typing import Any

from trainer.config.methods import ALL_ON, NEW_ROWS
from trainer.config.sources import source_list
from trainer.selectors import REGISTRY as SELECTORS
from trainer.settings.banks import REGISTRY as BANKS
from trainer.settings.nested import get, number
from trainer.settings.updates import REGISTRY as UPDATES


def rule_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the contradictions between keys of a configuration: nested mappings with all sections and the method's
    point filled in (`expand_method`). Values of a wrong type are left to the models."""
    return [
        *_exactly_one(values, "model.path", "model.random"),
        *_exactly_one(values, "train.steps", "train.epochs"),
        *_batch_rules(values),
        *_schedule_rules(values),
        *_eval_rules(values),
        *_weight_rules(values),
        *_streaming_rules(values),
        *_optimizer_rules(values),
        *_substrate_rules(values),
        *_update_rules(values),
        *_new_token_rules(values),
        *_seed_rules(values),
        *_probe_rules(values),
    ]


def _exactly_one(values: Mapping[str, Any], first: str, second: str) -> list[str]:
    given = [path for path in (first, second) if get(values, path) is not None]
    if len(given) == 1:
        return []
    return [f"{first}, {second}: {'both' if given else 'neither'} given; set exactly one of them"]


def _batch_rules(values: Mapping[str, Any]) -> list[str]:
    global_batch, micro_batch = number(values, "train.global_batch_size"), number(values, "train.micro_batch_size", 1)
    whole = isinstance(global_batch, int) and isinstance(micro_batch, int)
    if not whole or global_batch < 1 or micro_batch < 1 or global_batch % micro_batch == 0:
        return []
    return [
        f"train.micro_batch_size: {micro_batch} does not divide train.global_batch_size {global_batch}; "
        "the global batch is ranks x micro-batch x accumulation steps"
    ]


def _schedule_rules(values: Mapping[str, Any]) -> list[str]:
    problems = []
    steps, ratio = get(values, "schedule.warmup_steps"), get(values, "schedule.warmup_ratio")
    name, total = get(values, "schedule.name"), number(values, "train.steps")
    if steps is not None and ratio is not None:
        problems.append(f"schedule.warmup_steps, schedule.warmup_ratio: got {steps} and {ratio}; set one to null")
    if name == "constant" and (steps or ratio):
        problems.append("schedule.name: constant has no warm-up; use constant_with_warmup, or set no warm-up")
    if total and number(values, "schedule.warmup_steps") > total:
        problems.append(
            f"schedule.warmup_steps: {steps} is more than train.steps {total}; lower it, or set schedule.warmup_ratio"
        )
    if name == "polynomial" and number(values, "optimizer.lr", 1.0) <= 1e-7:
        problems.append(
            f"optimizer.lr: got {get(values, 'optimizer.lr')}; allowed with schedule polynomial: number > 1e-7"
        )
    return problems


def _eval_rules(values: Mapping[str, Any]) -> list[str]:
    problems = []
    file, fraction = get(values, "data.eval"), number(values, "data.eval_fraction")
    if file is not None and fraction:
        problems.append(f"data.eval, data.eval_fraction: got {file!r} and {fraction}; set null or 0 for one")
    if get(values, "eval.every") is not None and file is None and not fraction:
        problems.append("eval.every: no evaluation data; set data.eval or data.eval_fraction, or eval.every=null")
    return problems


def _weight_rules(values: Mapping[str, Any]) -> list[str]:
    sources = source_list(get(values, "data.train"))
    given = [get(source, "weight") is not None for source in sources] if isinstance(sources, list) else []
    if all(given) or not any(given):
        return []
    return [
        f"data.train: weight given for {sum(given)} of {len(given)} sources; give it for all of them, or for none "
        "(then every sample is seen once per epoch)"
    ]


def _streaming_rules(values: Mapping[str, Any]) -> list[str]:
    rows = get(values, "data.shuffle_rows")
    if get(values, "data.streaming") is not True:
        if rows is None:
            return []
        return [f"data.shuffle_rows: {rows}, but all samples are shuffled; set data.streaming=true, or null here"]
    problems = []
    epochs, fraction = get(values, "train.epochs"), number(values, "data.eval_fraction")
    if epochs is not None:
        problems.append(f"train.epochs: {epochs}, but with data.streaming no length is known; set train.steps instead")
    if fraction:
        problems.append(
            f"data.eval_fraction: {fraction}, but with data.streaming no rows can be set aside; set it to 0, and name "
            "rows to evaluate on by data.eval"
        )
    return problems


def _optimizer_rules(values: Mapping[str, Any]) -> list[str]:
    bank, selector = get(values, "bank.name"), get(values, "selector.name")
    switches = not (isinstance(selector, str) and selector in SELECTORS and SELECTORS[selector].constant)
    dropping = [name for name, settings in BANKS.items() if settings.place is None]
    if get(values, "optimizer.name") == "adamw_8bit" and switches and bank not in (None, *dropping):
        return [
            f"bank.name: {bank}, but a bank cannot store the moments of optimizer.name=adamw_8bit, whose quantisation "
            f"depends on the layout of the groups; allowed: {', '.join(dropping)}, or optimizer.name=adamw"
        ]
    return []


def _substrate_rules(values: Mapping[str, Any]) -> list[str]:
    quantization = get(values, "model.quantization")
    if get(values, "substrate.name") != "adapter":
        if quantization is None:
            return []
        return [
            f"model.quantization: {quantization}, but weights of four bits cannot be trained; set substrate.name to "
            "adapter (method ist or lora), or model.quantization=null"
        ]
    problems = _exactly_one(values, "substrate.peft", "substrate.adapter")
    on = [part for part in (*ALL_ON, "projector") if get(values, f"always_on.{part}") is True]
    if on:
        problems.append(
            f"always_on.{on[0]}: true, but with adapters whole modules train if PEFT keeps a copy of them; "
            "set false and name them in substrate.peft.modules_to_save"
        )
    if quantization is not None and get(values, "model.path") is None:
        problems.append(f"model.quantization: {quantization} requires weights to load; set model.path, or null")
    if quantization is not None and get(values, "substrate.merge") is True:
        problems.append("substrate.merge: true, but merging into four bits would round the adapters away; set false")
    return problems


def _update_rules(values: Mapping[str, Any]) -> list[str]:
    name = get(values, "update.name")
    settings = UPDATES.get(name) if isinstance(name, str) else None
    if settings is None:
        return []
    problems = []
    if settings.own_state and get(values, "model.dtype") == "fp16":
        problems.append(
            f"model.dtype: fp16, but gradients of fp16 are scaled, which update.name={name} does not undo; "
            "allowed: bf16, fp32"
        )
    clipping = get(values, "train.gradient_clipping")
    if settings.own_state and not settings.clips and clipping != 0:
        shown = "default" if clipping is None else clipping
        problems.append(
            f"train.gradient_clipping: {shown}, but update.name={name} does not clip its gradients; set it to 0"
        )
    return problems + settings.problems(values)


def _new_token_rules(values: Mapping[str, Any]) -> list[str]:
    parts = [part for part in ALL_ON if get(values, f"always_on.{part}") == NEW_ROWS]
    if not parts or get(values, "model.add_tokens"):
        return []
    return [
        f"always_on.{parts[0]}: {NEW_ROWS}, but there are no new tokens; name them in model.add_tokens, or set true or "
        "false"
    ]


def _seed_rules(values: Mapping[str, Any]) -> list[str]:
    seed = get(values, "selector.seed")
    if not isinstance(seed, int) or seed < 0:  # anything else is no seed, and refused as an unknown key already
        return []
    return ["selector.seed: unknown key; set seed, which determines the draws as well"]


def _probe_rules(values: Mapping[str, Any]) -> list[str]:
    held_out = get(values, "data.eval") is not None or number(values, "data.eval_fraction") > 0
    if get(values, "selector.probe.data") != "eval" or held_out:
        return []
    return [
        "selector.probe.data: eval, but there is no evaluation data; set data.eval or data.eval_fraction, or "
        "selector.probe.data=train"
    ]
