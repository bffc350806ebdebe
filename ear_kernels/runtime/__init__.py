"""What every operation stands on: backend, checks, launching, autograd guards, GEMMs, copies of weights, the gate."""
