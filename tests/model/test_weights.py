"""model/weights.py and loading under ZeRO-3: what `from_pretrained` gives, in a partition's memory and a block's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from tests import distributed
from tests.model.loading import TOKENS, load, settings, weights
from tests.models import FAMILIES, tiny_llama, tiny_model
from trainer.config.schema import ModelConfig
from trainer.data.tokenizer import bytes_tokenizer
from trainer.model import load as models
from trainer.model.blocks import find
from trainer.model.folder_checks import ModelError
from trainer.model.weights import ModelFolder, WeightsError

# More than ten experts: by name alone, the eleventh would come after the second.
MORE: dict[str, dict[str, Any]] = {"mixtral": {"num_local_experts": 12}}


def written(family: str, workspace: Path, **fields: Any) -> Path:
    """Write a folder of many small files with random weights, such as `from_pretrained` opens."""
    model = tiny_model(family, seed=3, vocab_size=TOKENS, **MORE.get(family, {}), **fields)
    model.save_pretrained(workspace / family, max_shard_size="20KB")
    return workspace / family


def on_meta(folder: Path) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


# --- reading by name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_reads_what_from_pretrained_loads(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    workspace = written(family, tmp_path)
    assert len(list(workspace.glob("*.safetensors"))) > 5
    expected = AutoModelForCausalLM.from_pretrained(workspace, dtype=dtype).state_dict()
    folder = ModelFolder(workspace, on_meta(workspace))
    assert set(expected) - set(folder.shapes) <= {"lm_head.weight"}, "only a tied head is not in the files"
    for name in folder.shapes:
        (read,) = folder.read([name], dtype).values()
        assert read.dtype == dtype and torch.equal(read, expected[name]), name
        assert folder.shapes[name] == tuple(read.shape)


def test_reads_what_is_asked_for_as_it_is_stored(tmp_path: Path) -> None:
    tiny_llama(layers=2, dtype=torch.bfloat16).save_pretrained(tmp_path)
    folder = ModelFolder(tmp_path, on_meta(tmp_path))
    names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"]
    read = folder.read(names)
    assert list(read) == names and {tensor.dtype for tensor in read.values()} == {torch.bfloat16}
    with pytest.raises(WeightsError, match=r"has no weight 'model\.norms\.weight' for this model.*model\.norm\.weight"):
        folder.read(["model.norms.weight"])


def test_weights_of_the_bare_model_are_found(tmp_path: Path) -> None:
    """Files of a model without its head lack the prefix that its parts have in one with a head."""
    model = tiny_model("gpt2", seed=3)
    model.transformer.save_pretrained(tmp_path)
    folder = ModelFolder(tmp_path, on_meta(tmp_path))
    assert torch.equal(folder.read(["transformer.wte.weight"])["transformer.wte.weight"], model.transformer.wte.weight)


def test_folders_without_safetensors_are_refused(tmp_path: Path) -> None:
    tiny_llama(layers=2).config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(WeightsError, match=r"has no file named model\.safetensors or model\.safetensors\.index\.json"):
        ModelFolder(tmp_path, on_meta(tmp_path))


# --- into partitions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """What a rank found under ZeRO-3, beside `from_pretrained` of the whole model: by family the weights and buffers
    that differ, the peak of a load and what it is made of in bytes, and what was said, by what is wrong with a folder.
    """

    differing: dict[str, list[str]]
    peak: dict[str, int]
    said: dict[str, str]
    old_format: bool
    generation: bool


def partitioned(folder: Path, *, dtype: str = "fp32") -> PreTrainedModel:
    chosen = ModelConfig(path=str(folder), dtype=dtype)
    zero3 = settings(3) | {"bf16": {"enabled": dtype == "bf16"}}
    return models.load(chosen, bytes_tokenizer(), seed=0, deepspeed=zero3)


def differing(folder: Path, dtype: str) -> list[str]:
    whole = load(path=str(folder), dtype=dtype)
    pieces = partitioned(folder, dtype=dtype)
    a, b = (weights(model) | dict(model.named_buffers()) for model in (whole, pieces))
    assert a.keys() == b.keys() and len(a) > 20
    return [name for name in a if not torch.equal(a[name], b[name]) or a[name].dtype != b[name].dtype]


def peak(folder: Path) -> dict[str, int]:
    """Return the bytes of all live storages at the peak of a load, files that are mapped included."""
    from benchmarks.common import Tracker, live_bytes

    before = live_bytes()
    with Tracker() as tracker:
        model = partitioned(folder)
    block = max(4 * block.numel for block in find(model).blocks)
    part = sum(p.ds_tensor.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    file = max(file.stat().st_size for file in folder.glob("*.safetensors"))
    whole = sum(4 * p.ds_numel for p in model.parameters())
    return {"peak": tracker.peak - before, "partition": part, "block": block, "file": file, "whole": whole}


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        partitioned(folder)
    return str(error.value)


def _load(rank: int, workspace: Path, families: tuple[str, ...], dtypes: tuple[str, ...]) -> Loaded:
    """Runs in each rank, with the folders that `workspace` holds."""
    found = {f"{family}, {dtype}": differing(workspace / family, dtype) for family in families for dtype in dtypes}
    said = {name: refusal(workspace / name) for name in ("incomplete", "truncated", "without a file", "untied")}
    lines: list[str] = []
    with mock.patch.object(models.logger, "warning", lambda text, *args: lines.append(text % args)):
        old_format = differing(workspace / "old format", "fp32") == []
    said["old format"] = "\n".join(lines)
    generation = partitioned(workspace / "deep").generation_config.top_k == 7
    return Loaded(found, peak(workspace / "deep"), said, old_format, generation)


def write_folders(workspace: Path, families: Iterable[str]) -> None:
    for family in families:
        written(family, workspace)
    deep = tiny_llama(layers=24, vocab=TOKENS)
    deep.save_pretrained(workspace / "deep", max_shard_size="60KB")
    whole = written("llama", workspace / "copied")
    for name in ("incomplete", "truncated", "without a file", "untied"):
        shutil.copytree(whole, workspace / name)
    index = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    change(
        workspace / "incomplete" / index["model.layers.2.mlp.up_proj.weight"],
        without="model.layers.2.mlp.up_proj.weight",
    )
    file = workspace / "truncated" / index["model.norm.weight"]
    file.write_bytes(file.read_bytes()[:-4])
    (workspace / "without a file" / index["model.norm.weight"]).unlink()
    config = json.loads((whole / "config.json").read_text())
    (workspace / "untied" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tiny_llama(layers=2, vocab=TOKENS).config.save_pretrained(workspace / "old format")
    torch.save(tiny_llama(layers=2, vocab=TOKENS).state_dict(), workspace / "old format" / "pytorch_model.bin")
    GenerationConfig(do_sample=True, top_k=7).save_pretrained(workspace / "deep")


def change(file: Path, *, without: str) -> None:
    tensors = load_file(file)
    del tensors[without]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> list[Loaded]:
    """By rank, of a family with tied embeddings and buffers, and of one with experts that are stored one by one."""
    workspace = tmp_path_factory.mktemp("folders")
    families = ("gpt2", "mixtral")
    write_folders(workspace, families)
    return distributed.run(_load, workspace, families, ("fp32",), ranks=2)


def test_partitions_hold_what_from_pretrained_loads(loaded: list[Loaded]) -> None:
    for found in loaded:
        assert found.differing == {"gpt2, fp32": [], "mixtral, fp32": []}
        assert found.generation


@pytest.mark.slow
def test_partitions_of_every_family_hold_what_from_pretrained_loads(tmp_path: Path) -> None:
    write_folders(tmp_path, FAMILIES)
    for found in distributed.run(_load, tmp_path, tuple(FAMILIES), ("fp32", "bf16"), ranks=2):
        assert len(found.differing) == 2 * len(FAMILIES) and not any(found.differing.values()), found.differing


def test_no_more_than_a_partition_a_block_and_a_file_is_in_memory(loaded: list[Loaded]) -> None:
    for found in loaded:
        bytes_of = found.peak
        bound = bytes_of["partition"] + bytes_of["block"] + bytes_of["file"]
        assert bytes_of["partition"] < bytes_of["peak"] <= bound < 0.8 * bytes_of["whole"], bytes_of


def test_what_is_wrong_with_files_is_said_on_all_ranks(loaded: list[Loaded]) -> None:
    for found in loaded:
        lacks = "lacks 1 weights, for instance model.layers.2.mlp.up_proj.weight: is this folder complete?"
        assert lacks in found.said["incomplete"]
        assert found.said["truncated"].startswith("model.path: cannot load '"), found.said
        assert "No such file" in found.said["without a file"], found.said


def test_weights_that_are_tied_and_differ_are_refused(loaded: list[Loaded]) -> None:
    for found in loaded:
        assert "ties model.embed_tokens.weight and lm_head.weight, but the weights differ" in found.said["untied"]


def test_what_transformers_has_to_load_is_said_once(loaded: list[Loaded]) -> None:
    said = "transformers loads all of the model before it is partitioned: '"
    assert [said in found.said["old format"] for found in loaded] == [True, False]
    assert all(found.old_format for found in loaded)
