"""What only GPUs show: streams, page-locked memory, fp16, fused Adam. One rank on each, two at most."""

import torch

RANKS = min(2, torch.cuda.device_count())
