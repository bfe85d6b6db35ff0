"""A model whose base was published for transformers 4 is opened by transformers 4.57 as before it was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import OPERATORS
from tests.export.test_published import base, written  # noqa: F401 - a fixture

PACKAGES = OPERATORS.parent / "transformers-4.57"
WANTED = ["transformers==4.57.*", "tokenizers>=0.22,<=0.23", "huggingface-hub>=0.34,<1", "requests"]
WANTED += ["urllib3", "charset-normalizer", "certifi", "idna"]
ASK = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True)
with torch.no_grad():
    logits = model.eval()(torch.tensor([ids])).logits[0, -1]
print(json.dumps([transformers.__version__, ids, logits.double().tolist(), model.config.rope_theta]))
"""


@pytest.fixture(scope="module")
def older() -> Path:
    if not (PACKAGES / "transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PACKAGES), *WANTED]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        if done.returncode != 0:
            pytest.skip(f"transformers 4.57 cannot be installed: {done.stderr[-200:]}")
    return PACKAGES


@pytest.mark.slow
def test_transformers_4_57_reads_what_was_published_for_it(older: Path, base: Path, tmp_path: Path) -> None:  # noqa: F811
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight += 0.1
    written(model, tokenizer, tmp_path / "out")
    environment = {"PYTHONPATH": str(older), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", ASK, str(tmp_path / "out")]
    answered = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert answered.returncode == 0, answered.stderr
    version, ids, logits, theta = json.loads(answered.stdout.splitlines()[-1])
    assert version.startswith("4.57.") and theta == 500000.0
    assert ids == tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], add_generation_prompt=True, return_dict=False
    )
    with torch.no_grad():
        wanted = model.eval()(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(torch.tensor(logits), wanted, atol=1e-5)
