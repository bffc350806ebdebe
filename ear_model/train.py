"""Training from the command line.

python -m ear_model.train PRESET ...                         the same as `ear train PRESET ...`
torchrun --nproc_per_node=N -m ear_model.train PRESET ...    on N processes, a GPU each (docs/distributed.md)
"""

import sys

from ear_model import cli
from ear_model.processes import end_process

if __name__ == "__main__":
    end_process(cli.main(["train", *sys.argv[1:]]))
