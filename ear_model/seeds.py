"""Seeds of random generators."""

import numpy as np


def mixed_seed(*numbers: int) -> int:
    """One seed of 32 bits from several numbers; torch's CPU generator reads no more of it."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
