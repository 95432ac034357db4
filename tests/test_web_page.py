"""The page in a real browser: a clip from the form to the gallery, and whatever may happen on the way."""

import base64
import shutil
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from web_server import PATIENCE, Served, demo_request, served, wait_for

pytest.importorskip("starlette", reason="needs skyrun[web]")
pytest.importorskip("uvicorn", reason="needs skyrun[web]")
api = pytest.importorskip("playwright.sync_api", reason="needs playwright from PyPI")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium"),
]

_OPTIONS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"),
]
LONG = 900  # steps of a clip that is not finished before a test says so
PROMPT = "a red star moves up on white"


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with served(tmp_path_factory.mktemp("web") / "clips") as server:
        demo_request(server.folder)
        yield server


@pytest.fixture
def server(shared):
    """A server without jobs, whatever the test before has left."""
    yield shared
    empty(shared)


@contextmanager
def opened(browser, server, **options):
    """The page in a new browser window. It may not raise an error, or break its own policy."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
    context.set_default_timeout(1000 * PATIENCE)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if "Content Security Policy" in said.text else None)
    page.goto(server.address)
    page.wait_for_selector("#f-prompt")
    try:
        yield page
        assert errors == []
    finally:
        context.close()


def until(page, script):
    """Wait until a script is true. Playwright's own way needs eval, which the policy of the page forbids."""
    for _ in range(10 * PATIENCE):
        if page.evaluate(script):
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"never true: {script}")


def fill(page, server, steps=8, prompt=PROMPT, seed="7"):
    """Fill in the form for a clip of the built-in model."""
    if not page.locator(".thumbs img").count():
        page.locator("#f-images").set_input_files(server.folder / "star.png")
        page.wait_for_selector(".thumbs img")
    page.fill("#f-prompt", prompt)
    page.fill("#f-seed", seed)
    page.locator("#more").evaluate("node => node.open = true")
    page.fill("#f-model", "demo")
    page.fill("#f-steps", str(steps))


def empty(server):
    """Cancel and remove every job."""
    for job in server.ask("GET", "/api/jobs")[1]:
        if job["status"] != "done":
            server.ask("DELETE", f"/api/jobs/{job['id']}")
    wait_for(lambda: all(job["status"] in ("done", "cancelled") for job in server.ask("GET", "/api/jobs")[1]))
    for job in server.ask("GET", "/api/jobs")[1]:
        if job["status"] != "done":
            server.ask("DELETE", f"/api/jobs/{job['id']}")


def test_a_clip_is_made_from_the_form(browser, server):
    with opened(browser, server) as page:
        page.wait_for_selector(".verdict")
        page.click("#make")
        until(page, "document.getElementById('e-prompt').textContent.includes('prompt is empty')")
        assert "expected 1 to 4" in page.text_content("#e-images")
        assert page.get_attribute("#f-prompt", "aria-invalid") == "true"
        fill(page, server, steps=LONG)
        until(page, "document.getElementById('h-resolution').textContent === '48 wide, 48 high'")
        assert page.locator(".chart .bar").count() == 5 and "It fits" in page.text_content("#plan")
        assert page.locator("#form .problem:visible").count() == 0
        page.click("#make")
        page.wait_for_selector(".job.running .preview:visible")
        until(page, f"/\\d+ of {LONG} steps/.test(document.querySelector('.stage').textContent)")
        until(page, "document.title.includes('%')")
        first = page.get_attribute(".preview", "src")
        until(page, f"document.querySelector('.preview').getAttribute('src') !== '{first}'")
        page.click("[data-act=log]")
        until(page, "document.querySelector('pre').textContent.includes('denoise')")
        page.reload()  # in the middle
        page.wait_for_selector(".job.running .preview:visible")
        assert page.input_value("#f-prompt") == PROMPT and page.locator(".thumbs img").count() == 1
        assert page.input_value("#f-steps") == str(LONG)
    (job,) = server.ask("GET", "/api/jobs")[1]  # the browser is closed
    before = job["progress"]["done"]
    server.until(job["id"], "running", step=before + 1)
    with opened(browser, server) as page:  # and is back
        page.click(".job.running [data-act=cancel]")
        page.wait_for_selector(".job.cancelled")
        page.click(".job.cancelled [data-act=remove]")
        page.wait_for_selector("#queue-empty:visible")
        assert page.title() == "skyrun"


def test_a_finished_clip_is_played_and_its_settings_come_back(browser, server):
    with opened(browser, server) as page:
        fill(page, server)
        page.click("#make")
        card = page.locator(".clip", has=page.get_by_text(PROMPT))
        card.locator("img").wait_for()
        assert page.locator(".job").count() == 0
        card.locator("img").scroll_into_view_if_needed()  # pictures far below are not loaded
        until(page, "document.querySelector('.clip img').naturalWidth > 0")
        card.locator(".poster").click()
        video = page.locator("#player video")
        until(page, "document.querySelector('#player video').readyState >= 1")
        assert round(video.evaluate("node => node.duration"), 1) == 0.7
        assert PROMPT in page.text_content("#player dl")
        page.keyboard.press("Escape")
        page.fill("#f-prompt", "something else")
        page.fill("#f-seed", "")
        card.get_by_text("Again with…").click()
        assert page.input_value("#f-prompt") == PROMPT and page.input_value("#f-seed") == "7"
        card.get_by_text("Go on…").click()
        card.locator(".items button").first.click()
        page.wait_for_selector("#f-video", state="attached")
        assert page.is_checked("#task-v2v") and page.locator(".thumbs video").count() == 1
        page.wait_for_selector(".verdict.good, .verdict.bad")
        card.get_by_role("button", name="Delete").click()
        page.click("#sure-yes")
        page.wait_for_selector("#clips-empty:visible")
    assert [*server.folder.glob("*.mp4")] == []


_DROP = """([name, type, content, target, event]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type }));
  const made = event === "paste" ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
    : new DragEvent(event, { dataTransfer: data, bubbles: true, cancelable: true });
  document.querySelector(target).dispatchEvent(made);
}"""


def drop(page, path, kind, target="body", event="drop"):
    content = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(_DROP, ["<img src=x onerror=alert(1)>", kind, content, target, event])


def test_files_are_dropped_and_pasted_and_a_clip_gives_its_settings_back(browser, server, tmp_path):
    _, job = server.ask(
        "POST", "/api/jobs", demo_request(server.folder, seed=12, prompt="<b>star</b> moves up on white")
    )
    server.until(job["id"], "done")
    other = tmp_path / "other.png"
    other.write_bytes((server.folder / "star.png").read_bytes() + b"more")
    with opened(browser, server) as page:
        drop(page, server.folder / job["clip"], "video/mp4", event="dragenter")
        assert page.is_visible("#drop")
        drop(page, server.folder / job["clip"], "video/mp4")
        until(page, "document.getElementById('f-seed').value === '12'")
        assert page.input_value("#f-prompt") == "<b>star</b> moves up on white" and not page.is_visible("#drop")
        assert page.locator(".thumbs img").count() == 1
        drop(page, other, "image/png", "[data-field=images] .zone")
        until(page, "document.querySelectorAll('.thumbs img').length === 2")
        page.locator(".thumbs button").first.click()
        drop(page, server.folder / "star.png", "image/png", event="paste")
        until(page, "document.querySelectorAll('.thumbs img').length === 2")
        drop(page, Path(__file__), "image/png")
        until(page, "document.getElementById('toast').textContent.includes('no image, video or recording')")
        page.locator(".clip .prompt").first.wait_for()
        assert page.locator("b:has-text('star'), img[src=x]").count() == 0  # names and prompts stay text
    server.ask("DELETE", f"/api/clips/{job['clip']}")


def test_the_queue_is_ordered_and_paused(browser, server):
    for seed in (21, 22, 23):
        server.ask("POST", "/api/jobs", demo_request(server.folder, seed=seed, steps=LONG))
    with opened(browser, server) as page:
        texts = "[...document.querySelectorAll('.job .about .quiet')].map(node => node.textContent)"
        seeds = f"{texts}.map(text => /seed (\\d+)/.exec(text)[1])"
        until(page, f"{seeds}.join() === '21,22,23'")
        page.locator(".job", has_text="seed 23").locator("[data-act=up]").click()
        until(page, f"{seeds}.join() === '21,23,22'")
        assert page.evaluate("document.activeElement.dataset.act") == "up"  # the focus stays on what was pressed
        page.locator(".job", has_text="seed 22").locator("[data-act=pause]").click()
        page.wait_for_selector(".job.paused")
        page.locator(".job", has_text="seed 22").locator("[data-act=remove]").click()
        until(page, f"{seeds}.join() === '21,23'")
        page.wait_for_selector(".job.running .preview:visible")
        page.locator(".job.running [data-act=pause]").click()
        until(page, f"{seeds}.join() === '23,21' && !!document.querySelector('.job.running')")


def test_a_server_that_is_killed_and_started_again(browser, tmp_path):
    folder = tmp_path / "clips"
    first = Served(folder)
    with opened(browser, first) as page:
        first.ask("POST", "/api/jobs", demo_request(folder, steps=LONG))
        page.wait_for_selector(".job.running .preview:visible")
        first.process.kill()
        first.process.wait(60)
        first.process.stderr.close()
        page.wait_for_selector("#offline:visible")
        with served(folder, port=first.port) as second:
            page.wait_for_selector("#offline", state="hidden")
            page.wait_for_selector(".job.running")
            (job,) = second.ask("GET", "/api/jobs")[1]
            second.until(job["id"], "running", step=1)


_FOCUSED = "document.activeElement.id || document.activeElement.name || document.activeElement.tagName"
_OUTLINED = """getComputedStyle(document.activeElement).outlineStyle !== "none"
  || !!document.activeElement.closest(".tasks, .pills, .zone")"""


def test_keys_are_enough(browser, server):
    with opened(browser, server) as page:
        fill(page, server, steps=LONG)
        until(page, "!document.getElementById('make').disabled")
        page.reload()
        page.wait_for_selector(".verdict")
        seen, visible = [], []
        for _ in range(60):
            page.keyboard.press("Tab")
            seen.append(page.evaluate(_FOCUSED))
            visible.append(page.evaluate(_OUTLINED))
            if seen[-1] == "make":
                break
        assert {"f-images", "f-prompt", "f-seconds", "f-seed", "count", "make"} <= set(seen)
        assert seen[0].startswith("task-") and all(visible)
        page.keyboard.press("Enter")
        page.wait_for_selector(".job.running [data-act=cancel]")
        page.focus("[data-act=cancel]")
        page.keyboard.press("Space")
        page.wait_for_selector(".job.cancelled")
        assert page.evaluate("!!document.activeElement.closest('.job')")


def test_a_recording_is_made_with_the_microphone(browser, server):
    with opened(browser, server, permissions=["microphone"]) as page:
        page.check("#task-a2v", force=True)
        page.get_by_role("button", name="Record with the microphone").click()
        page.wait_for_timeout(1500)
        page.get_by_role("button", name="Stop recording").click()
        page.wait_for_selector(".thumbs audio")
        until(page, "/about|fit|plan/i.test(document.querySelector('.verdict')?.textContent)")


_GRAVE = ("serious", "critical")
_WINDOWS = (
    {"color_scheme": "light"},
    {"color_scheme": "dark"},
    {"color_scheme": "dark", "viewport": {"width": 360, "height": 740}},
)


@pytest.mark.skipif(find_spec("axe_playwright_python") is None, reason="needs axe-core from axe-playwright-python")
def test_nothing_is_wider_than_the_window_and_axe_finds_no_serious_fault(browser, server):
    import axe_playwright_python

    axe = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
    _, made = server.ask("POST", "/api/jobs", demo_request(server.folder, seed=31))
    server.until(made["id"], "done")
    for seed in (32, 33):
        server.ask("POST", "/api/jobs", demo_request(server.folder, seed=seed, steps=LONG))
    for options in _WINDOWS:
        with opened(browser, server, **options) as page:
            fill(page, server)
            page.fill("#f-max_vram", "-1")
            page.wait_for_selector("#e-max_vram:visible")
            page.wait_for_selector(".job.running .preview:visible")
            page.wait_for_selector(".clip img")
            page.evaluate(axe)
            for where in ("page", "player"):
                if where == "player":
                    page.locator(".poster").first.click()
                found = [fault for fault in page.evaluate("axe.run()")["violations"] if fault["impact"] in _GRAVE]
                assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found] == [], (where, options)
                assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), options
    server.ask("DELETE", f"/api/clips/{made['clip']}")
