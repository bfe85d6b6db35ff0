"""The rules that tie several keys of a configuration together."""

from collections.abc import Mapping
from typing import Any

from trainer.config.methods import ALL_ON, expand_method, get
from trainer.config.sources import source_list


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
        *_substrate_rules(values),
        *_unmask_rules(values),
        *_probe_rules(values),
    ]


def _number(values: Mapping[str, Any], path: str, default: float = 0) -> float:
    value = get(values, path)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default


def _exactly_one(values: Mapping[str, Any], first: str, second: str) -> list[str]:
    given = [path for path in (first, second) if get(values, path) is not None]
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
    steps, ratio = get(values, "schedule.warmup_steps"), get(values, "schedule.warmup_ratio")
    name, total = get(values, "schedule.name"), _number(values, "train.steps")
    if steps is not None and ratio is not None:
        problems.append(f"schedule.warmup_steps, schedule.warmup_ratio: got {steps} and {ratio}; set one to null")
    if name == "constant" and (steps or ratio):
        problems.append("schedule.name: constant has no warm-up; use constant_with_warmup, or set no warm-up")
    if total and _number(values, "schedule.warmup_steps") > total:
        problems.append(f"schedule.warmup_steps: {steps} is more than train.steps {total}")
    if name == "polynomial" and _number(values, "optimizer.lr", 1.0) <= 1e-7:
        problems.append(
            f"optimizer.lr: got {get(values, 'optimizer.lr')}; allowed with schedule polynomial: number > 1e-7"
        )
    return problems


def _eval_rules(values: Mapping[str, Any]) -> list[str]:
    problems = []
    file, fraction = get(values, "data.eval"), _number(values, "data.eval_fraction")
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
        f"data.train: weight given for {sum(given)} of {len(given)} sources; give it for all of them, or for none, and "
        "every sample is seen once per epoch"
    ]


def _optimizer_rules(values: Mapping[str, Any]) -> list[str]:
    expanded = expand_method(values)
    bank, switches = get(expanded, "bank.name"), get(expanded, "selector.name") != "all"
    if get(values, "optimizer.name") == "adamw_8bit" and switches and bank not in (None, "discard"):
        return [
            f"bank.name: {bank}, but the moments of optimizer.name=adamw_8bit are quantised for where they lie and "
            "cannot be kept; allowed: discard, or optimizer.name=adamw"
        ]
    return []


def _substrate_rules(values: Mapping[str, Any]) -> list[str]:
    expanded = expand_method(values)
    quantization = get(expanded, "model.quantization")
    if get(expanded, "substrate.name") != "adapter":
        if quantization is None:
            return []
        return [
            f"model.quantization: {quantization}, but weights of four bits cannot be trained; set substrate.name to "
            "adapter (method ist or lora), or model.quantization=null"
        ]
    problems = _exactly_one(expanded, "substrate.peft", "substrate.adapter")
    on = [part for part in ALL_ON if get(expanded, f"always_on.{part}") is True]
    if on:
        problems.append(
            f"always_on.{on[0]}: true, but with adapters whole modules train if PEFT keeps a copy of them; "
            "set false and name them in substrate.peft.modules_to_save"
        )
    if quantization is not None and get(expanded, "model.path") is None:
        problems.append(f"model.quantization: {quantization} is for weights that are loaded; set model.path, or null")
    if quantization is not None and get(expanded, "substrate.merge") is True:
        problems.append("substrate.merge: true, but weights of four bits would round the adapters away; set false")
    return problems


def _unmask_rules(values: Mapping[str, Any]) -> list[str]:
    expanded = expand_method(values)
    if get(expanded, "update.name") != "unmask":
        return []
    problems = []
    # Where the mask chooses among gradients, they must be what they say.
    if get(expanded, "model.dtype") == "fp16":
        problems.append(
            "model.dtype: fp16, but gradients of fp16 are scaled, which the scores of update.name=unmask would not "
            "see; allowed: bf16, fp32"
        )
    for path, allowed in (("optimizer.name", ("adamw", "adam")), ("bank.name", ("device", "discard"))):
        value = get(expanded, path)
        if value is not None and value not in allowed:
            problems.append(
                f"{path}: {value}, but the state of update.name=unmask is small and stays where it is; "
                f"allowed: {', '.join(allowed)}"
            )
    rate = get(expanded, "optimizer.lr_always_on")
    if rate is not None:
        problems.append(
            f"optimizer.lr_always_on: {rate}, but with update.name=unmask all weights are of one set; set it to null"
        )
    steps, total = _number(expanded, "update.growth_steps"), _number(expanded, "train.steps")
    if steps and total and steps > total:
        problems.append(
            f"update.growth_steps: {steps} is more than train.steps {total}, in which the budget would not be "
            "reached; set null, or a smaller one"
        )
    return problems


def _probe_rules(values: Mapping[str, Any]) -> list[str]:
    held_out = get(values, "data.eval") is not None or _number(values, "data.eval_fraction") > 0
    if get(values, "selector.probe.data") != "eval" or held_out:
        return []
    return [
        "selector.probe.data: eval, but there is no evaluation data; set data.eval or data.eval_fraction, or "
        "selector.probe.data=train"
    ]
