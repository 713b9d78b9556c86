"""Its place makes ``helpers`` and ``tiny`` importable from every test."""

import torch

# Tiny tensors on two threads only wait for one another.
torch.set_num_threads(1)
