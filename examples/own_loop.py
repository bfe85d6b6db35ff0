"""Train a tiny random Llama in a loop of your own, two blocks at a time, under ZeRO-2. Explained in docs/own-loop.md.

deepspeed --num_accelerators 2 examples/own_loop.py    # two ranks; `python examples/own_loop.py`: one
python -m trainer export runs/own_loop runs/own_loop-model --base runs/own_loop/base
"""

import os
from pathlib import Path

import deepspeed
import torch
from deepspeed import comm as dist
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import trainer
from trainer.data.tokenizer import bytes_tokenizer
from trainer.selectors import Uniform

FOLDER, STEPS, BATCH, LENGTH = Path("runs/own_loop"), 20, 4, 64
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 100_000},
    "steps_per_print": 10**9,
}
TEXT = torch.tensor(list(Path(__file__).read_bytes()))  # the training data: this file, one token for each byte

for name, value in ALONE.items():  # a process without a launcher is a group of one
    os.environ.setdefault(name, value)
torch.set_num_threads(1)  # ranks on CPUs share the cores
deepspeed.init_distributed()

if dist.get_rank() == 0:  # the model to fine-tune
    torch.manual_seed(0)
    tokenizer = bytes_tokenizer()
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(FOLDER / "base")
    tokenizer.save_pretrained(FOLDER / "base")
dist.barrier()
model = AutoModelForCausalLM.from_pretrained(FOLDER / "base")

sparse = trainer.prepare(model, selector=Uniform(blocks=2, interval=5, seed=0), bank="cpu")
optimizer = torch.optim.AdamW(sparse.param_groups(weight_decay=0.01), lr=3e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DEEPSPEED)
sparse.attach(engine)
engine.train()
for step in range(STEPS):
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    starts = torch.randint(len(TEXT) - LENGTH, (BATCH,), generator=generator)
    ids = torch.stack([TEXT[start : start + LENGTH] for start in starts.tolist()]).to(engine.device)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    if dist.get_rank() == 0:
        print(f"step {step + 1:2}  loss {loss.item():.3f}  blocks {list(sparse.active)}", flush=True)
engine.save_checkpoint(FOLDER)
torch.distributed.destroy_process_group()
