"""The operations, a folder each, in one direction: functional, autograd, launch, kernels; reference is the oracle.

An operation stands on ``ear_kernels.runtime`` alone and never on another's host code, so what shares launches is one
operation: AdaLN, the SiLU network and the generator that is made of them; attention, norms and the halves of a
transformer block that are made of those. ``adamw`` has no backward: :class:`ear_kernels.FusedAdamW` launches it.
"""
