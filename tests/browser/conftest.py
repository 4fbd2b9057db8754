"""Chromium, JupyterLab and the app of notebook 06; how a test reads and moves the explorer."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
EXECUTED = ROOT / "build" / "notebooks" / "06_threshold_explorer.ipynb"
SCREENSHOTS = ROOT / "build" / "screenshots"
WINDOW = {"width": 1280, "height": 1000}
PATIENCE = 240_000  # milliseconds for a notebook to run
# Put at the end of notebook 06: what the tests compute their own numbers from.
WRITE_SCORES = """import json
truth = {"labels": evaluation.labels.tolist(), "scores": evaluation.scores["combined"].tolist()}
truth["normal"] = validation.scores["combined"].tolist()
with open("truth.json", "w") as file:
    json.dump(truth, file)
print("scores", "written")"""
SETTINGS = {
    # Cells out of sight stay in the page, and no question is asked at the first start.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

expect.set_options(timeout=15_000)


class Explorer:
    """The threshold explorer in a page, by what a person sees and presses."""

    def __init__(self, page: Page):
        self.page = page
        self.slider = page.locator(".te-image-slider .noUi-handle")
        self.sentence = page.locator(".te-sentence")
        self.caption = page.locator(".te-caption")
        self.message = page.locator(".te-message")
        expect(page.locator(".te-plots img").first).to_be_visible(timeout=PATIENCE)

    @property
    def threshold(self) -> float:
        return float(self.page.locator(".te-image-number input").input_value())

    def press(self, name: str) -> None:
        self.page.locator(".te-root").get_by_role("button", name=name, exact=True).click()

    def set(self, name: str, value) -> None:
        """Write into the field of class te-NAME."""
        field = self.page.locator(f".te-{name} input")
        field.fill(str(value))
        field.press("Enter")

    def key(self, key: str) -> float:
        """Press a key on the image slider; the threshold that is shown then."""
        before = self.page.locator(".te-image-number input").input_value()
        self.slider.press(key)
        self.page.wait_for_function(
            "before => document.querySelector('.te-image-number input').value !== before",
            arg=before,
        )
        return self.threshold

    def number(self, name: str):
        """The locator of the readout's cell te-NAME."""
        return self.page.locator(f".te-readout .te-{name}")


class Pages:
    """Opens pages that write down what goes wrong in them, and keeps their pictures."""

    def __init__(self, browser: Browser):
        self.browser = browser

    @contextmanager
    def open(self, **options):
        context = self.browser.new_context(
            **{"viewport": {"width": 1280, "height": 1000}, **options}
        )
        page = context.new_page()
        page.faults = []
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on(
            "console",
            lambda said: page.faults.append(said.text) if said.type == "error" else None,
        )
        page.on("requestfailed", lambda request: page.faults.append(f"failed: {request.url}"))
        page.on(
            "request",
            lambda request: None if is_local(request.url) else page.faults.append(request.url),
        )
        try:
            yield page
        finally:
            context.close()


def is_local(url: str) -> bool:
    return url.startswith(("file:", "data:", "blob:", "http://localhost:", "ws://localhost:"))


def run_all_cells(page: Page) -> None:
    """By the menu; again if nothing runs, for an idle kernel may not yet be the notebook's."""
    prompt = page.locator(".jp-Notebook .jp-CodeCell .jp-InputPrompt").first
    for attempt in range(4):
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
        try:
            expect(prompt).not_to_have_text("[ ]:")
            return
        except AssertionError:
            if attempt == 3:
                raise


def picture(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


@pytest.fixture(scope="session")
def pages():
    program = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield Pages(browser)
        browser.close()


@pytest.fixture(scope="session")
def take():
    return picture


@pytest.fixture(scope="session")
def executed() -> nbformat.NotebookNode:
    if not EXECUTED.is_file():
        pytest.fail(f"There is no {EXECUTED}: run `make tutorial` first.")
    return nbformat.read(EXECUTED, as_version=4)


@pytest.fixture(scope="session")
def lab(executed, tmp_path_factory):
    """JupyterLab in a folder with the project's build and data; opens a notebook and runs it."""
    folder = tmp_path_factory.mktemp("lab")
    for name in ("build", "data"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "notebooks").mkdir()
    for name, content in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    port, token = free_port(), secrets.token_hex(16)
    command = [
        *("-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"),
        "--ServerApp.port_retries=0",
    ]
    address = f"http://localhost:{port}"
    with running(command, port, JUPYTERLAB_SETTINGS_DIR=str(folder / "settings")):

        @contextmanager
        def run(pages: Pages, notebook: nbformat.NotebookNode, name: str):
            nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
            with pages.open(viewport={"width": 1600, "height": 1200}) as page:
                page.goto(
                    f"{address}/lab/workspaces/{name}/tree/notebooks/{name}.ipynb?token={token}"
                )
                idle = page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")
                expect(idle).to_be_attached(timeout=PATIENCE)
                try:
                    run_all_cells(page)
                    yield page
                except Exception:
                    picture(page, f"{name}-failed")
                    raise

        run.folder = folder / "notebooks"
        yield run


@pytest.fixture(scope="session")
def in_lab(pages, lab, executed):
    """Notebook 06, run in JupyterLab as a person would."""
    notebook = nbformat.from_dict(executed)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    notebook.metadata.pop("widgets", None)
    notebook.cells.append(nbformat.v4.new_code_cell(WRITE_SCORES))
    with lab(pages, notebook, "explorer") as page:
        expect(page.get_by_text("scores written", exact=True)).to_be_attached(timeout=PATIENCE)
        yield Explorer(page)


@pytest.fixture(scope="session")
def truth(in_lab, lab):
    """Labels and scores of the notebook's evaluation, and the scores of its normal images."""
    content = json.loads((lab.folder / "truth.json").read_text())
    # Scores are float32; as float64 they compare with a threshold exactly as they do there.
    return {name: np.array(values, dtype=np.float64) for name, values in content.items()}


@pytest.fixture(scope="session")
def in_app(pages, executed):
    """The page of `make app`, with the profile that the notebook was executed with."""
    parameters = executed.metadata.papermill.parameters
    port = free_port()
    command = [str(ROOT / "notebooks" / "app.py"), "--port", str(port)]
    command += ["--profile", parameters.profile, "--scenario", parameters.scenario]
    with running(command, port), pages.open() as page:
        page.goto(f"http://localhost:{port}", wait_until="commit")
        yield Explorer(page)


@contextmanager
def running(command: list[str], port: int, **environment):
    """A server of this Python that listens at the port; ended with what it has started."""
    kernels = str(Path(sys.prefix) / "share" / "jupyter")
    server = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"JUPYTER_PATH": kernels} | environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 120
        while not listens(port):
            assert server.poll() is None and time.monotonic() < end, command
            time.sleep(0.1)
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
