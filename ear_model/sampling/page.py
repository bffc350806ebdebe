"""The web page of ``ear serve``: choose classes and settings, watch the images form, take them along."""

import io
import os
import re
import secrets
import tempfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_model.config import SamplingConfig
from ear_model.draws import check_seed
from ear_model.errors import RunError
from ear_model.plots import grid_picture, png_bytes, to_bytes
from ear_model.sampling.images import class_labels
from ear_model.sampling.live import LiveSampler, View
from ear_model.sampling.preview import PICTURE_WIDTH, grid_columns, grid_png

MAX_IMAGES = 64


class Page:
    """A gradio page of a sampler.

    Args:
        sampler: what draws.
        setting: what the page shows at first.
        names: of the classes.
        title: the page's heading, Markdown.
        folder: where files for the browser are put; gradio's own ones too.
    """

    def __init__(
        self, sampler: LiveSampler, setting: SamplingConfig, names: Sequence[str], title: str, folder: Path
    ) -> None:
        # Read by gradio when it is imported and when a page is made.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(folder / "gradio"))
        import gradio

        self.gradio = gradio
        self.sampler, self.names, self.folder = sampler, tuple(names), folder
        self._drawing: dict[str, threading.Event] = {}
        # Files that the browser was given are deleted when they are an hour old, looked at every ten minutes.
        with gradio.Blocks(title="EAR", analytics_enabled=False, delete_cache=(600, 3600)) as self.blocks:
            gradio.Markdown(title)
            with gradio.Row():
                with gradio.Column(scale=1, min_width=320):
                    inputs = self._inputs(setting)
                    with gradio.Row():
                        button = gradio.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                        stop = gradio.Button("Stop", elem_id="stop", min_width=100)
                with gradio.Column(scale=2, min_width=320):
                    self.status = gradio.Markdown("", elem_id="status")
                    self.picture = gradio.Image(
                        show_label=False, format="png", type="filepath", interactive=False, elem_id="picture",
                        buttons=["fullscreen"],
                    )  # fmt: skip
                    with gradio.Row():
                        self.grid = gradio.DownloadButton("Grid (PNG)", interactive=False, elem_id="grid")
                        self.zip = gradio.DownloadButton("Images (zip)", interactive=False, elem_id="zip")
            outputs = [self.status, self.picture, self.seed, self.grid, self.zip]
            # gradio's own way to cancel an event lets its last words come after "Stopped.", an error among them.
            visit = gradio.State(secrets.token_hex)
            gradio.on(
                [button.click, self.seed.submit],
                self.draw,
                [*inputs, visit],
                outputs,
                show_progress="hidden",
                # The sampler has them wait for one another, and says so.
                concurrency_limit=16,
                api_name="draw",
            )
            stop.click(self.stop, visit, None, show_progress="hidden", api_visibility="private")

    def _inputs(self, setting: SamplingConfig) -> list[Any]:
        """The components in the order of :meth:`draw`'s arguments."""
        gradio = self.gradio
        self.seed = gradio.Textbox(
            "0", label="Seed", info="any integer from 0 on", max_lines=1, elem_id="seed", render=False
        )
        return [
            gradio.Dropdown(
                [(name, index) for index, name in enumerate(self.names)],
                value=[],
                multiselect=True,
                label="Classes",
                info="in equal parts; all if none is chosen",
                elem_id="classes",
            ),
            gradio.Slider(1, MAX_IMAGES, min(16, MAX_IMAGES), step=1, label="Number of images", elem_id="number"),
            gradio.Slider(
                0, max(10, setting.guidance), setting.guidance, label="Guidance", info="1 is none", step=0.1
            ),
            gradio.Radio(["linear", "constant"], value=setting.guidance_schedule, label="Guidance schedule"),
            gradio.Slider(0, max(2, setting.temperature), setting.temperature, label="Temperature", step=0.05),
            gradio.Slider(1, max(256, setting.steps), setting.steps, step=1, label="Steps", elem_id="steps"),
            gradio.Slider(1, 64, 8, step=1, label="Show every ... steps", elem_id="every"),
            self.seed.render(),
            gradio.Checkbox(label="A new seed each time", elem_id="anew"),
        ]

    def draw(
        self,
        classes: list[int],
        num: float,
        guidance: float,
        guidance_schedule: str,
        temperature: float,
        steps: float,
        every: float,
        seed: str,
        anew: bool,
        visit: str,
    ) -> Iterator[dict[Any, Any]]:
        """What the page shows, again and again while the images form. What can't be done is a message on it."""
        gradio = self.gradio
        try:
            number = secrets.randbelow(2**32) if anew else parse_seed(seed)
            count = whole("number of images", num)
            if count > MAX_IMAGES:
                raise ValueError(f"number of images is {count}; it must be in 1..{MAX_IMAGES}")
            chosen = [whole("class", label) for label in classes] or range(len(self.names))
            labels = class_labels(chosen, count, len(self.names))
            setting = SamplingConfig(
                whole("steps", steps),
                real("guidance", guidance),
                guidance_schedule,  # type: ignore[arg-type]
                real("temperature", temperature),
            )
            views = self.sampler.draw(labels, setting, number, every=whole("every", every))
            stopped = self._drawing[visit] = threading.Event()
            none = gradio.DownloadButton(value=None, interactive=False)
            yield {self.seed: str(number), self.grid: none, self.zip: none, self.status: "..."}
            for view in views:
                if stopped.is_set():
                    views.close()
                    yield {self.status: "Stopped."}
                    return
                if view.seconds is not None and view.images is not None:
                    with tempfile.TemporaryDirectory(dir=self.folder) as directory:
                        # The files are copied for the browser before the loop goes on.
                        yield self._last(view, view.images, Path(directory), labels, number)
                elif view.images is not None:
                    columns = grid_columns(count)
                    shown = grid_picture(view.images, columns, min_tile=PICTURE_WIDTH // columns)
                    yield {self.status: words(view), self.picture: shown}
                else:
                    yield {self.status: words(view)}
        except (ValueError, TypeError, OSError, RunError, torch.OutOfMemoryError) as error:
            raise gradio.Error(str(error), duration=60, print_exception=False) from None
        finally:
            self._drawing.pop(visit, None)

    def stop(self, visit: str) -> None:
        """End what this visitor's page draws, at its next view."""
        if visit in self._drawing:
            self._drawing[visit].set()

    def _last(self, view: View, images: Tensor, directory: Path, labels: Tensor, seed: int) -> dict[Any, Any]:
        name = f"seed{str(seed)[:20]}"
        grid, bundle = directory / f"{name}.png", directory / f"{name}.zip"
        grid.write_bytes(grid_png(images))
        bundle.write_bytes(zipped(images, [self.names[label] for label in labels.tolist()]))
        button = self.gradio.DownloadButton
        return {
            self.status: words(view),
            self.picture: str(grid),
            self.grid: button(value=str(grid), interactive=True),
            self.zip: button(value=str(bundle), interactive=True),
        }

    def launch(self, host: str, port: int) -> str:
        """Serve in a thread; returns the address. Nothing is fetched from another host, by the page either."""
        gradio = self.gradio
        fonts = [gradio.themes.Font(name) for name in ("system-ui", "sans-serif")]
        fixed = [gradio.themes.Font(name) for name in ("ui-monospace", "monospace")]
        _, address, _ = self.blocks.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=True,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            theme=gradio.themes.Default(font=fonts, font_mono=fixed),
        )
        return address

    def close(self) -> None:
        """End the samplings and the server."""
        self.sampler.close()
        self.blocks.close(verbose=False)


def words(view: View) -> str:
    """The line above the picture."""
    if view.seconds is not None and view.images is not None:
        ms, count = 1000 * view.seconds, len(view.images)
        return f"{count} images in **{ms:,.0f} ms**, {ms / count:,.1f} ms an image, {view.steps} steps"
    return f"step {view.done} of {view.steps}" if view.steps else "waiting for the model"


def zipped(images: Tensor, names: Sequence[str]) -> bytes:
    """A zip file of a PNG of each image ``[N, 1 or 3, H, W]`` in -1..1, ``<number>_<name>.png``."""
    from PIL import Image

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for number, (levels, name) in enumerate(zip(to_bytes(images), names, strict=True)):
            picture = Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())
            bundle.writestr(f"{number:02d}_{name}.png", png_bytes(picture))
    return buffer.getvalue()


def parse_seed(text: str) -> int:
    """A seed from text, of any size. Raises ValueError for anything else."""
    if not re.fullmatch(r"\s*-?[0-9]{1,1000}\s*", text):
        raise ValueError(f"seed is {text.strip()[:40]!r}; it must be an integer from 0 on")
    check_seed(int(text))
    return int(text)


def whole(name: str, value: Any) -> int:
    """An integer that the browser sent. Raises ValueError for anything else."""
    number = real(name, value)
    if not number.is_integer():
        raise ValueError(f"{name} is {value}; it must be an integer")
    return int(number)


def real(name: str, value: Any) -> float:
    """A number that the browser sent; a field that was emptied sends none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    return float(value)
