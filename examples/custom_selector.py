"""Train with a selector of your own. docs/extending.md shows how it becomes a part of the package.

deepspeed --num_accelerators 2 examples/custom_selector.py    # two ranks; `python examples/custom_selector.py`: one
"""

import os

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trainer
from trainer.selectors.base import Selector, require_blocks

BATCH, LENGTH, VOCABULARY = 4, 32, 64
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": BATCH,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 100_000},
    "steps_per_print": 10**9,
}


class Window(Selector):
    """Choose `blocks` neighbours, the topmost first, and move down by one block at each interval."""

    blocks: int = 2
    interval: int = 20

    def num_active(self, num_blocks: int) -> int:
        return require_blocks(self.blocks, num_blocks)

    def select(self, interval: int, num_blocks: int) -> tuple[int, ...]:
        highest = num_blocks - self.num_active(num_blocks)
        start = highest - interval % (highest + 1)
        return tuple(range(start, start + self.blocks))


for name, value in ALONE.items():  # a process without a launcher is a group of one
    os.environ.setdefault(name, value)
torch.set_num_threads(1)  # ranks on CPUs share the cores
deepspeed.init_distributed()
torch.manual_seed(0)  # the same weights on all ranks
model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE))
sparse = trainer.prepare(model, selector=Window(blocks=2, interval=4), always_on=["head", "norm"])
optimizer = torch.optim.AdamW(sparse.param_groups(), lr=3e-3)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=DEEPSPEED)
sparse.attach(engine)
engine.train()
for step in range(20):
    ids = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH).add(step).remainder(VOCABULARY).to(engine.device)
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    if torch.distributed.get_rank() == 0:
        print(f"step {step + 1:2}  blocks {list(sparse.active)}", flush=True)
torch.distributed.destroy_process_group()
