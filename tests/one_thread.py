"""Imported first by the process that test processes are forked from."""

import torch

torch.set_num_threads(1)
