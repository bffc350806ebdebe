"""Devices and dtypes of the generator's and the transformer's kernel tests."""

import torch

# Without a GPU the kernels run in the interpreter, which conftest.py switches on.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bf16 arithmetic is wrong, so bf16 is for the GPU.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
