"""launch/recipes: each file fits the configuration, DeepSpeed's dictionary and a model, and is the method it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.launching import RECIPES
from tests.models import tiny_llama
from trainer.config import METHODS, ConfigError, RunConfig, load
from trainer.config.deepspeed import resolve
from trainer.data.tokenizer import bytes_tokenizer
from trainer.describe import describe

# The one that runs as it stands; the others want a model and data of one's own.
COMPLETE = "quickstart"
# What fits no model as small as the one here.
SMALLER = {"id3": ["update.budget=500"]}


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model folder and a data file, and an output that is not in the checkout."""
    place = tmp_path_factory.mktemp("recipes")
    tiny_llama(layers=4, vocab=len(bytes_tokenizer())).save_pretrained(place / "model")
    bytes_tokenizer().save_pretrained(place / "model")
    rows = ['{"prompt": "One and one is ", "completion": "two."}\n'] * 100
    (place / "train.jsonl").write_text("".join(rows))
    own = [f"model.path={place / 'model'}", f"data.train={place / 'train.jsonl'}", "data.max_length=128"]
    return [*own, f"output={place / 'runs' / 'x'}"]


def loaded(recipe: Path, overrides: list[str]) -> RunConfig:
    own = overrides[3:] if recipe.stem == COMPLETE else overrides
    return load(str(recipe), [*own, *SMALLER.get(recipe.stem, [])])


def test_every_recipe_is_tested() -> None:
    assert [recipe.stem for recipe in RECIPES] == [
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
    assert config.method == ("lisa" if recipe.stem == COMPLETE else recipe.stem.partition("_")[0])
    assert config.update.name == METHODS[config.method]["update"]["name"]
    assert config.selector.name == METHODS[config.method]["selector"]["name"]
    assert config.always_on.model_dump() == METHODS[config.method]["always_on"]
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
    said = describe(loaded(recipe, overrides), ranks=2)
    parts = [part for part in ("embeddings", "head", "norm") if f"\nalways on: {part}, " in said]
    whole = recipe.stem in ("full", "id3", "lisa", COMPLETE)
    assert parts == (["embeddings", "head", "norm"] if whole else [])
    assert "\nblocks: " in said and "\n  total " in said


def test_the_dry_run_shows_what_a_mask_costs(overrides: list[str]) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.stem == "id3")
    said = describe(loaded(recipe, overrides), ranks=2)
    assert "\ntrained at a time: 500 of " in said
    # Eight micro-batches to a step on each of two ranks.
    for row in ("indices", "gradient", "candidates", "sums"):
        assert f"\n  {row:<10}" in said, said
    with pytest.raises(ConfigError, match="update.budget: got 1000000, but only "):
        describe(load(str(recipe), [*overrides, "update.budget=1000000"]), ranks=2)
    offloading = [*overrides, "update.budget=500", "deepspeed=zero3_offload"]
    with pytest.raises(ConfigError, match="in zero3_offload.json, but the state of update.name=unmask is small"):
        describe(load(str(recipe), offloading), ranks=2)
