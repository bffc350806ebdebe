"""The page of ``ear serve`` in a real browser, from a real process."""

import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import pytest
from PIL import Image

from ear_model import cli
from ear_model.config import SamplingConfig
from ear_model.ear import EAR
from ear_model.plots import to_bytes
from ear_model.presets import DIGITS
from ear_model.run_dir import save_config
from ear_model.sampling.images import class_labels, sample_images
from ear_model.sampling.preview import grid_png
from ear_model.training import checkpoint
from tests.model.conftest import randomise, tiny_run

SECONDS = 90
"""How long anything may take on a busy machine."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of random weights that takes long enough for a step to be seen."""
    path = tmp_path_factory.mktemp("serve") / "run"
    path.mkdir()
    config = replace(DIGITS, depth=8, patch_size=1)
    model = randomise(EAR(config))
    # Some weights make white or black images only, whatever the seed.
    while (sample_images(model, class_labels([3, 7], 4, 10), seed=1, steps=8).abs() < 0.9).float().mean() < 0.5:
        model = randomise(model)
    save_config(path, replace(tiny_run(), model=config))
    checkpoint.save_checkpoint(path, 1, model, dict(model.named_parameters()), {})
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """The address of ``ear serve``; ended by what Ctrl-C sends, which must leave nothing behind."""
    folder, port = tmp_path_factory.mktemp("temporary"), free_port()
    command = [sys.executable, "-m", "ear_model.cli", "serve", str(run), "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell's background job ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/" in line, line + process.stderr.read()
        assert list(folder.glob("ear-serve-*"))
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=SECONDS)
        assert (process.returncode, output) == (130, "")
        assert errors.endswith("ear: interrupted; the page is closed\n")
        assert "Traceback" not in errors
        assert not list(folder.glob("ear-serve-*"))
    finally:
        process.kill()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        reason = f"{' and '.join(missing)} not found; apt-get install chromium chromium-driver"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000"):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.downloads = downloads
    yield driver
    driver.quit()


SEED = "#seed textarea, #seed input"
WATCH = """
window.shown = [];
window.said = [];
new MutationObserver(() => {
  const text = document.querySelector('#status').innerText;
  if (window.said.at(-1) !== text) window.said.push(text);
  const image = document.querySelector('#picture img');
  if (image && window.shown.at(-1) !== image.src) window.shown.push(image.src);
}).observe(document.body, {subtree: true, childList: true, attributes: true});
"""
BYTES = """
const done = arguments[arguments.length - 1];
fetch(arguments[0]).then(answer => answer.blob()).then(blob => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(',')[1]);
  reader.readAsDataURL(blob);
});
"""


class Page:
    """What a user does and sees."""

    def __init__(self, driver, address):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        redrawn = [StaleElementReferenceException]
        self.driver, self.waiting = driver, WebDriverWait(driver, SECONDS, 0.1, redrawn)
        driver.get(address)
        self.until(lambda: self.all("#draw"))
        driver.execute_script(WATCH)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def until(self, condition):
        from selenium.common.exceptions import TimeoutException

        try:
            self.waiting.until(lambda driver: condition())
        except TimeoutException:
            pytest.fail(f"not within {SECONDS} s; the status was {self.said()}")

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def type(self, selector, text):
        from selenium.webdriver.common.keys import Keys

        field = self.find(selector)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(str(text), Keys.TAB)

    def choose(self, *names):
        from selenium.webdriver.common.keys import Keys

        for name in names:
            self.find("#classes input").send_keys(name, Keys.ENTER)
        self.find("#classes input").send_keys(Keys.ESCAPE)

    def status(self):
        return self.find("#status").text

    def said(self):
        """What the status was, the oldest first."""
        return self.driver.execute_script("return window.said")

    def steps_done(self):
        return int(self.status().split()[1])

    def draw(self):
        """Press the button; the final picture's bytes, and the addresses of all that were shown."""
        self.driver.execute_script("window.shown = []; window.said = [arguments[0]]", self.status())
        self.find("#draw").click()
        self.until(lambda: "images in" in self.said()[-1] and not all("images in" in text for text in self.said()))
        name = f"/seed{self.find(SEED).get_attribute('value')[:20]}.png"
        self.until(lambda: self.find("#picture img").get_attribute("src").endswith(name))
        return self.bytes(self.find("#picture img").get_attribute("src")), self.driver.execute_script("return shown")

    def bytes(self, address):
        import base64

        return base64.b64decode(self.driver.execute_async_script(BYTES, address))

    def download(self, selector, name):
        self.find(selector).click()
        path = self.driver.downloads / name
        self.until(lambda: path.exists())
        return path


def expected(run, classes, num, seed, steps):
    """What the model makes without a page."""
    model = EAR.from_pretrained(run)
    setting = SamplingConfig(steps)
    labels = class_labels(classes, num, 10)
    return sample_images(
        model, labels, seed=seed, steps=steps, guidance=setting.guidance,
        guidance_schedule=setting.guidance_schedule, temperature=setting.temperature,
    )  # fmt: skip


def test_a_user_draws_and_takes_the_images_along(run, server, browser):
    page = Page(browser, server)
    page.choose("3", "7")
    page.type("#number input[type=number]", 4)
    page.type("#steps input[type=number]", 32)
    page.type("#every input[type=number]", 4)
    seed = 10**30 + 7  # no number of JavaScript's
    page.type(SEED, seed)
    picture, shown = page.draw()
    assert len(set(shown)) >= 3, shown  # as they form
    wanted = expected(run, [3, 7], 4, seed, 32)
    assert picture == grid_png(wanted)
    assert "4 images in" in page.status()
    assert "ms an image" in page.status()
    early = Image.open(io.BytesIO(page.bytes(shown[0])))
    assert early.size == Image.open(io.BytesIO(picture)).size
    assert early.convert("RGB").tobytes() != Image.open(io.BytesIO(picture)).tobytes()

    name = f"seed{str(seed)[:20]}"
    assert page.download("#grid", f"{name}.png").read_bytes() == picture
    with zipfile.ZipFile(page.download("#zip", f"{name}.zip")) as bundle:
        assert bundle.namelist() == ["00_3.png", "01_3.png", "02_7.png", "03_7.png"]
        last = Image.open(io.BytesIO(bundle.read("03_7.png")))
        assert last.tobytes() == to_bytes(wanted)[3].permute(1, 2, 0).numpy().tobytes()

    page.type(SEED, 8)
    assert page.draw()[0] != picture
    page.type(SEED, seed)
    assert page.draw()[0] == picture
    page.find("#anew input").click()
    assert page.draw()[0] != picture
    assert page.find(SEED).get_attribute("value") not in ("8", str(seed))


@pytest.mark.parametrize(
    ("seed", "named"), [("-1", "seed is -1; it must not be negative"), ("seven", "seed is 'seven'; it must be an")]
)
def test_a_bad_seed_is_a_message(server, browser, seed, named):
    page = Page(browser, server)
    page.type(SEED, seed)
    page.find("#draw").click()
    # It fades in.
    page.until(lambda: any(toast.text for toast in page.all(".toast-body")))
    assert named in page.find(".toast-body").text
    assert "Traceback" not in browser.page_source
    assert page.status() == ""


@pytest.mark.parametrize("way", ["stop", "leave"])
def test_whoever_stops_or_leaves_makes_room(server, browser, way):
    page = Page(browser, server)
    page.type("#number input[type=number]", 64)
    page.type("#steps input[type=number]", 64)
    page.find("#draw").click()
    page.until(lambda: page.status().startswith("step"))
    began = time.monotonic()
    page.until(lambda: page.status().startswith("step") and page.steps_done() >= 4)
    left = (64 - page.steps_done()) * (time.monotonic() - began) / page.steps_done()
    if way == "stop":
        page.find("#stop").click()
        page.until(lambda: "Stopped." in page.status())
    else:
        browser.get("about:blank")
        page = Page(browser, server)
    page.type("#number input[type=number]", 1)
    page.type("#steps input[type=number]", 1)
    began = time.monotonic()
    page.draw()
    assert time.monotonic() - began < left / 2


def test_the_page_asks_no_other_host(server, browser):
    Page(browser, server)
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [entry["params"]["request"]["url"] for entry in requests if entry["method"] == "Network.requestWillBeSent"]
    assert len(sent) > 5
    assert [url for url in sent if not url.startswith((server, "data:", "blob:", "about:", "chrome"))] == []


def test_a_port_in_use_is_one_line(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(run), "--port", str(port)]) == 1
    errors = capsys.readouterr().err
    assert f"can't listen on port {port} of 127.0.0.1: Address already in use" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["nowhere"], "not a directory"),
        (["."], "not a run directory"),
        (["RUN", "--port", "70000"], "port must be 0-65535"),
        (["RUN", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["RUN", "--port", "0", "--precision", "fp7"], "precision is 'fp7'"),
        (["RUN", "--port", "0", "--device", "tpu9"], "device 'tpu9'"),
        (["RUN", "--port", "0", "--tokenizer", "none.safetensors"], "none.safetensors is not there"),
    ],
)
def test_what_cannot_be_served_is_one_line(run, tmp_path, monkeypatch, options, named, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["serve", *(str(run) if option == "RUN" else option for option in options)]) == 1
    errors = capsys.readouterr().err
    assert named in errors
    assert errors.count("\n") == 1


def test_without_gradio_the_extra_is_named(run, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name))
    assert cli.main(["serve", str(run)]) == 1
    assert 'pip install "ear-kernels[serve]"' in capsys.readouterr().err
