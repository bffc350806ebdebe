"""Where tensors are put."""

import torch

from ear_model.processes import launched, local_rank


def resolve_device(name: str) -> torch.device:
    """ "auto" (a GPU if there is one), or a device by name; of several GPUs each process of a job has its own.

    Raises:
        ValueError: a device that is unknown or not here.
    """
    found = torch.cuda.is_available()
    if name == "auto":
        name = "cuda" if found else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type == "cuda" and not found:
        raise ValueError(f"device {name!r} was asked for, but torch finds no CUDA GPU here; use auto or cpu")
    if device == torch.device("cuda") and launched():
        device = torch.device("cuda", local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no {device}: this machine has {torch.cuda.device_count()} GPUs")
    return device
