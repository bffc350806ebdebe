"""Images while they form: previews, a notebook's output, and sampling that can be left."""

import base64
import io
import re
import threading
import time

import pytest
import torch
from PIL import Image

from ear_model.config import SamplingConfig
from ear_model.draws import ImageDraws
from ear_model.errors import RunError
from ear_model.sampling.live import LiveSampler, StoppedError
from ear_model.sampling.page import parse_seed, real, whole
from ear_model.sampling.preview import Preview, grid_columns, grid_png, notebook_preview

SETTING = SamplingConfig(16, 2.0)


def identity(images):
    return images


def sample(model, **options):
    return model.sample(torch.tensor([3, 7, 3]), steps=16, guidance=2.0, draws=ImageDraws(5, range(3)), **options)


@pytest.mark.parametrize(("every", "seen"), [(1, range(1, 17)), (5, (5, 10, 15, 16)), (8, (8, 16)), (99, (16,))])
def test_images_are_shown_every_few_steps_and_last(tiny_model, every, seen):
    shown = []
    preview = Preview(lambda *view: shown.append(view), every=every)
    images = sample(tiny_model, progress=preview)
    assert [view[:2] for view in shown] == [(done, 16) for done in seen]
    assert torch.equal(shown[-1][2], images)
    assert torch.equal(images, sample(tiny_model))
    # As far as known, and later steps don't write into what was shown.
    known = [int((view[2] != 0).sum()) for view in shown]
    assert known == sorted(set(known))


def test_unknown_tokens_are_zero_and_known_ones_final(tiny_model):
    shown = []
    images = sample(tiny_model, progress=Preview(lambda *view: shown.append(view[2]), every=4))
    for early in shown:
        assert bool(((early == 0) | (early == images)).all())
    assert bool((shown[0] == 0).any())


def test_a_preview_is_decoded_in_full_precision(tiny_model):
    shown = []

    def decoder(output):
        assert not torch.is_autocast_enabled("cpu")
        assert output.dtype == torch.float32
        return output.repeat_interleave(2, 2)

    sample(tiny_model, precision="bf16", progress=Preview(lambda *view: shown.append(view[2]), decoder))
    assert shown[0].shape == (3, 1, 16, 8)


def test_the_time_of_showing_is_told(tiny_model):
    preview = Preview(lambda *view: time.sleep(0.05), every=8)
    for _ in range(2):
        sample(tiny_model, progress=preview)
        assert 0.1 <= preview.seconds < 1


def test_what_a_viewer_raises_ends_the_sampling(tiny_model):
    def refuse(*view):
        raise RunError("enough")

    with pytest.raises(RunError, match="enough"):
        sample(tiny_model, progress=Preview(refuse, every=1))
    with pytest.raises(ValueError, match="every is 0; it must be at least 1"):
        Preview(refuse, every=0)


def test_a_grid_is_about_square_and_large():
    assert [grid_columns(count) for count in (1, 2, 4, 5, 9, 10, 49, 50, 64, 1000)] == [1, 2, 2, 3, 3, 4, 7, 8, 8, 8]
    for count in (1, 6, 64):
        width, height = Image.open(io.BytesIO(grid_png(torch.zeros(count, 1, 8, 8)))).size
        assert 900 < max(width, height) <= 1300


def test_a_notebook_shows_one_output_that_changes(tiny_model):
    capture = pytest.importorskip("IPython.utils.capture")
    shell = pytest.importorskip("IPython.core.interactiveshell")
    shell.InteractiveShell.instance()
    progress = notebook_preview(every=4)
    for _ in range(2):
        with capture.capture_output() as captured:
            images = sample(tiny_model, progress=progress)
        outputs = captured.outputs
        assert len(outputs) == 1 + 4
        assert [output.update for output in outputs] == [False, True, True, True, True]
        assert len({output.transient["display_id"] for output in outputs}) == 1
        pages = [output.data["text/html"] for output in outputs]
        assert "8 of 16 steps" in pages[2]
        assert re.search(r"16 of 16 steps, \d+ ms, [\d.]+ ms an image", pages[-1])
        picture = base64.b64decode(re.search(r"base64,([^\"]+)", pages[-1])[1])
        assert picture == grid_png(images)
        assert len(set(pages)) == 5
    shell.InteractiveShell.clear_instance()


def test_without_ipython_the_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "IPython.display", None)
    with pytest.raises(ImportError, match="pip install ipython"):
        notebook_preview()


class Slow:
    """A model whose steps wait for the test."""

    def __init__(self, model):
        self.model, self.config, self.backbone = model, model.config, model.backbone
        self.score, self.tokenizer, self.parameters = model.score, model.tokenizer, model.parameters
        self.made, self.inside, self.turn = 0, 0, threading.Semaphore(0)

    def sample(self, *arguments, progress, **options):
        self.inside += 1
        assert self.inside == 1

        def slowly(steps):
            for step in progress(steps):
                assert self.turn.acquire(timeout=60)
                self.made += 1
                yield step

        try:
            return self.model.sample(*arguments, progress=slowly, **options)
        finally:
            self.inside -= 1


def test_live_images_are_those_of_the_model(tiny_model):
    slow = Slow(tiny_model)
    sampler = LiveSampler(slow, identity)
    drawing = sampler.draw(torch.tensor([3, 7, 3]), SETTING, 5, every=4)
    assert next(drawing).images is None  # a sign of life before the first step
    slow.turn.release(6)
    views = [next(drawing)]
    while views[-1].done < 5:
        views.append(next(drawing))
    assert any(view.images is not None and view.done == 4 for view in views)
    slow.turn.release(10)
    last = list(drawing)[-1]
    assert (last.done, last.steps) == (16, 16)
    assert last.seconds > 0
    assert torch.equal(last.images, sample(tiny_model, temperature=SETTING.temperature))
    sampler.close()


def test_leaving_ends_the_sampling_at_the_next_step_and_the_next_one_begins(tiny_model):
    slow = Slow(tiny_model)
    sampler = LiveSampler(slow, identity)
    first, second, third = (sampler.draw(torch.tensor([1]), SETTING, seed) for seed in range(3))
    next(first)
    assert next(second).steps == 0  # it waits
    next(third)
    third.close()  # before it began
    first.close()
    slow.turn.release(1)
    while next(second).steps == 0:
        pass
    assert slow.made == 1
    slow.turn.release(99)
    assert torch.isfinite(list(second)[-1].images).all()
    assert slow.made == 17
    sampler.close()


def test_closing_ends_those_that_run_and_those_that_wait(tiny_model):
    slow = Slow(tiny_model)
    sampler = LiveSampler(slow, identity)
    running, waiting = (sampler.draw(torch.tensor([1]), SETTING, seed) for seed in range(2))
    next(running)
    next(waiting)
    closing = threading.Thread(target=sampler.close)
    closing.start()
    slow.turn.release(1)
    for drawing in (running, waiting):
        with pytest.raises(StoppedError, match="stopping"):
            list(drawing)
    closing.join(60)
    assert slow.made == 1


def test_bad_requests_are_refused_before_any_work(tiny_model):
    sampler = LiveSampler(tiny_model, identity)
    with pytest.raises(ValueError, match="seed is -1"):
        next(sampler.draw(torch.tensor([1]), SETTING, -1))
    with pytest.raises(ValueError, match="every is 0"):
        next(sampler.draw(torch.tensor([1]), SETTING, 1, every=0))
    with pytest.raises(ValueError, match="label 10 is out of range"):
        list(sampler.draw(torch.tensor([10]), SETTING, 1))
    sampler.close()
    with pytest.raises(ValueError, match="precision is 'fp7'"):
        LiveSampler(tiny_model, identity, precision="fp7")


def test_what_a_browser_sends_is_checked():
    assert parse_seed(f" {10**900} ") == 10**900
    for text in ("", "x", "1.5", "1_0", "9" * 2000, "1\n2", "-3"):
        with pytest.raises(ValueError, match="seed is"):
            parse_seed(text)
    assert (whole("steps", 4.0), whole("steps", 4), real("guidance", 0.5)) == (4, 4, 0.5)
    for value in (None, 1.5, float("nan"), float("inf"), "4", True):
        with pytest.raises(ValueError, match="steps is"):
            whole("steps", value)
