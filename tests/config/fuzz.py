"""Random keys, values, files and command lines for every command that takes settings: refused by name, or accepted.

`make fuzz` runs 2,000 cases, `make test-slow` a share of them. A case is a fork (`forks.py`). Wrong are: a traceback, a
fork that had to be ended, a control character on the terminal, and a refusal that does not name what was changed. What
a dry run accepts it has built, on the meta device, by the code that a run goes through.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import yaml
from hypothesis import strategies as st

from tests.config.forks import import_everything, in_fork
from tests.launching import RECIPE, Finished, write_inputs
from trainer.config import METHODS, RunConfig
from trainer.config.deepspeed.keys import BLOCKS
from trainer.config.deepspeed.presets import PRESET_FOLDER, presets
from trainer.config.keys import keys, literal_values
from trainer.config.text import in_short, printable

COMMANDS = {
    "train": ["--dry-run"],
    "plan": ["--gpus", "1"],
    "prepare": [],
    "submit": ["--gpus", "1", "--time", "1:00:00", "--print"],
}
REFUSED = 2
# 0; 1: a plan says that something does not fit; 2.
CODES = {0, 1, REFUSED}
RANDOM = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "vocab_size", "head_dim", "hidden_act", "rope_theta"),
    *("rms_norm_eps", "tie_word_embeddings", "attention_bias", "layer_types", "num_local_experts", "pad_token_id"),
)
PEFT = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "init_lora_weights")
PATHS = [key.path for key in keys(RunConfig) if "[]" not in key.path and key.path not in ("model.random", "method")]
PATHS += [f"model.random.{name}" for name in RANDOM] + [f"substrate.peft.{name}" for name in PEFT] + ["method"]
SECTIONS = sorted({path.partition(".")[0] for path in PATHS if "." in path})
NAMES = sorted({word for key in keys(RunConfig) for word in literal_values(key.field)} | {*METHODS, *presets()})

# As YAML.
NUMBERS = [
    *("0", "1", "2", "3", "4", "7", "-1", "64", "1000", "100000", "4294967296", "1e-3", "0.5", "1.5", "2e-5", "1e38"),
    *("1e308", "1e-320", "1e999", "-0.0", ".inf", "-.inf", ".nan", "9" * 40, "9" * 5000, "0x10", "0o17", "010"),
    *("0b11", "1_000", "1:30", "190:20:30.15", "12e03", "+1", "1.", "."),
]
WORDS = [
    *("true", "false", "null", "~", "", "yes", "on", "off", "No", "2024-13-45", "2024-01-01", "=", "<<", "bytes"),
    *("auto", "never", "llama", "gpt2", "bert", "mamba", "all-linear", "[q_proj]", "[0, -1]", "[0.9, 0.95]"),
]
PLACES = [
    *("/", ".", "..", "~", "~no-such-user/x", "/dev/null", "/dev/zero", "/dev/zero/x", "/proc/x", "/proc/self/mem"),
    *("/nonexistent", "/nonexistent/a/b.json", "fifo.json", "fifo.jsonl", "loop", "loop/x", "train.jsonl", "folder"),
    *("./" + "a" * 300, "a/" * 3000, "owner/name", "empty.jsonl", "huge.json", "runs/other", "tiny.yaml", "a%jb"),
]
SHAPES = [
    *("[x]", "{a: 1}", "{name: [x]}", "[[x]]", "[]", "{}", "{[a]: 1}", "{1: 2}", "{true: 1}", "? [a]\n: 1", "[1, [2]]"),
    *("!!int x", "!!int ''", "!!bool maybe", "!!binary aGk=", "!!set {a}", "!!python/object/apply:os.system [true]"),
    *("!x y", "&a [*a]", "*b", "&a {b: *a}", "[" * 5000, "[" * 60 + "]" * 60, "{a: " * 40 + "1" + "}" * 40, "'"),
    '"\\0"', '"a\\nb"', '"\\x1b[31mred"', '"\\e]0;title\\a"', '"\\ud800"', '"\\u2028"', "a\tb", "\x1b[2J", "é", "名前",
    "&a [1,2,3,4,5,6,7,8,9,0]", "{path: train.jsonl, weight: 1e-300}", "[{path: train.jsonl}, train.jsonl]",
    "x" * 5000, "[" + "1," * 3000 + "1]", "{" + ",".join(f"k{i}: 1" for i in range(2000)) + "}",
]  # fmt: skip
BOMB = "bomb: [&a0 [x, x], " + ", ".join(f"&a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)) + "]\n"

values = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(WORDS),
    st.sampled_from(NAMES),
    st.sampled_from(PLACES),
    st.sampled_from(SHAPES),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(repr),
    st.text(max_size=20),
)
paths = st.one_of(
    st.sampled_from(PATHS),
    st.sampled_from(PATHS),
    st.sampled_from(PATHS),
    st.sampled_from(SECTIONS),
    st.builds(lambda path, text: f"{path}.{text}", st.sampled_from(PATHS), st.sampled_from(["name", "x", "0", "[]"])),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12),
)
json_values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10), st.integers(), st.floats(), st.text(max_size=8), st.just("auto"),
    st.just([]), st.just({}), st.just({"enabled": True}), st.just([1]),
    st.sampled_from(["cpu", "nvme", "none", "fp32"]),
)  # fmt: skip
JSON_PATHS = [f"{block}.{name}" if block else name for block, names in BLOCKS.items() for name in names]
RAW_JSON = [
    "", "null", "[]", "1", "{", '{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}",
    "[" * 5000, '{"a": ' * 900 + "1" + "}" * 900, '{"zero_optimization": {"stage": 2, "stage": 3}}', '{"a\\u0000": 1}',
    '{"zero_optimization": [2]}', '{"zero_optimization": {"stage": [2]}}', "\ufeff{}", '{"\\ud800": 1}',
    "{" + ",".join(f'"k{i}": 1' for i in range(20_000)) + "}",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A command line, files to write before it, and words of which a refusal must contain one."""

    argv: tuple[str, ...]
    files: dict[str, str]
    words: tuple[str, ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Settings on the command line, in the recipe's text or structure, in a file of DeepSpeed's; odd arguments."""
    command = draw(st.sampled_from(["train", "train", *COMMANDS]))
    kind = draw(st.sampled_from(["settings", "settings", "settings", "recipe", "text", "deepspeed", "json", "argv"]))
    recipe, settings, files, words = "tiny.yaml", [], {}, []
    if kind in ("settings", "recipe"):
        for path, value in draw(st.lists(st.tuples(paths, values), min_size=1, max_size=2)):
            names = path.split(".")
            words += [
                path,
                *(".".join(names[:count]) for count in range(1 if names[0] in PATHS else 2, len(names))),
                ": ".join(names[:2]),
            ]
            if kind == "settings":
                settings.append(f"{path}={value}")
            else:
                nested = path.split(".")
                text = "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(nested[:-1]))
                files["case.yaml"] = f"{text}{'  ' * (len(nested) - 1)}{nested[-1]}: {value}\n"
                recipe, words = "case.yaml", [*words, "case.yaml"]
        if kind == "recipe":  # the rest of it
            settings += [f"{name}={json.dumps(value)}" for name, value in yaml.safe_load(RECIPE).items()]
            settings = [setting for setting in settings if setting.partition("=")[0] != words[0].partition(".")[0]]
            words += PATHS  # what is missing now
    elif kind == "text":
        start = draw(st.integers(0, len(RECIPE)))
        end = start + draw(st.sampled_from([0, 0, 1, 5, 100]))
        inserted = draw(st.one_of(st.sampled_from([BOMB, *SHAPES, *WORDS]), st.text(max_size=10)))
        files["case.yaml"] = RECIPE[:start] + inserted + RECIPE[end:]
        recipe, words = "case.yaml", ["case.yaml", *PATHS, *SECTIONS]
    elif kind == "deepspeed":
        preset = json.loads((PRESET_FOLDER / f"{draw(st.sampled_from(presets()))}.json").read_text())
        for path, value in draw(st.lists(st.tuples(st.sampled_from(JSON_PATHS), json_values), min_size=1, max_size=2)):
            holder: Any = preset
            *blocks, name = path.split(".")
            for block in blocks:
                holder = holder[block] if isinstance(holder.get(block), dict) else holder.setdefault(block, {})
                holder = holder if isinstance(holder, dict) else {}
            holder[name] = value
        files["ds.json"] = json.dumps(preset)
        settings, words = ["deepspeed=ds.json", *draw(st.sampled_from([[], ["model.dtype=bf16"]]))], ["deepspeed"]
    elif kind == "json":
        files["ds.json"] = draw(st.sampled_from(RAW_JSON))
        settings, words = ["deepspeed=ds.json"], ["deepspeed"]
    options = COMMANDS[command]
    if kind == "argv":
        odd = draw(
            st.lists(
                st.sampled_from(
                    [
                        *("--help", "-h", "--", "-x", "--steps=5", "tiny.yaml", "", "=", "a", "--gpus=0", "--gpus=٣"),
                        *("--nodes=" + "9" * 5000, "--show=²", "--show", "--time=1:2:3:4", "\x1b[31m", "--\x1b]0;x\a"),
                        *("--partition=a\nb", "--sbatch=a", "--sbatch=--x\n#SBATCH --y", "fifo.yaml", "/dev/zero"),
                        *("--local_rank=x", "--deepspeed_config=fifo.json", "--flops=nan", "--gpu-memory=1e400"),
                        "\udcff",
                        "a" * 300,
                        "~no-such-user",
                        "huge.yaml",
                        "folder",
                    ]  # fmt: skip
                ),
                min_size=1,
                max_size=3,
            )
        )
        settings, words = odd, [""]
    return Case((command, recipe, *settings, *options), files, tuple(words))


def write_files(folder: Path) -> None:
    """What the cases point to."""
    write_inputs(folder)
    (folder / "folder").mkdir()
    (folder / "empty.jsonl").touch()
    (folder / "loop").symlink_to("loop")
    for name in ("fifo.json", "fifo.jsonl", "fifo.yaml"):
        os.mkfifo(folder / name)
    for name in ("huge.json", "huge.yaml"):
        with open(folder / name, "wb") as file:
            file.truncate(2**40)


def run(case: Case, folder: Path) -> Finished:
    """The outcome of a case in `folder`."""
    from trainer.cli.main import main

    for name, text in case.files.items():
        (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    return in_fork(lambda: main(list(case.argv)), folder=folder)


def wrong(case: Case, outcome: Finished) -> str | None:
    """What is wrong with the outcome of a case, if anything."""
    if "Traceback (most recent call last)" in outcome.everything:
        return outcome.stderr.strip().splitlines()[-1]
    if outcome.code not in CODES:
        return f"exit code {outcome.code}"
    odd = {character for character in outcome.everything if not character.isprintable()} - {"\n", "\t"}
    if odd:
        return f"control characters {sorted(odd)!r} on the terminal"
    if len(outcome.stderr) > 100_000:
        return f"a message of {len(outcome.stderr):,} characters"
    if outcome.code == REFUSED and not any(form in outcome.stderr for word in case.words for form in _shown(word)):
        return f"none of {case.words[:4]} is named"
    return None


def _shown(word: str) -> tuple[str, str]:
    """A word as messages have it: as it is, or quoted."""
    return printable(in_short(word), keep=""), in_short(repr(word)[1:-1])


def campaign(count: int, seed: int) -> tuple[Counter[int], list[str]]:
    """(how often which exit code, what was wrong) in `count` cases drawn by `seed`."""
    import_everything()
    codes: Counter[int] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as workspace:
        folder = Path(workspace)
        write_files(folder)
        warm = run(Case(("train", "tiny.yaml", "--dry-run"), {}, ()), folder)
        assert warm.code == 0, warm.everything

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(cases())
        def look(case: Case) -> None:
            outcome = run(case, folder)
            codes[outcome.code] += 1
            if said := wrong(case, outcome):
                failures.append(f"{said}\n  {in_short(shlex.join(case.argv), 500)}\n  {in_short(str(case.files), 500)}")
                print(failures[-1], f"\n  {in_short(outcome.stderr, 600)}", flush=True)

        look()
    return codes, failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found, problems = campaign(arguments.cases, arguments.seed)
    print(
        f"{found.total()} cases, seed {arguments.seed}; exit codes {dict(sorted(found.items()))}; {len(problems)} wrong"
    )
    sys.exit(bool(problems))
