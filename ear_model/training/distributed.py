"""Training on several processes: their group, what they exchange, and how a model is spread over them.

Every function works on a single process too, where it does nothing. `torchrun` starts the processes; its environment
variables (RANK, WORLD_SIZE, LOCAL_RANK) say who is who.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ear_model.errors import RunError
from ear_model.processes import job_rank, launched, local_rank

# A process that dies is noticed by torchrun within a second; this ends a job in which one hangs.
TIMEOUT = timedelta(minutes=10)


class SharedError(ValueError):
    """An error that every process raises with the same message, so that one of them reports it."""

    on_every_process = True


class LostProcessError(RunError):
    """Another process of the job died or could not be reached."""


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[None]:
    """Join the job that `torchrun` started, NCCL between GPUs and gloo between CPUs; leave it at the end.

    Args:
        device: "auto", "cpu" or "cuda": as for a single process. Each process takes the GPU of its LOCAL_RANK.

    Raises:
        ValueError: more processes than GPUs. LostProcessError: the others did not come.
    """
    if not launched() or dist.is_initialized():
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    gpu = None
    if on_gpu:
        number, gpus = local_rank(), torch.cuda.device_count()
        if number >= gpus:
            raise ValueError(
                f"process {number} of this machine has no GPU: there are {gpus}; "
                f"give torchrun --nproc_per_node={max(1, gpus)}, or --device cpu"
            )
        gpu = torch.device("cuda", number)
        torch.cuda.set_device(gpu)
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=gpu)
    except (dist.DistError, RuntimeError) as error:
        raise LostProcessError(f"the processes of this job did not find each other ({_first_line(error)})") from error
    # Not in a finally: after an error the others may be gone, and a clean goodbye would wait for them.
    with lost_process_errors():
        yield
    dist.destroy_process_group()


@contextlib.contextmanager
def lost_process_errors(hint: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Turn a failed exchange with another process into a LostProcessError of one line.

    Args:
        hint: what to say behind it, such as how to go on.
    """
    try:
        yield
    except LostProcessError:
        raise
    except RuntimeError as error:
        # gloo reports a closed connection as a bare RuntimeError that names itself.
        if world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise LostProcessError(
                f"process {rank()} lost another process of the job ({_first_line(error)}){hint()}"
            ) from error
        raise


def _first_line(error: BaseException) -> str:
    """The first line of a message, without the source position that gloo puts in front."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rsplit("] ", 1)[-1][:200]


def another_process_reports(error: BaseException) -> bool:
    """Whether another process reports this error: every one raises it, and this one is not the first."""
    if not dist.is_initialized():  # options, presets: read by all alike
        return launched() and job_rank() != 0
    return not is_main() and (isinstance(error, KeyboardInterrupt) or getattr(error, "on_every_process", False))


def prefer_expandable_segments() -> None:
    """Ask torch for memory that grows in place, unless the environment says otherwise; before CUDA is first used.

    The generator's tensors have another size in every step (docs/model.md, "Masking"), and blocks of fixed sizes fit
    none of them for long: 24.8 GB instead of 19.9 for EAR-B.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def leave_out_gemm_workspace() -> None:
    """Ask torch to give cuBLAS no workspace, unless the environment says otherwise; before CUDA is first used.

    With one, cuBLAS clears a counter in it before each of 240 products of a step of EAR-B: a launch each, which costs
    a captured step 1.4 of 80.6 ms (docs/performance.md). What torch.compile makes of a model needs it.
    """
    if not {"CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE"} & set(os.environ):
        os.environ["CUBLAS_WORKSPACE_CONFIG"], os.environ["CUBLASLT_WORKSPACE_SIZE"] = ":0:0", "0"


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What the block raises on one process, every process raises; also a barrier.

    Raises:
        SharedError: the first process's message (several processes). The error itself on a single one.
    """
    failure: Exception | None = None
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        failure = error
    if world_size() == 1:
        if failure is not None:
            raise failure
        return
    own = None if failure is None else (str(failure) or type(failure).__name__)
    messages = gather_objects(own)
    for number, message in enumerate(messages):
        if message is not None:
            only = "" if all(messages) else f"process {number}: "
            raise SharedError(only + message) from failure


class StopSign:
    """What a signal asked of any process, known to all of them at the same call; on gloo, so that no GPU waits."""

    def __init__(self) -> None:
        self._group: Any = None
        if world_size() > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def seen(self, number: int | None) -> int | None:
        """The highest signal number of all processes, None if there is none.

        Args:
            number: of this process's signal.
        """
        if world_size() == 1:
            return number
        highest = torch.tensor([number or 0])
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self._group)
        return int(highest) or None


def gather_objects(value: Any) -> list[Any]:
    """``value`` of every process, in the order of their ranks (small picklable objects)."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def mean(values: Tensor) -> Tensor:
    """The mean over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def local_device(device: torch.device) -> torch.device:
    """This process's device of that type."""
    if world_size() > 1 and device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # Triton launches on the current one
    return device


# Whole models and models in parts


def parallelise(model: nn.Module, parallel: Literal["ddp", "fsdp"], *, use_bf16: bool) -> nn.Module:
    """The module to call in training; the parameters of ``model`` stay those to optimise.

    "ddp" gives every process the whole model. "fsdp" (FSDP2) spreads parameters, gradients, moments and averages:
    one unit a backbone block, one for each part of the score, such as the generator (its kernels take the parameters
    of all its blocks at once), one for the rest. With ``use_bf16`` on a GPU blocks and the score's parts are gathered
    in bfloat16 and gradients summed in float32; embeddings and the final norm stay float32, and so does the residual
    stream.

    Args:
        model: an EAR on its device, the same values on every process.
        parallel: which of the two. On a single process the model itself is returned for both.
        use_bf16: whether the step runs under bfloat16 autocast.
    """
    if world_size() == 1:
        return model
    if parallel == "ddp":
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device_type = next(model.parameters()).device.type
    mesh = init_device_mesh(device_type, (world_size(),))
    # Inputs are not cast: the targets of the loss and the residual stream keep their float32. A CPU's autocast has no
    # layer norm of a float32 input and bfloat16 weights, a GPU's has.
    low = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if use_bf16 and device_type == "cuda" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    backbone, score = cast(Any, model).backbone, cast(Any, model).score
    for block in backbone.all_blocks():
        fully_shard(block, mesh=mesh, mp_policy=low)
    # Its backward comes first, so freeing it after the forward would save nothing.
    for part in score.children():
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh, mp_policy=low, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    return model


def accumulating(module: nn.Module, *, last: bool) -> contextlib.AbstractContextManager:
    """No exchange of gradients under DDP but for the last part of a batch.

    FSDP exchanges every part: it would have to keep whole gradients otherwise, and is chosen where these don't fit.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is spread over the processes; to be called by all of them."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_to_main(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the main process, one after another; on the others an empty dict."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if is_main():
            gathered[name] = full.cpu()
    return gathered


def spread_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """``tensor`` on the device of ``parameter`` and, if that is spread over the processes, this process's part.

    Nothing is exchanged: every process has the whole tensor. A tensor of another shape is left whole.
    """
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    return distribute_tensor(
        tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
