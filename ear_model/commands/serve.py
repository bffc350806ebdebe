"""``ear serve``: a web page that samples from a trained model."""

import dataclasses
import importlib.util
import os
import socket
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.run_dir import load_config


@dataclass(frozen=True)
class Serve:
    """Sample from a trained model on a local web page, until Ctrl-C. Needs the extra "serve"."""

    run: tyro.conf.Positional[Path]
    """Run directory of the trained model."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but the default lets others use the page: it asks for no password."""
    port: int = 7860
    """Port to listen on; 0 takes a free one."""
    tokenizer: str = ""
    """Weights that decode latents, in place of the run's own."""
    raw_weights: bool = False
    """Use the last weights instead of their moving average."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""
    precision: str = "auto"
    """What is computed in: auto (bf16 on a GPU), fp32, bf16, or fp8 (docs/sampling.md)."""


def run(arguments: list[str]) -> int:
    """The command; returns the exit status. Raises ValueError for what can't be served."""
    command = parse_command(Serve, arguments, "ear serve")
    if importlib.util.find_spec("gradio") is None:
        raise ImportError('gradio can\'t be imported; the page needs it: pip install "ear-kernels[serve]"')
    config = load_config(command.run)
    port = free_port(command.host, command.port)
    from ear_model.data.cache_format import class_names
    from ear_model.devices import resolve_device
    from ear_model.ear import EAR
    from ear_model.sampling.decoder import Decoder
    from ear_model.sampling.live import LiveSampler
    from ear_model.sampling.page import Page

    device = resolve_device(command.device)
    if command.tokenizer:
        config = dataclasses.replace(config, tokenizer=command.tokenizer)
    decoder = Decoder(config, device)
    model = EAR.from_pretrained(command.run, ema=not command.raw_weights, device=device)
    sampler = LiveSampler(model, decoder, precision=command.precision)
    names = class_names(config)
    if names is None or len(names) != config.model.num_classes:
        names = tuple(map(str, range(config.model.num_classes)))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    title = f"## EAR\n`{command.run}`: {parameters:.1f} million parameters, {decoder.image_size} pixels, on {device}"
    with tempfile.TemporaryDirectory(prefix="ear-serve-") as folder:
        page = Page(sampler, config.sampling, names, title, Path(folder))
        try:
            print(f"{command.run}: {page.launch(command.host, port)} (Ctrl-C ends it)", flush=True)
            threading.Event().wait()
        finally:
            page.close()
    return 0


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises ValueError if nothing can listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as probe:
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        # Python appends the address to what the system says; a name that is not found has no number of the system's.
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", error)
        raise ValueError(f"can't listen on port {port} of {host}: {reason}; choose with --port and --host") from error
