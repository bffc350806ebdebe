"""Files of every kind that the product reads, damaged by a seed, and opened as the commands open them.

``python -m tests.model.mutations FOLDER FIRST COUNT`` tries mutations FIRST .. FIRST + COUNT - 1 in FOLDER, each in
a forked process that may take 20 s and 4 GiB, and prints what came of them as JSON.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ear_model import cli
from ear_model.data.cache import LatentCache
from ear_model.data.npz import NpzCache
from ear_model.ear import EAR
from ear_model.errors import RunError
from ear_model.evaluation.fidelity import load_statistics
from ear_model.evaluation.judge import Judge
from ear_model.files import begin_directory
from ear_model.run_dir import load_config, read_metrics
from ear_model.sampling.tree import KIND, SAMPLING_FILE
from ear_model.tokenizers.latent import load_latent_tokenizer
from ear_model.training.checkpoint import load_checkpoint
from ear_model.training.optim import make_optimizer
from ear_model.training.public_checkpoint import import_run

FIXTURES = Path(__file__).with_name("fixtures_95433da")
SECONDS, MEMORY = 20, 4 << 30
ALLOWED = (ValueError, RunError, TypeError)
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 7.5, 1e308, 10**18, 10**30, -(2**63), "", "x", "ab\0c", "../x", "\ud800", [], {},
    [1, 2], [[[]]], {"a": 1}, "NaN",
]  # fmt: skip
CHECKPOINT = "checkpoints/step_00000003"


@dataclass(frozen=True)
class FileKind:
    """A file, how it is opened, and whether a checksum shows every bit of it that is changed."""

    file: str
    read: Callable[[Path], Any]
    has_checksum: bool = False
    command: tuple[str, ...] = ()
    """Arguments of ``ear`` that read it too, in the folder."""


def _trained(folder: Path) -> Any:
    saved = load_checkpoint(folder / "digits")
    model = EAR(saved.config)
    model.load_state_dict(saved.weights)
    optimizer = make_optimizer(model, load_config(folder / "digits").train)
    optimizer.load_state_dict(saved.trainer_state["optimizer"])
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"weights": saved.weights, "averages": saved.averages, "after": model.state_dict()}


def _converted(folder: Path) -> Any:
    out = folder / "converted"
    shutil.rmtree(out, ignore_errors=True)
    import_run(folder / "public.pth", out)
    saved = load_checkpoint(out)  # what was taken must be readable
    return {"weights": saved.weights, "averages": saved.averages, "config": load_config(out)}


def _cached(folder: Path) -> Any:
    cache = LatentCache(folder / "cache")
    return cache.gather(torch.arange(len(cache)), torch.Generator().manual_seed(0))


def _npz(folder: Path) -> Any:
    cache = NpzCache(folder / "npz")
    return cache.gather(torch.arange(len(cache)), torch.Generator().manual_seed(0))


def _judge(folder: Path) -> Any:
    judge = Judge.load(folder / "judge.safetensors")
    return (
        judge.model.state_dict(),
        judge.class_names,
        judge.classify(torch.zeros(1, 3, *2 * [judge.image_size]).byte()),
    )


def _tokenizer(folder: Path, name: str = "tokenizer.safetensors") -> Any:
    tokenizer = load_latent_tokenizer(folder / name)
    return tokenizer.autoencoder.state_dict(), tokenizer.latent_scale


def _samples(folder: Path) -> Any:
    settings = json.loads((FIXTURES / "samples" / SAMPLING_FILE).read_text())
    begin_directory(folder / "samples", SAMPLING_FILE, settings, KIND)


_SAMPLE = ("sample", "digits", "--classes", "3", "--num", "1", "--steps", "1", "--device", "cpu")
KINDS = [
    FileKind("digits/config.json", lambda folder: load_config(folder / "digits"), command=_SAMPLE),
    FileKind(f"digits/{CHECKPOINT}/ema.safetensors",
             lambda folder: EAR.from_pretrained(folder / "digits").state_dict(), command=_SAMPLE),
    FileKind(f"digits/{CHECKPOINT}/model.safetensors", _trained),
    FileKind(f"digits/{CHECKPOINT}/trainer.pt", _trained, True,
             ("convert", "digits", "--out", "exported.pth", "--epoch", "0")),
    FileKind("digits/metrics.jsonl", lambda folder: read_metrics(folder / "digits")),
    FileKind("public.pth", _converted, True, ("convert", "public.pth", "--out", "converted-too")),
    FileKind("cache/manifest.json", _cached),
    FileKind("cache/shard-00001.safetensors", _cached, True),
    FileKind("cache/verified.json", _cached),
    FileKind("npz/a/0.npz", _npz, True),
    FileKind("statistics.npz", lambda folder: load_statistics(folder / "statistics.npz"), True),
    FileKind("tokenizer.safetensors", _tokenizer),
    FileKind("tokenizer.ckpt", lambda folder: _tokenizer(folder, "tokenizer.ckpt"), True),
    FileKind("judge.safetensors", _judge),
    FileKind("samples/sampling.json", _samples),
]  # fmt: skip


def make_folder(folder: Path) -> None:
    """Whole files of every kind."""
    shutil.copytree(FIXTURES, folder, dirs_exist_ok=True)
    lines = [{"step": step, "loss": 1.5 / step, "lr": 1e-3} for step in (1, 2, 3)]
    (folder / "digits" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    generator = np.random.default_rng(0)
    (folder / "npz" / "a").mkdir(parents=True)
    for index in range(2):
        moments = {key: generator.normal(size=(4, 2, 2)).astype(np.float32) for key in ("moments", "moments_flip")}
        np.savez(folder / "npz" / "a" / f"{index}.npz", **moments)
    np.savez(folder / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    from ear_model.tokenizers.config import AutoencoderConfig
    from ear_model.tokenizers.kl16 import AutoencoderKL

    small = AutoencoderKL(AutoencoderConfig(channels=32, multipliers=(1, 1), residual_blocks=1, latent_channels=2))
    torch.save({"state_dict": small.state_dict()}, folder / "tokenizer.ckpt")
    (folder / "config.json").write_text('{"scaling_factor": 0.5}')
    LatentCache(folder / "cache")  # writes verified.json


# Mutations: what takes the bytes of a file and a random generator, and gives other bytes.


def damage_bytes(content: bytes, draws: random.Random, folder: Path) -> bytes:
    """Flipped bits, truncation, inserted, overwritten or repeated parts, another file of the product, nothing."""
    data, size = bytearray(content), len(content)
    place, length = draws.randrange(size), draws.choice([1, 8, 64, 4096])
    match draws.randrange(9):
        case 0 | 1 | 2:
            for _ in range(draws.choice([1, 1, 3, 30])):
                data[draws.randrange(size)] ^= 1 << draws.randrange(8)
        case 3:
            del data[place:]
        case 4:
            data[place:place] = draws.randbytes(length)
        case 5:
            data[place : place + length] = bytes(min(length, size - place))
        case 6:
            data = data + data[place : place + length]
        case 7:
            return (folder / draws.choice(KINDS).file).read_bytes()
        case 8:
            return draws.choice([b"", draws.randbytes(length), b"[" * 100_000, b'{"a":' * 100_000, b"\xff" * length])
    return bytes(data)


def _change(tree: Any, draws: random.Random, values: list[Any]) -> Any:
    """A copy of nested dicts and lists with one entry replaced, removed or added somewhere."""
    if isinstance(tree, argparse.Namespace):
        changed = _change(vars(tree), draws, values)
        return argparse.Namespace(**{str(key): changed[key] for key in changed}) if type(changed) is dict else changed
    if not isinstance(tree, (dict, list, tuple)) or not tree or draws.random() < 0.05:
        if isinstance(tree, torch.Tensor) and draws.random() < 0.7:
            return _changed_tensor(tree, draws)
        return draws.choice(values)
    pairs = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree))
    index = draws.randrange(len(pairs))
    kind = draws.random()
    if kind < 0.1:
        del pairs[index]
    elif kind < 0.2:
        pairs.append((draws.choice(["x", "format", "params"]), draws.choice(values)))
    else:
        key, value = pairs[index]
        pairs[index] = (key, _change(value, draws, values))
    if isinstance(tree, dict):
        return dict(pairs)
    return type(tree)(value for _, value in pairs)


def _changed_tensor(tensor: torch.Tensor, draws: random.Random) -> torch.Tensor:
    changed = tensor.clone()
    match draws.randrange(8):
        case 0 if changed.numel() and changed.is_floating_point():
            changed.view(-1)[draws.randrange(changed.numel())] = draws.choice([float("nan"), float("inf")])
        case 1:
            return torch.cat([changed.view(-1), changed.view(-1)[:1]])
        case 2:
            return changed.to(draws.choice([torch.int8, torch.complex64, torch.float16, torch.float64, torch.bool]))
        case 3:
            return changed.unsqueeze(0)
        case 4:
            return changed.view(-1)[:-1].clone()
        case 5:
            return torch.zeros(1).expand(10**9)
        case 6:
            return changed.to_sparse()
        case _:
            return torch.empty(0)
    return changed


def damage_values(file: Path, content: bytes, draws: random.Random) -> bytes:
    """A well-formed file of the same format with other values in it."""
    values = [*VALUES, float("nan"), float("-inf")]
    if file.suffix in (".pth", ".pt", ".ckpt"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(io.BytesIO(content), weights_only=True)
        written = io.BytesIO()
        tensors = [torch.zeros(3), torch.zeros(2, dtype=torch.uint8), torch.tensor(float("nan"))]
        torch.save(_change(stored, draws, [*values, *tensors]), written)
        return written.getvalue()
    if file.suffix == ".npz":
        with np.load(io.BytesIO(content)) as arrays:
            stored = dict(arrays)
        name = draws.choice(list(stored))
        others = [stored[name].astype(kind) for kind in ("i1", "c8", "f2", "U3", "O")]
        stored[name] = draws.choice([*others, stored[name][..., :1], stored[name] * np.nan, np.zeros((0, 3)), 3.0])
        written = io.BytesIO()
        np.savez_compressed(written, **stored)
        return written.getvalue()
    if file.suffix == ".safetensors":
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        said = header.get("__metadata__", {})
        key = draws.choice([*said, ""])
        if key and draws.random() < 0.8:
            try:
                said[key] = json.dumps(_change(json.loads(said[key]), draws, values))
            except ValueError:
                said[key] = str(draws.choice(values))
        else:
            header = _change(header, draws, values)
        text = json.dumps(header).encode()
        size = draws.choice([len(text)] * 5 + [0, 2**63, len(text) - 1])
        return struct.pack("<Q", size) + text + content[8 + length :]
    text = content.decode()
    lines = text.splitlines() if file.suffix == ".jsonl" else [text]
    index = draws.randrange(len(lines))
    lines[index] = json.dumps(_change(json.loads(lines[index]), draws, values))
    if draws.random() < 0.1:
        lines[index] = lines[index].replace("{", '{"seed": 1, "seed": 2, "step": 1, "step": 1, ', 1)
    return "\n".join(lines).encode()


def mutation(number: int, folder: Path) -> tuple[FileKind, bytes, bool]:
    """Kind, damaged bytes and whether they are damaged as bytes, of mutation ``number``."""
    draws = random.Random(number)
    kind = KINDS[number % len(KINDS)]
    content = (folder / kind.file).read_bytes()
    is_raw = draws.random() < 0.4
    if is_raw:
        return kind, damage_bytes(content, draws, folder), True
    return kind, damage_values(Path(kind.file), content, draws), False


def same(a: Any, b: Any) -> bool:
    """Equality of nested values and tensors."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def is_sound(value: Any) -> bool:
    """Whether all tensors in nested values are finite."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, (list, tuple)):
        return all(map(is_sound, value))
    return all(map(is_sound, value.values())) if isinstance(value, dict) else True


def attempt(number: int, folder: Path, expected: Any, *, by_command: bool = False) -> str:
    """What mutation ``number`` of the files in ``folder`` leads to; the file is whole again afterwards.

    Returns:
        "refused" (one line that names the file), "same" (result), "changed" (another sound result: values were
        changed that no checksum guards), or a text that begins with "FAULT".
    """
    kind, damaged, is_raw = mutation(number, folder)
    path = folder / kind.file
    whole = path.read_bytes()
    path.write_bytes(damaged)
    try:
        if by_command and kind.command:
            return _by_command(kind, folder)
        try:
            found = kind.read(folder)
        except ALLOWED as error:
            message = " ".join(str(error).split())
            named = kind.file.rsplit("/", 1)[-1] in message or path.parent.name in message
            return "refused" if named and len(message) < 1000 else f"FAULT {type(error).__name__}: {message[:300]}"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f"FAULT {type(error).__name__} at {last.filename}:{last.lineno}: {str(error)[:300]}"
        if same(found, expected):
            return "same"
        if is_raw and kind.has_checksum:
            return "FAULT damaged bytes were taken"
        return "changed" if is_sound(found) else "FAULT values that are not finite"
    finally:
        path.write_bytes(whole)


def _by_command(kind: FileKind, folder: Path) -> str:
    output, errors = io.StringIO(), io.StringIO()
    os.chdir(folder)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        status = cli.main(list(kind.command))
    for left in ("exported.pth", "converted-too"):
        (shutil.rmtree if (folder / left).is_dir() else Path.unlink)(folder / left, True)
    lines = errors.getvalue().strip().splitlines()
    if status == 0:
        return "changed"
    good = status == 1 and len(lines) == 1 and len(lines[0]) < 1200
    return "refused" if good else f"FAULT status {status}: {errors.getvalue()[-300:]}"


def attempt_forked(number: int, folder: Path, expected: Any, *, by_command: bool) -> str:
    """:func:`attempt` in a process of its own, which may crash, hang or ask for too much memory."""
    reading, writing = os.pipe()
    whole = (folder / KINDS[number % len(KINDS)].file).read_bytes()
    if (child := os.fork()) == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        try:
            outcome = attempt(number, folder, expected, by_command=by_command)
        except BaseException as error:
            outcome = f"FAULT {type(error).__name__}: {str(error)[:300]}"
        finally:
            os.write(writing, outcome.encode("utf-8", "replace")[:2000])
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        outcome = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    (folder / KINDS[number % len(KINDS)].file).write_bytes(whole)
    if status:
        return f"FAULT signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"FAULT exit {status}"
    return outcome


def baseline(folder: Path) -> list[Any]:
    """What the whole files hold, by kind."""
    return [kind.read(folder) for kind in KINDS]


def main(folder: Path, first: int, count: int) -> None:
    """See the top of this file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # before anything starts threads, which a forked process would wait for
    make_folder(folder)
    expected = baseline(folder)
    counts: dict[str, Counter] = {kind.file: Counter() for kind in KINDS}
    faults = []
    for number in range(first, first + count):
        index = number % len(KINDS)
        outcome = attempt_forked(number, folder, expected[index], by_command=number // len(KINDS) % 4 == 3)
        counts[KINDS[index].file][outcome.split()[0]] += 1
        if outcome.startswith("FAULT"):
            faults.append(f"{number} {KINDS[index].file}: {outcome}")
    print(json.dumps({"counts": counts, "faults": faults}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
