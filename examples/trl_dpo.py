"""Train on preferences with TRL's DPOTrainer, two blocks at a time. Explained in docs/transformers-and-trl.md.

deepspeed --num_accelerators 2 examples/trl_dpo.py    # two ranks; `python examples/trl_dpo.py`: one
"""

import os

import deepspeed
import torch
from datasets import load_dataset
from deepspeed.accelerator import get_accelerator
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

import trainer
from trainer.data.tokenizer import bytes_tokenizer
from trainer.integrations.transformers import layerwise
from trainer.selectors import Uniform

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
DATA = os.path.join(os.path.dirname(__file__), "preferences.jsonl")
DEEPSPEED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 100_000},
}

for name, value in (ALONE | {"OMP_NUM_THREADS": "1"}).items():  # a process without a launcher is a group of one
    os.environ.setdefault(name, value)
torch.set_num_threads(1)  # ranks on CPUs share the cores
deepspeed.init_distributed()

args = DPOConfig(
    output_dir="runs/trl_dpo",
    deepspeed=DEEPSPEED,
    use_cpu=get_accelerator().device_name() == "cpu",
    precompute_ref_log_probs=True,  # before training, by the model itself: no second model in memory
    per_device_train_batch_size=4,
    max_steps=20,
    learning_rate=3e-3,
    max_length=64,
    bf16=False,
    logging_steps=5,
    save_strategy="no",
    report_to="none",
)
torch.manual_seed(0)  # the same weights on all ranks
tokenizer = bytes_tokenizer()
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), use_cache=False, **SHAPE))
rows = load_dataset("json", data_files=DATA, split="train")
hf = DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
layerwise(hf, trainer.prepare(hf.model, selector=Uniform(blocks=2, interval=5, seed=0)))
hf.train()
hf.save_model("runs/trl_dpo/model")
torch.distributed.destroy_process_group()
