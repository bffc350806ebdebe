"""One folder an operation: ``reference.py`` holds the maths in plain PyTorch.

They live under ``ops`` because ``ear_kernels.energy_loss`` is the public function of that name.
"""
