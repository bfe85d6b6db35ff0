"""launch/recipes: each file fits the configuration, DeepSpeed's dictionary and a model, and is the method it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, Qwen3MoeConfig

from tests.launching import RECIPES
from tests.models import tiny_llama
from trainer.cli.plan import main as plan
from trainer.config import METHODS, ConfigError, RunConfig, load
from trainer.config.deepspeed.resolve import resolve
from trainer.data.tokenizer import bytes_tokenizer
from trainer.planner.dry_run import describe

# The one that runs as it stands; the others want a model and data of one's own.
COMPLETE = "quickstart"
# Beside 70B weights there is no room for the gradients of a large vocabulary.
FROZEN_EMBEDDINGS = "llama-70b-lisa-141gb"
# What fits no model as small as the one here.
SMALLER = {"id3": ["update.budget=500"]}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model folder and a data file, and an output that is not in the checkout."""
    workspace = tmp_path_factory.mktemp("recipes")
    tiny_llama(layers=4, vocab=len(bytes_tokenizer())).save_pretrained(workspace / "model")
    bytes_tokenizer().save_pretrained(workspace / "model")
    rows = ['{"prompt": "One and one is ", "completion": "two."}\n'] * 100
    (workspace / "train.jsonl").write_text("".join(rows))
    own = [f"model.path={workspace / 'model'}", f"data.train={workspace / 'train.jsonl'}", "data.max_length=128"]
    return [*own, f"output={workspace / 'runs' / 'x'}"]


def method_named(recipe: Path) -> str:
    if recipe.stem == COMPLETE:
        return "lisa"
    if recipe in PLANNED:
        return next(word for word in recipe.stem.split("-") if word in METHODS)
    return recipe.stem.partition("_")[0]


def loaded(recipe: Path, overrides: list[str]) -> RunConfig:
    own = overrides[3:] if recipe.stem == COMPLETE else overrides
    return load(str(recipe), [*own, *SMALLER.get(recipe.stem, [])])


def test_every_recipe_is_tested() -> None:
    assert [recipe.stem for recipe in RECIPES if recipe not in PLANNED] == [
        "badam",
        "full",
        "id3",
        "ist",
        "ist_dora",
        "ist_zero3",
        "lisa",
        "lora",
        "quickstart",
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_the_method_it_names(recipe: Path, overrides: list[str]) -> None:
    config = loaded(recipe, overrides)
    assert config.method == method_named(recipe)
    assert config.update.name == METHODS[config.method]["update"]["name"]
    assert config.selector.name == METHODS[config.method]["selector"]["name"]
    if recipe.stem != FROZEN_EMBEDDINGS:
        # Of a multimodal model, the projector is frozen unless it is asked for.
        assert config.always_on.model_dump() == {**METHODS[config.method]["always_on"], "projector": False}
    assert config.data.eval_fraction > 0, "a run that evaluates nothing cannot say how far the loss fell"


def test_outputs_of_recipes_do_not_meet() -> None:
    outputs = {yaml.safe_load(recipe.read_text())["output"] for recipe in RECIPES}
    assert outputs == {f"runs/{recipe.stem}" for recipe in RECIPES}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_batches_of_recipes_divide_over_the_usual_numbers_of_ranks(
    recipe: Path, ranks: int, overrides: list[str]
) -> None:
    config = loaded(recipe, overrides)
    filled = resolve(config, ranks)
    sizes = (filled["train_micro_batch_size_per_gpu"], filled["gradient_accumulation_steps"])
    assert sizes[0] * sizes[1] * ranks == filled["train_batch_size"] == config.train.global_batch_size


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_fits_a_model(recipe: Path, overrides: list[str]) -> None:
    """All that a dry run does: data, blocks, always-on parts, buckets, bytes."""
    # In the epochs of these few samples there are fewer steps than in a recipe's warm-up.
    said = describe(loaded(recipe, [*overrides, "train.steps=1000", "train.epochs=null"]), ranks=2)
    parts = [part for part in ("embeddings", "head", "norm") if f"\nalways on: {part}, " in said]
    whole = ["embeddings", "head", "norm"] if method_named(recipe) in ("full", "id3", "lisa") else []
    assert parts == (["norm"] if recipe.stem == FROZEN_EMBEDDINGS else whole)
    assert "\nblocks: " in said and "\n  total " in said


# --- the plans in their headers ----------------------------------------------------------------------------------

LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SIZES_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
QWEN_30B = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "moe_intermediate_size": 768, "intermediate_size": 6144, "norm_topk_prob": True, "max_position_embeddings": 40960,
}  # fmt: skip
# What is in their config.json, as far as a plan depends on it.
PUBLISHED = {
    "meta-llama/Llama-3.1-8B": LlamaConfig(**LLAMA, **SIZES_8B, architectures=["LlamaForCausalLM"]),
    "meta-llama/Llama-3.1-70B": LlamaConfig(**LLAMA, **SIZES_70B, architectures=["LlamaForCausalLM"]),
    "Qwen/Qwen3-30B-A3B": Qwen3MoeConfig(**QWEN_30B, architectures=["Qwen3MoeForCausalLM"]),
}
PLANNED = [recipe for recipe in RECIPES if "# The plan, by " in recipe.read_text()]


@pytest.mark.parametrize("recipe", PLANNED, ids=lambda path: path.stem)
def test_plan_in_the_header(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command in the header says what the header says, and that it fits, from config.json alone."""
    header = [line.removeprefix("# ").rstrip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    start = next(i for i, line in enumerate(header) if line.startswith("The plan, by "))
    words = header[start].split("`")[1].split()
    assert words[:5] == ["python", "-m", "trainer", "plan", f"launch/recipes/{recipe.name}"]
    PUBLISHED[yaml.safe_load(recipe.read_text())["model"]["path"]].save_pretrained(tmp_path)
    assert plan([str(recipe), f"model.path={tmp_path}", *words[5:]]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [f"  {line}".rstrip() for line in said] == header[start + 1 :]
    assert said[-1] == "fits"


def test_sizes_of_machines_have_recipes() -> None:
    assert {recipe.stem for recipe in PLANNED} - {"qwen3-30b-a3b-lisa-80gb", "qwen3-30b-a3b-lisa-8x80gb"} == {
        f"llama-{size}-{method}{machine}"
        for method in ("lisa", "ist")
        for size, machine in (
            ("8b", "-24gb"),
            ("8b", "-80gb"),
            ("70b", "-141gb"),
            ("70b", "-8x80gb"),
            ("70b", ""),
        )
    }


def test_the_dry_run_shows_what_a_mask_costs(overrides: list[str]) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "id3")
    said = describe(loaded(recipe, overrides), ranks=2)
    assert "\ntrained at a time: 500 of " in said
    # Eight micro-batches to a step on each of two ranks.
    for row in ("indices", "dense gradient", "candidates", "sums"):
        assert f"\n  {row:<10}" in said, said
    with pytest.raises(ConfigError, match="update.budget: got 1000000, but only "):
        describe(load(str(recipe), [*overrides, "update.budget=1000000"]), ranks=2)
    offloading = [*overrides, "update.budget=500", "deepspeed=zero3_offload"]
    with pytest.raises(ConfigError, match="in zero3_offload.json, but update.name=unmask has state of its own"):
        describe(load(str(recipe), offloading), ranks=2)
