"""trainer/config/files.py: relative paths, files that are missing or cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.config.settings import config, problems, settings, write
from trainer.config import dump, load

# --- paths ---


def test_paths_of_a_file_point_into_the_current_directory_first_and_its_own_folder_second(folder: Path) -> None:
    recipes = folder / "recipes"
    (recipes / "llama").mkdir(parents=True)
    (recipes / "llama" / "config.json").write_text("{}")
    (recipes / "llama" / "model.safetensors").write_bytes(b"")
    for workspace in (recipes, folder):
        (workspace / "both.jsonl").write_text("{}\n")
    (recipes / "only.jsonl").write_text("{}\n")
    (recipes / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    text = "data: {train: both.jsonl, eval: only.jsonl}\nmodel: {path: llama}\ndeepspeed: ds.json\n"
    path = write(recipes / "run.yaml", text)
    loaded = load(path, settings(without=("data.train", "model.random")))
    assert [source.path for source in loaded.data.train] == [str(folder / "both.jsonl")]
    assert [source.path for source in loaded.data.eval] == [str(recipes / "only.jsonl")]
    assert loaded.model.path == str(recipes / "llama")
    assert loaded.deepspeed == str(recipes / "ds.json")
    # An override was typed in the current directory.
    found = problems("data.train=only.jsonl", without=("data.train", "model.random"), path=path)
    assert found == [f"data.train: no such file: 'only.jsonl'; nearest: {str(recipes / 'only.jsonl')!r}"]


@pytest.mark.usefixtures("folder")
def test_a_hub_name_is_left_to_the_hub() -> None:
    assert config("model.path=owner/name", without=("model.random",)).model.path == "owner/name"


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/nowhere", "models/of/mine"])
@pytest.mark.usefixtures("folder")
def test_a_model_path_that_is_no_hub_name_must_exist(path: str) -> None:
    (found,) = problems(f"model.path={path}", without=("model.random",))
    assert found.startswith(f"model.path: no such folder: {path!r}") and "hub name" in found


def test_a_model_folder_needs_a_config_and_weights(folder: Path) -> None:
    (folder / "weights").mkdir()
    (found,) = problems("model.path=weights", without=("model.random",))
    assert "weights' has no config.json" in found
    (folder / "weights" / "config.json").write_text("{}")
    (found,) = problems("model.path=weights", without=("model.random",))
    assert "weights' has no weights (*.safetensors or *.bin)" in found
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "weights" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "weights" / "model-1.safetensors").write_bytes(b"")
    (found,) = problems("model.path=weights", without=("model.random",))
    assert "weights' lacks 1 of 2 weight files, such as model-2.safetensors" in found
    (found,) = problems("model.path=train.jsonl", without=("model.random",))
    assert "is a file" in found
    (found,) = problems("model.tokenizer=./toknizer")
    assert found.startswith("model.tokenizer: no such folder")
    assert config("model.tokenizer=bytes").model.tokenizer == "bytes"


def test_data_files(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "sub").mkdir()
    found = problems("data.train=trian.jsonl", "data.eval=empty.jsonl")
    assert found == [
        "data.train: no such file: 'trian.jsonl'; nearest: 'train.jsonl'",
        f"data.eval: {str(folder / 'empty.jsonl')!r} is empty; it must contain rows",
    ]
    assert "is a folder" in problems("data.train=sub")[0]
    (unchecked,) = load(None, settings("data.train=nowhere.jsonl"), check_files=False).data.train
    assert unchecked.path == "nowhere.jsonl"


def test_every_source_of_a_mix_is_looked_for(folder: Path) -> None:
    (folder / "recipes").mkdir()
    (folder / "recipes" / "b.csv").write_text("question,answer\n")
    (folder / "notes.txt").write_text("x")
    sources = "[train.jsonl, {path: b.csv, format: qa}, owner/name, 'owner/name:test[:10%]']"
    path = write(folder / "recipes" / "run.yaml", f"data: {{train: {sources}}}\n")
    loaded = load(path, settings(without=("data.train",)))
    assert [(source.path, source.format, source.split) for source in loaded.data.train] == [
        (str(folder / "train.jsonl"), "auto", None),
        (str(folder / "recipes" / "b.csv"), "qa", None),
        ("owner/name", "auto", None),
        ("owner/name", "auto", "test[:10%]"),
    ]
    assert load(write(folder / "saved.yaml", dump(loaded)), []) == loaded
    assert problems("data.train=[train.jsonl, notes.txt, data/gone.jsonl]") == [
        f"data.train[1]: {str(folder / 'notes.txt')!r} does not have the name of a data file; allowed: "
        ".jsonl | .json | .csv | .parquet | .arrow",
        f"data.train[2]: no such file: 'data/gone.jsonl' (looked in {folder / 'data'})",
    ]
    assert load(None, settings("data.train=recipes")).data.train[0].path == str(folder / "recipes")


def test_a_data_file_that_cannot_be_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path_open = Path.open

    def refuse(
        self: Path, *arguments: Any, **options: Any
    ) -> Any:  # Root may read everything: permissions show nothing.
        if self.name == "train.jsonl":
            raise PermissionError(13, "Permission denied")
        return path_open(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    assert problems() == [f"data.train: cannot read {str(folder / 'train.jsonl')!r}: Permission denied"]


@pytest.mark.parametrize("key", ["output", "data.cache"])
@pytest.mark.usefixtures("folder")
def test_a_folder_to_write_cannot_be_a_file(key: str) -> None:
    assert problems(f"{key}=train.jsonl")[0].startswith(f"{key}: 'train.jsonl' cannot be a folder")
    assert problems(f"{key}=train.jsonl/run")[0].startswith(f"{key}: 'train.jsonl/run' cannot be a folder")


# --- files that cannot be read ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"seed: 1\ntrain: [3\n", "line 3: not valid YAML"),
        (b"seed: 1\nseed: 2\n", "line 2: not valid YAML: key 'seed' given twice"),
        (b"seed: 1\noutput: \xff\n", "line 2: not UTF-8 text (byte 0xff)"),
        (b"- seed\n", "contains a list"),
        (b"a\x00b: 1\n", "not valid YAML"),
        (b"train: {true: 3}\n", "key true is not text"),
    ],
)
def test_unreadable_yaml(folder: Path, content: bytes, message: str) -> None:
    (folder / "run.yaml").write_bytes(content)
    (found,) = problems(path="run.yaml")
    assert found.startswith("run.yaml") and message in found


def test_missing_recipe(folder: Path) -> None:
    write(folder / "lisa.yaml", "")
    assert problems(path="lsia.yaml") == ["configuration file: no such file: 'lsia.yaml'; nearest: 'lisa.yaml'"]
    assert "cannot read" in problems(path=str(folder))[0]
