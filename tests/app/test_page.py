# SPDX-License-Identifier: Apache-2.0
"""The app as people meet it: its program, a real browser, the shipped model; and programs that call it.

Screenshots of docs/app.md are made where TALKINGDIT_FIGURES is set: `TALKINGDIT_FIGURES=docs/figures pytest tests/app`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from PIL import Image
from tiny_avatar import save_released
from tiny_skyreels import make_skyreels, write_scene

from tests.painted_faces import painted_people

pytest.importorskip("gradio", reason="needs gradio")
api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")

from talkingdit.app.guard import HEADER  # noqa: E402
from talkingdit.puppets import MODEL  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
QUIET = ["disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]
FLAGS = [f"--{word}" for word in ("no-sandbox", "headless", "disable-gpu", *QUIET)]
PORTRAIT = MODEL.parent / "portrait.png"
PATIENT = 200_000  # milliseconds; a loaded machine takes its time
STATE = "#status .state"


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Recordings of 2.7 s, which makes two clips, and of 9 s; and a file that is none."""
    folder = tmp_path_factory.mktemp("voices")
    sound, rate = soundfile.read(MODEL.parent / "voice.flac")
    soundfile.write(folder / "short.wav", sound[: int(2.7 * rate)], rate)
    soundfile.write(folder / "long.wav", sound[: 9 * rate], rate)
    (folder / "letter.wav").write_text("Dear friend, this is no voice at all.")
    return {path.stem: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two people, a voice each, and a film; tiny checkpoints of the families that know what to do with them."""
    folder = tmp_path_factory.mktemp("scene")
    image, _ = painted_people(96, 192, [(3, 3, 90), (99, 3, 90)])
    Image.fromarray(image).save(folder / "two.png")
    time = np.arange(9600) / 16_000
    for name, pitch in (("anna", 310), ("ben", 150)):
        soundfile.write(
            folder / f"{name}.wav", 0.4 * np.sin(2 * np.pi * pitch * time) * (0.6 + 0.4 * np.sin(20 * time)), 16_000
        )
    root = save_released(folder / "weights")
    settings = {"window": 5, "shift_offset": 2, "steps": 2, "size_multiple": 16, "early_steps": 1}
    (root / "ckpts" / "pipeline.json").write_text(json.dumps(settings))
    write_scene(folder / "film.mp4", 6)
    return {path.stem: path for path in folder.iterdir()} | {
        "weights": root,
        "dubber": make_skyreels(folder / "dubber"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the program keeps runs."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def address(data: Path) -> Iterator[str]:
    """Where the program serves."""
    words = [sys.executable, "-m", "talkingdit", "app", "--port", "0", "--folder", str(data), "--max-upload", "5"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        found = server.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", found)
        yield found
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    assert not list(data.glob("runs/*/.part-*"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory, address: str) -> Iterator[Any]:
    """A browser with nothing in it, which keeps its cookie; `asked` has the addresses that it asked for."""
    with api.sync_playwright() as player:
        context = player.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")),
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1280, "height": 1000},
            color_scheme="light",
        )
        context.set_default_timeout(PATIENT)
        context.asked = []
        context.on("request", lambda request: context.asked.append(request.url))
        yield context
        context.close()


def opened(browser: Any, address: str) -> Any:
    page = browser.new_page()
    page.goto(address)
    field(page, "Seed").wait_for()
    return page


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    page = opened(browser, address)
    yield page
    page.close()


def field(page: Any, name: str) -> Any:
    """What words are typed into; its help follows its name."""
    return page.get_by_role("textbox", name=re.compile(f"^{name}"))


def choose(page: Any, checkpoint: Path) -> None:
    """Type the folder of a checkpoint."""
    page.get_by_label("Checkpoint", exact=True).fill(str(checkpoint))
    page.get_by_label("Checkpoint", exact=True).press("Enter")


def ask(page: Any, voice: Path, steps: int) -> None:
    page.locator("#picture input[type=file]").set_input_files(str(PORTRAIT))
    page.locator("#picture img").wait_for()
    page.locator("#voice input[type=file]").set_input_files(str(voice))
    page.locator("#voice").get_by_label("Play", exact=False).first.wait_for()
    field(page, "Steps").fill(str(steps))
    page.get_by_role("button", name="Make the video").click()


def until(page: Any, words: str) -> str:
    """The state of the run, once it says so."""
    page.locator(STATE).filter(has_text=re.compile(words)).wait_for()
    return page.locator(STATE).inner_text()


def serious(page: Any) -> list[str]:
    """What axe finds that keeps somebody from using the page."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def picture(page: Any, name: str, part: str = "") -> None:
    """A screenshot for the docs, where one is asked for: of the page, or of a part of it."""
    if os.environ.get("TALKINGDIT_FIGURES"):
        path = Path(os.environ["TALKINGDIT_FIGURES"]) / f"app-{name}.png"
        page.locator(part).screenshot(path=path) if part else page.screenshot(path=path, full_page=True)


def test_from_an_empty_page_to_a_playing_video(page: Any, browser: Any, address: str, voices: dict[str, Path]) -> None:
    """The first frame is on the page before the last clip is done, and nobody but the server is asked for anything."""
    assert serious(page) == []
    ask(page, voices["short"], steps=6)
    page.wait_for_function("document.querySelector('#video video')?.videoWidth > 0")
    assert "clip 2 of 2" in page.locator(STATE).inner_text() or "clip 1 of 2" in page.locator(STATE).inner_text()
    until(page, "done in")
    page.wait_for_function("document.querySelector('#video video').currentTime > 0.2")
    page.locator("#sheet img").wait_for()
    picture(page, "light")
    assert serious(page) == []
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the video").click()
    with av.open(str(download.value.path())) as video:
        assert video.streams.video[0].codec_context.name == "h264"
    foreign = [url for url in browser.asked if not url.startswith((address, "data:", "blob:"))]
    assert browser.asked
    assert foreign == []


def test_a_file_that_is_no_voice_is_one_sentence(page: Any, voices: dict[str, Path]) -> None:
    page.locator("#picture input[type=file]").set_input_files(str(PORTRAIT))
    page.locator("#picture img").wait_for()
    page.locator("#voice input[type=file]").set_input_files(str(voices["letter"]))
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Make the video").click()
    page.get_by_role("alert").wait_for()
    words = page.get_by_role("alert").inner_text()
    assert words.startswith("audio")
    assert "/" not in words.split(" ")[0]
    assert words.count(".") <= 3


def test_a_reload_finds_the_run_which_is_stopped_and_goes_on(
    page: Any, browser: Any, address: str, voices: dict[str, Path]
) -> None:
    ask(page, voices["long"], steps=30)
    until(page, "clip [23] of")
    page.close()  # nobody looks for a while
    page = opened(browser, address)
    until(page, "clip [2-9] of")
    page.get_by_role("button", name="Stop").click()
    until(page, ": stopped")
    assert re.search(r"stopped; [1-9]\d* of \d+ clips are kept\.", page.locator("#status").inner_text())
    page.get_by_role("button", name="Load its settings").click()
    page.locator("#picture img").wait_for()
    api.expect(field(page, "Steps")).to_have_value("30", timeout=PATIENT)
    page.get_by_role("button", name="Go on").click()
    until(page, "done in")
    assert "going on after" in page.locator("#status").inner_text()
    page.close()


def test_a_phone_in_the_dark(page: Any, voices: dict[str, Path]) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme="dark")
    page.reload()
    field(page, "Seed").wait_for()
    field(page, "Prompt").fill("a person, on a phone")  # which tells its run from earlier ones
    ask(page, voices["short"], steps=1)
    until(page, "on a phone: done in")
    page.locator("#video video").wait_for()
    page.locator("#sheet img").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(red, green, blue) < 60
    picture(page, "phone")
    assert serious(page) == []
    page.set_viewport_size({"width": 1280, "height": 1000})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    picture(page, "dark")


def test_two_programs_at_once_see_their_own_videos_alone(address: str, voices: dict[str, Path], tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    def client(name: str) -> Any:
        return Client(
            address, headers={HEADER: f"{name}-{'0' * 16}"}, verbose=False, download_files=str(tmp_path / name)
        )

    files = handle_file(str(PORTRAIT)), handle_file(str(voices["short"]))
    reports: dict[str, list[Any]] = {}

    def make(name: str) -> None:
        job = client(name).submit(*files, f"a film of {name}", "", {"steps": 1}, None, api_name="/generate")
        job.result(timeout=PATIENT / 1000)
        reports[name] = job.outputs()

    people = [threading.Thread(target=make, args=(name,)) for name in ("anna", "ben")]
    for one in people:
        one.start()
    for one in people:
        one.join()
    for name in ("anna", "ben"):
        assert reports[name][-1]["state"] == "done"
        (mine,) = client(name).predict(api_name="/runs")
        assert mine["title"] == f"a film of {name}"
    path = client("anna").predict(reports["anna"][-1]["id"], api_name="/video")
    with av.open(path) as video:
        assert sum(1 for _ in video.decode(video=0)) == 44
    with pytest.raises(Exception, match="there is none of this name"):
        client("ben").predict(reports["anna"][-1]["id"], api_name="/video")


def corner(page: Any, x: float, y: float) -> tuple[float, float]:
    """Where a pixel of the picture of speakers is on the screen."""
    drawn = page.locator("#boxes svg").bounding_box()
    scale = min(drawn["width"] / 192, drawn["height"] / 96)
    left, top = (drawn["width"] - 192 * scale) / 2, (drawn["height"] - 96 * scale) / 2
    return drawn["x"] + left + x * scale, drawn["y"] + top + y * scale


def test_two_speakers_whose_boxes_are_drawn_on_the_picture(page: Any, scene: dict[str, Path], data: Path) -> None:
    """By two clicks, by a drag, and by the keyboard; the run has them as they were drawn."""
    page.locator("#picture input[type=file]").set_input_files(str(scene["two"]))
    page.locator("#picture img").wait_for()
    choose(page, scene["weights"])
    page.get_by_role("button", name="Speakers").click()
    for number, name in enumerate(("anna", "ben"), 1):
        field(page, f"Speaker {number}: name").fill(name)
        page.locator("#speakers input[type=file]").first.set_input_files(str(scene[name]))
        page.locator("#speakers").get_by_label("Play", exact=False).nth(number - 1).wait_for()
    boxes = [field(page, f"Speaker {number}: box") for number in (1, 2)]
    page.locator("#boxes svg").scroll_into_view_if_needed()
    for box, typed, sides in zip(
        boxes, ("4,6,90,92", "100,4,188,90"), ((4, 6, 90, 92), (188, 90, 100, 4)), strict=True
    ):
        page.mouse.click(*corner(page, *sides[:2]))
        page.mouse.click(*corner(page, *sides[2:]))
        api.expect(box).to_have_value(typed, timeout=PATIENT)
    api.expect(page.locator("#boxes rect")).to_have_count(2, timeout=PATIENT)
    boxes[1].focus()  # which is drawn again
    page.locator("#boxes svg").scroll_into_view_if_needed()
    page.mouse.move(*corner(page, 99, 3))
    page.mouse.down()
    page.mouse.move(*corner(page, 150, 50))
    page.mouse.move(*corner(page, 189, 93))
    page.mouse.up()
    api.expect(boxes[1]).to_have_value("99,3,189,93", timeout=PATIENT)
    boxes[0].fill("3,3,93,93")
    api.expect(page.locator("#boxes svg")).to_have_attribute(
        "aria-label", "Boxes: anna at 3, 3, 93, 93, ben at 99, 3, 189, 93", timeout=PATIENT
    )
    href = page.locator("#boxes image").get_attribute("href")
    assert page.evaluate("async (href) => (await fetch(href)).status", href) == 200  # the picture is seen
    assert serious(page) == []
    page.get_by_role("button", name="More settings").click()
    field(page, "Size").fill("64x32")
    picture(page, "speakers", "#speakers")
    page.get_by_role("button", name="Make the video").click()
    until(page, "^video.* done in")
    asked = [json.loads(file.read_text())["asked"]["options"] for file in data.glob("runs/*/run.json")]
    assert ["anna=voice-1.wav@3,3,93,93", "ben=voice-2.wav@99,3,189,93"] in [one.get("speaker") for one in asked]


def test_a_film_is_dubbed(page: Any, scene: dict[str, Path]) -> None:
    """From the upload of a video and another voice to the video that plays."""
    choose(page, scene["dubber"])
    page.locator("#option-video input[type=file]").set_input_files(str(scene["film"]))
    page.locator("#option-video").get_by_text("film").first.wait_for()
    page.locator("#voice input[type=file]").set_input_files(str(scene["ben"]))
    page.locator("#voice").get_by_label("Play", exact=False).first.wait_for()
    field(page, "Steps").fill("1")
    page.get_by_role("button", name="More settings").click()
    field(page, "Mask").fill("16,16,80,60")
    field(page, "Windows").fill("2")
    page.get_by_role("button", name="Make the video").click()
    until(page, "^ben: done in")
    page.locator("#video video").evaluate("(video) => { video.muted = true; return video.play(); }")
    page.wait_for_function("document.querySelector('#video video').currentTime > 0.1")
    size = page.evaluate(
        "(({ videoWidth, videoHeight }) => [videoWidth, videoHeight])(document.querySelector('video'))"
    )
    assert size == [96, 64]
    page.locator("#sheet img").wait_for()
