"""Bodies that no client of good will sends: numbers of thousands of digits, forms cut off, files as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.fakes import VIDEOS, FakeOmni
from tests.server.serving import Served, error_of, serving
from tests.server.test_images import png

GENERATIONS, EDITS, CHAT, FILMS = "/v1/images/generations", "/v1/images/edits", "/v1/chat/completions", "/v1/videos"
LONGEST = 4000  # bytes of an answer that refuses
JSON = {"content-type": "application/json"}
COMMON = ("seed", "num_inference_steps", "guidance_scale", "true_cfg_scale")
UNREAD, REALS = ("max_tokens", "temperature"), ("guidance_scale", "true_cfg_scale")
FIELDS = {
    GENERATIONS: ('"prompt": "x"', (*COMMON, "n", "strength", "output_compression", "partial_images", "size")),
    CHAT: (
        '"messages": [{"role": "user", "content": "x"}]',
        (*COMMON, "n", "height", "width", "num_outputs_per_prompt", "max_tokens", "temperature"),
    ),
    FILMS: ('"prompt": "x"', (*COMMON, "seconds", "num_frames", "fps", "size")),
}


@pytest.fixture(scope="module")
def films() -> Iterator[Served]:
    with serving(FakeOmni(capabilities=VIDEOS)) as running:
        yield running


@pytest.mark.parametrize("path", FIELDS)
def test_whole_numbers_of_any_length(served: Served, films: Served, path: str) -> None:
    server = films if path == FILMS else served
    required, names = FIELDS[path]
    for name in names:
        for digits in (30, 400, 4200, 5000):
            for number in ("9" * digits, "-" + "9" * digits, f'"{"9" * digits}"'):
                body = f'{{{required}, "{name}": {number}}}'
                answer = server.client.post(path, content=body.encode(), headers=JSON)
                assert answer.status_code in (200, 400), (name, digits, answer.text[:200])
                assert len(answer.content) < LONGEST or answer.status_code == 200
                is_taken = name in UNREAD or (digits == 30 and name in REALS)
                assert answer.status_code == 400 or is_taken, (name, number[:40])
    unreadable = server.client.post(path, content=f'{{{required}, "n": {"9" * 5000}}}'.encode(), headers=JSON)
    assert (
        error_of(unreadable)["message"] == "the body holds a whole number of thousands of digits, which no field takes"
    )


def test_numbers_in_forms_queries_and_headers(editor: Served, films: Served) -> None:
    long = "9" * 5000
    for name in ("n", "seed", "num_inference_steps", "guidance_scale"):
        answer = editor.client.post(EDITS, data={"prompt": "x", name: long}, files={"image": png()})
        assert (answer.status_code, error_of(answer)["param"]) == (400, name)
        assert len(answer.content) < LONGEST
    for name in ("seconds", "num_frames", "seed", "fps"):
        answer = films.client.post(FILMS, data={"prompt": "x", name: long}, files={"other": b""})
        assert answer.status_code == 400
        assert len(films.client.post(FILMS, data={"prompt": "x", name: long}).content) < LONGEST
    answer = films.get(f"{FILMS}?limit={long}")
    assert answer.status_code == 400
    assert len(answer.content) < LONGEST


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (GENERATIONS, {"prompt": "x", "LONG": 1}),
        (GENERATIONS, {"prompt": "x", "model": "LONG"}),
        (GENERATIONS, {"prompt": "x", "size": "LONG"}),
        (GENERATIONS, {"prompt": "x", "quality": "LONG"}),
        (GENERATIONS, {"prompt": ["LONG"]}),
        (GENERATIONS, {"prompt": "LONG"}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "LONG"}]}]}),
        (CHAT, {"messages": [{"role": "LONG", "content": "x"}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "LONG"}}]}]}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}], "modalities": ["LONG"]}),
    ],
)
def test_a_refusal_does_not_echo_a_long_value(served: Served, path: str, body: Any) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {filled(key): filled(one) for key, one in value.items()}
        return (
            [filled(one) for one in value] if isinstance(value, list) else "y" * 100_000 if value == "LONG" else value
        )

    answer = served.post(path, filled(body))
    assert answer.status_code in (400, 404)
    assert len(answer.content) < LONGEST


def test_long_names_in_paths(films: Served) -> None:
    long = "y" * 20_000
    for path in (f"{FILMS}/{long}", f"{FILMS}?after={long}", f"/v1/models/{long}", f"/{long}"):
        answer = films.get(path)
        assert answer.status_code in (400, 404)
        assert len(answer.content) < LONGEST
        assert all(len(value) < LONGEST for value in answer.headers.values())


PART = b'--edge\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'


def form(*parts: tuple[bytes, bytes, bytes], end: bytes = b"--edge--\r\n") -> bytes:
    return b"".join(PART % part for part in parts) + end


PROMPT, IMAGE = (b"prompt", b"", b"x"), (b"image", b'; filename="a.png"', png())


@pytest.mark.parametrize("path", [EDITS, FILMS])
def test_a_form_that_was_cut_off_is_refused(editor: Served, films: Served, path: str) -> None:
    server = editor if path == EDITS else films
    headers = {"content-type": "multipart/form-data; boundary=edge"}

    def answer(body: bytes) -> Any:
        return server.client.post(path, content=body, headers=headers)

    whole = form(PROMPT, IMAGE) if path == EDITS else form(PROMPT)
    assert answer(whole).status_code == 200
    assert answer(whole[:-2]).status_code == 200, "what comes after the last boundary means nothing"
    seed = form(PROMPT, (b"seed", b"", b"12345"), IMAGE) if path == EDITS else form(PROMPT, (b"seed", b"", b"12345"))
    # Without the last boundary; in the middle of a number; after a part's head; in the middle of a head.
    for cut in (len(seed) - 12, seed.index(b"12345") + 2, seed.index(b"12345"), seed.index(b"seed") + 2, 20):
        refused = answer(seed[:cut])
        assert refused.status_code == 400, cut
        assert "ends before its last boundary" in error_of(refused)["message"]
    broken = answer(b"no form")
    assert (broken.status_code, error_of(broken)["code"]) == (400, "invalid_form")
    nameless = server.client.post(path, content=whole, headers={"content-type": "multipart/form-data"})
    assert "Missing boundary" in error_of(nameless)["message"]


def test_files_where_text_is_wanted_and_text_where_files_are(editor: Served, films: Served) -> None:
    def refusal(server: Served, path: str, data: Any, files: Any) -> tuple[Any, str]:
        answer = server.client.post(path, data=data, files=files)
        assert answer.status_code == 400
        return error_of(answer)["param"], error_of(answer)["message"]

    assert refusal(editor, EDITS, {}, {"prompt": b"x", "image": png()}) == ("prompt", "prompt is a file: give text")
    assert refusal(editor, EDITS, {"prompt": "x", "mask": "y"}, {"image": png()}) == (
        "mask",
        "mask: upload it as a file",
    )
    assert refusal(editor, EDITS, {"prompt": "x", "image[]": "y"}, {"image": png()})[0] == "image"
    param, message = refusal(editor, EDITS, {"prompt": "x"}, {"imag": png()})
    assert (param, "did you mean image?" in message) == ("imag", True)
    assert refusal(films, FILMS, {}, {"prompt": b"x"}) == ("prompt", "prompt is a file: give text")
    assert refusal(films, FILMS, {"prompt": "x"}, {"input_referense": png()})[1].endswith(
        "did you mean input_reference?"
    )
