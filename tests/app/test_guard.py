# SPDX-License-Identifier: Apache-2.0
"""Who gets what from the server: its whole application without a browser, models left out. Every input is harmless."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="needs gradio")

from starlette.testclient import TestClient
from test_runs import Made

from talkingdit.app.guard import HEADER, RequestGuard, Shares
from talkingdit.app.runs import owner_of
from talkingdit.app.server import ServerSettings, opened
from talkingdit.puppets import MODEL

ANNA, BEN = "anna-anna-anna-anna", "ben-ben-ben-ben-ben"
FILE = "/gradio_api/file="
MB = 1_000_000
PASSWORD = "a long password"


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RequestGuard]:
    settings = ServerSettings(folder=tmp_path_factory.mktemp("data"), limit=1)
    with opened(settings, Made) as found:
        yield found


@pytest.fixture(scope="module")
def server(application: RequestGuard) -> Iterator[TestClient]:
    with TestClient(application, base_url="http://127.0.0.1") as client:
        yield client


def as_(token: str) -> dict[str, str]:
    return {HEADER: token}


def uploaded(server: TestClient, token: str, name: str = "note.txt", data: bytes = b"mine") -> str:
    answer = server.post("/gradio_api/upload", files={"files": (name, io.BytesIO(data))}, headers=as_(token))
    assert answer.status_code == 200, answer.text
    (path,) = answer.json()
    return path


def left() -> list[Path]:
    """Files among the uploads."""
    return [path for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*") if path.is_file()]


def call(server: TestClient, name: str, data: list[Any], token: str) -> Any:
    return server.post(f"/gradio_api/call/{name}", json={"data": data}, headers=as_(token))


def test_a_browser_gets_a_token_and_a_page_that_asks_nobody_else(server: TestClient) -> None:
    answer = server.get("/")
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    # Addresses of pictures for those who share the page and words in code are never asked for; what loads would be.
    assert 'src="http' not in answer.text
    assert 'rel="preconnect"' not in answer.text
    assert "set-cookie" not in server.get("/", headers=as_(ANNA)).headers


def test_files_where_the_server_stands_or_anywhere_are_not_given_out(server: TestClient, tmp_path: Path) -> None:
    here = Path("here.txt")
    here.write_text("x")
    assert os.listdir() == ["here.txt"]  # it stands in an empty folder of its own
    (tmp_path / "secret.txt").write_text("x")
    for path in ("here.txt", str(here.absolute()), str(tmp_path / "secret.txt"), "/etc/hostname", "pyproject.toml"):
        for address in (FILE + path, FILE + path.replace("/", "%2F"), f"/gradio_api/file/{path}"):
            assert server.get(address, headers=as_(ANNA)).status_code == 404
    here.unlink()
    for address in ("/gradio_api/proxy=http://localhost/", "/monitoring", "/gradio_api/vibe-code/", "/docs", "/runs"):
        assert server.get(address, headers=as_(ANNA)).status_code == 404
    assert server.get(f"{FILE}http://127.0.0.1:9/x", headers=as_(ANNA)).status_code == 404


def test_an_upload_is_for_who_brought_it(server: TestClient) -> None:
    path = uploaded(server, ANNA)
    assert server.get(FILE + path, headers=as_(ANNA)).text == "mine"
    for headers in (as_(BEN), {}):
        server.cookies.clear()
        answer = server.get(FILE + path, headers=headers)
        assert (answer.status_code, answer.text) == (404, "there is no such file for you.\n")
    # Nor can it be named in a call.
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    answer = call(server, "generate", [file, file, "", "", None, None], BEN)
    assert (answer.status_code, answer.text) == (403, "a file that was asked for is not one that you have uploaded.\n")
    assert call(server, "generate", [file, None, "", "", None, None], ANNA).status_code == 200


@pytest.mark.parametrize(
    "named", [{"path": "/etc/hostname"}, {"path": "x", "url": "http://127.0.0.1:9/x"}, {"path": "http://127.0.0.1:9/x"}]
)
def test_a_call_names_no_file_of_the_machine_or_elsewhere(server: TestClient, named: dict[str, str]) -> None:
    file = {**named, "meta": {"_type": "gradio.FileData"}}
    for data in ([file], [[file]], [{"deep": [{"er": file}]}]):
        assert call(server, "generate", data, ANNA).status_code == 403


def test_who_has_no_token_is_told_how_to_have_one(server: TestClient) -> None:
    server.cookies.clear()
    answer = server.post("/gradio_api/upload", files={"files": ("a.txt", b"x")})
    assert (answer.status_code, "x-talkingdit-token" in answer.text) == (403, True)


def test_an_upload_over_the_limit_is_one_sentence_and_leaves_nothing(server: TestClient) -> None:
    before = left()
    answer = server.post("/gradio_api/upload", files={"files": ("big.wav", bytes(2 * MB))}, headers=as_(ANNA))
    assert (answer.status_code, answer.text) == (413, "the file is too large: this server takes up to 1 MB.\n")
    assert left() == before

    def parts() -> Iterator[bytes]:
        """Of unknown length."""
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="big.wav"\r\n\r\n'
        for _ in range(20):
            yield bytes(MB // 10)
        yield b"\r\n--b--\r\n"

    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = server.post("/gradio_api/upload", content=parts(), headers={**as_(ANNA), **kind})
    assert (answer.status_code, answer.text) == (413, "the file is too large: this server takes up to 1 MB.\n")
    assert left() == before


@pytest.mark.parametrize(
    "name", ["../../evil.txt", "..\\evil.txt", "a/b.txt", "%2e%2e%2fevil.txt", ".hidden", "x" * 300]
)
def test_names_of_uploads_lead_nowhere(server: TestClient, name: str) -> None:
    path = Path(uploaded(server, ANNA, name))
    folder = Path(os.environ["GRADIO_TEMP_DIR"]).resolve()
    assert path.resolve().parent.parent == folder


def test_files_of_a_run_are_for_whom_it_was_made(server: TestClient) -> None:
    image = uploaded(server, ANNA, "p.png", (MODEL.parent / "portrait.png").read_bytes())
    voice = uploaded(server, ANNA, "v.flac", (MODEL.parent / "voice.flac").read_bytes()[: MB // 2])
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in (image, voice)]
    began = call(server, "generate", [*files, "hello", "", {"steps": "1"}, None], ANNA).json()
    with server.stream("GET", f"/gradio_api/call/generate/{began['event_id']}", headers=as_(ANNA)) as events:
        words = "".join(events.iter_text())
    assert "event: complete" in words, words
    assert '"state": "done"' in words
    assert owner_of(ANNA) not in words
    id = words.partition('"id": "')[2].partition('"')[0]
    assert server.get(f"/talkingdit/runs/{id}/video.mp4", headers=as_(ANNA)).content == b"video"
    for token in (BEN, ""):
        server.cookies.clear()
        assert server.get(f"/talkingdit/runs/{id}/video.mp4", headers=as_(token) if token else {}).status_code == 404
    for name in ("run.json", "image.png", "..%2f..%2flock"):
        assert server.get(f"/talkingdit/runs/{id}/{name}", headers=as_(ANNA)).status_code == 404
    theirs = call(server, "video", [id], BEN).json()
    with server.stream("GET", f"/gradio_api/call/video/{theirs['event_id']}", headers=as_(BEN)) as events:
        assert "event: error" in "".join(events.iter_text())


def test_what_is_wrong_is_told_without_where_it_lies(server: TestClient) -> None:
    image = uploaded(server, ANNA, "p.png", (MODEL.parent / "portrait.png").read_bytes())
    voice = uploaded(server, ANNA, "v.wav", b"Dear friend, this is no voice at all.")
    files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in (image, voice)]
    began = call(server, "generate", [*files, "", "", None, None], ANNA).json()
    with server.stream("GET", f"/gradio_api/call/generate/{began['event_id']}", headers=as_(ANNA)) as events:
        words = "".join(events.iter_text())
    assert "event: error" in words
    assert "audio.wav" in words
    assert "/runs/" not in words


def test_other_sites_and_other_names_are_turned_away(server: TestClient) -> None:
    assert server.get("/", headers={"host": "evil.example"}).status_code == 421
    assert (
        server.post("/gradio_api/queue/join", headers={**as_(ANNA), "origin": "http://evil.example"}).status_code == 403
    )
    assert server.get("/", headers={"host": "localhost:7860"}).status_code == 200


def test_with_a_password_nothing_is_answered_without_it(application: RequestGuard) -> None:
    guarded = RequestGuard(application._app, application._shares, PASSWORD, (), MB)
    client = TestClient(guarded, base_url="http://127.0.0.1")
    for address in ("/", "/config", "/assets/x.js", "/talkingdit/runs/x/video.mp4", FILE + "x"):
        for given in (None, "Basic " + base64.b64encode(b"me:wrong").decode(), "Basic %%%", "Bearer x"):
            answer = client.get(address, headers={} if given is None else {"authorization": given})
            assert (answer.status_code, answer.headers["www-authenticate"][:5]) == (401, "Basic")
    right = {"authorization": "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()}
    assert client.get("/robots.txt", headers=right).status_code == 200


def test_files_that_are_gone_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("talkingdit.app.guard.MOST_FILES", 2)
    shares, files = Shares(), [tmp_path / f"{number}.png" for number in range(3)]
    for file in files:
        file.touch()
        shares.add(file, "a" * 20)
    assert all(shares.allows(file, "a" * 20) for file in files)
    for file in files[:2]:
        file.unlink()
    for number in range(3, 8):
        (tmp_path / f"{number}.png").touch()
        shares.add(tmp_path / f"{number}.png", "a" * 20)
    assert not shares.allows(files[0], "a" * 20)
    assert shares.allows(files[2], "a" * 20)
    assert not shares.allows(files[2], "b" * 20)
