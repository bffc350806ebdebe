"""``ear sample``: a picture of samples, or many images as files."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.config import RunConfig, SamplingConfig, check_sampling
from ear_model.processes import job_rank, job_size
from ear_model.run_dir import AVERAGES_FILE, WEIGHTS_FILE, latest_checkpoint, load_config

if TYPE_CHECKING:
    from torch import Tensor

    from ear_model.sampling.decoder import Decoder
    from ear_model.sampling.images import Sampler

MOST_IN_A_PICTURE = 4096


@dataclass(frozen=True)
class Sample:
    """Sample images of chosen classes from a trained model, into one picture or into files."""

    run: tyro.conf.Positional[Path]
    """Run directory of the trained model."""
    classes: tuple[int, ...] | None = None
    """Classes to sample; all of them if not given."""
    num: int = 64
    """Number of images, spread evenly over the classes."""
    guidance: float | None = None
    """Guidance scale; 1 is none. The run's own default if not given."""
    guidance_schedule: Literal["linear", "constant"] | None = None
    """linear or constant."""
    temperature: float | None = None
    """Below 1 trades diversity for accuracy. The run's own default if not given."""
    steps: int | None = None
    """Decoding steps. The run's own default if not given."""
    guidance_from: float | None = None
    """Share of known tokens from which guidance is applied; saves its work before (docs/sampling.md)."""
    guidance_to: float | None = None
    """Share of known tokens up to which guidance is applied."""
    diffusion_steps: int | None = None
    """Steps of the diffusion score from noise to a token. The run's if not given."""
    order: Literal["random", "halton"] | None = None
    """Order of the tokens: random, or halton for few steps (docs/sampling.md)."""
    seed: int = 0
    """The same seed gives the same images: image i depends on it and on i alone."""
    out: Path | None = None
    """Picture to write; RUN/grid.png if not given."""
    images_out: Path | None = None
    """Write a PNG of every image, DIR/<class>/<index>.png, instead of one picture; the same call goes on after an
    interruption."""
    npz: Path | None = None
    """Write all images in one .npz file, arr_0 [N, H, W, 3] and labels arr_1, with or without --images-out; the same
    call goes on after an interruption."""
    batch_size: int | Literal["auto"] = "auto"
    """Images sampled at a time; auto is what keeps the device busy and fits its memory."""
    precision: str = "auto"
    """What is computed in: auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16, or fp8 (docs/sampling.md)."""
    tokenizer: str = ""
    """Weights that decode latents, in place of the run's own."""
    raw_weights: bool = False
    """Use the last weights instead of their moving average."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


def run(arguments: list[str]) -> int:
    """The command; returns the exit status. Raises ValueError for what can't be sampled."""
    command = parse_command(Sample, arguments, "ear sample")
    is_picture = command.images_out is None and command.npz is None
    if command.out is not None and not is_picture:
        raise ValueError("--out writes one picture, --images-out and --npz many images; give one kind")
    if is_picture and command.num > MOST_IN_A_PICTURE:
        raise ValueError(
            f"num is {command.num}; a picture holds {MOST_IN_A_PICTURE} images: give --images-out or --npz"
        )
    if is_picture and job_size() > 1:
        raise ValueError(
            f"{job_size()} processes can't share one picture; give --images-out or --npz, or start one process"
        )
    if is_picture:
        _write_picture(command)
        return 0
    from ear_model.training.distributed import process_group

    # By gloo, on GPUs too: processes agree at the start, and images need no exchange.
    with process_group("cpu"):
        _write_files(command)
    return 0


@dataclass(frozen=True)
class _Prepared:
    """What is there before the first image is drawn."""

    sampler: "Sampler"
    labels: "Tensor"
    decoder: "Decoder"
    config: RunConfig
    settings: dict[str, Any]
    """All that the images depend on, as JSON gives it back."""
    said: Callable[[], str]
    """What the score has to say of the samples, in lines of its own, or nothing."""


def _prepare(command: Sample) -> _Prepared:
    """Check everything and load the model. Raises ValueError."""
    import torch

    from ear_model.data.cache_format import class_names, file_sha256
    from ear_model.devices import resolve_device
    from ear_model.draws import check_seed
    from ear_model.ear import EAR
    from ear_model.sampling.decoder import Decoder
    from ear_model.sampling.engine import compute_dtype
    from ear_model.sampling.images import Sampler, class_labels
    from ear_model.sampling.memory import automatic_batch_size

    device = resolve_device(command.device)
    config = load_config(command.run)
    if command.tokenizer:
        config = dataclasses.replace(config, tokenizer=command.tokenizer)
    chosen = {field.name: getattr(command, field.name) for field in dataclasses.fields(SamplingConfig)}
    given = {name: value for name, value in chosen.items() if value is not None}
    setting = dataclasses.replace(config.sampling, **given)
    check_sampling(config.model, setting)
    num_classes = config.model.num_classes
    classes = list(range(num_classes) if command.classes is None else command.classes)
    labels = class_labels(classes, command.num, num_classes)
    check_seed(command.seed)
    if command.batch_size != "auto" and command.batch_size < 1:
        raise ValueError(f"batch_size is {command.batch_size}; it must be at least 1, or auto")
    # Triton launches on the current device.
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    precision = command.precision
    dtype = compute_dtype(precision, torch.empty(0, device=device))
    if precision == "auto":
        precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    if precision == "fp8" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0)):
        raise ValueError("precision is 'fp8'; it needs a GPU of compute capability 9 or higher: use 'bf16' or 'auto'")
    decoder = Decoder(config, device)
    weights = latest_checkpoint(command.run) / (WEIGHTS_FILE if command.raw_weights else AVERAGES_FILE)
    settings: dict[str, Any] = {"num": command.num, "seed": command.seed, **dataclasses.asdict(setting)}
    settings |= {"classes": classes, "class_names": class_names(config), "image_size": decoder.image_size}
    settings |= {"precision": precision, "weights_sha256": file_sha256(weights)}
    settings["tokenizer_sha256"] = file_sha256(Path(config.tokenizer)) if config.tokenizer else None
    if settings["class_names"] is not None:
        settings["class_names"] = list(settings["class_names"])
    model = EAR.from_pretrained(command.run, ema=not command.raw_weights, device=device)
    if latest_checkpoint(command.run) != weights.parent:
        raise ValueError(f"{command.run} got a new checkpoint meanwhile; end its training, or copy it")
    batch_size = command.batch_size
    if batch_size == "auto":
        batch_size = automatic_batch_size(
            config.model,
            device,
            guided=setting.guidance != 1,
            itemsize=dtype.itemsize,
            decoding_bytes=decoder.bytes_per_image,
            image_size=decoder.image_size,
        )
    sampler = Sampler(model, decoder.on_device, setting, command.seed, batch_size, precision)

    def said() -> str:
        report = model.score.sampling_report()
        return f"\n{report}" if report else ""

    return _Prepared(sampler, labels, decoder, config, settings, said)


def _write_picture(command: Sample) -> None:
    import torch

    from ear_model.files import require_writable
    from ear_model.plots import save_grid

    out = command.out or command.run / "grid.png"
    load_config(command.run)
    require_writable(out)
    prepared = _prepare(command)
    images = torch.cat([images for _, images in prepared.sampler.batches(prepared.labels)])
    save_grid(images, out, columns=min(command.num, max(8, math.isqrt(command.num))))
    classes = "all" if command.classes is None else list(command.classes)
    print(f"{command.num} images of classes {classes}: {out}{prepared.said()}")


def _write_files(command: Sample) -> None:
    """Draw what is missing of the tree and of the .npz file, this process's share of it, and report."""
    from ear_model.files import DirectoryLock
    from ear_model.sampling.tree import ImageTree, npz_is_there, write_npz
    from ear_model.training.distributed import all_or_none, gather_objects

    started, rank, processes = time.perf_counter(), job_rank(), job_size()
    is_there, new = False, 0
    with all_or_none():
        prepared = _prepare(command)
        settings = prepared.settings
        parts = command.npz.with_name(f"{command.npz.name}.parts") if command.npz else None
        out = command.images_out or parts
        assert out is not None
        names, classes = settings["class_names"], prepared.config.model.num_classes
        tree = ImageTree(out, prepared.labels, names, classes, prepared.decoder.image_size)
        if rank == 0 and command.npz is not None:
            is_there = npz_is_there(command.npz, settings)
    is_there, main_settings = gather_objects((is_there, settings))[0]
    if not is_there or command.images_out is not None:
        with contextlib.ExitStack() as stack:
            with all_or_none():
                if settings != main_settings:
                    raise ValueError(f"processes read different files of {command.run}; is it being written?")
                if rank == 0:
                    notes = {"run": str(command.run), "tokenizer": prepared.config.tokenizer}
                    lock = stack.enter_context(tree.begin(settings, notes))
                    new = len(tree.missing(range(command.num)))
            with all_or_none():
                if rank > 0:
                    lock = stack.enter_context(DirectoryLock(out, shared=True))
            tree.write(prepared.sampler, rank=rank, processes=processes)
            if rank == 0 and processes > 1:
                lock.wait_for_others()
            if rank == 0:
                tree.require_whole()
                if command.npz is not None and not is_there:
                    write_npz(command.npz, tree, settings)
    if rank == 0:
        if parts is not None and command.images_out is None:
            shutil.rmtree(parts, ignore_errors=True)
        seconds = time.perf_counter() - started
        written = " and ".join(str(path) for path in (command.images_out, command.npz) if path is not None)
        line = f"{command.num} images, {new} of them new, in {seconds:.1f} s: {written}"
        print(line + (prepared.said() if processes == 1 else ""))
