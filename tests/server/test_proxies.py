"""Behind a proxy, and with TLS: what the guard sees is what the routes see, and URLs are the client's."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import pytest

from omni_sp.command_line import BAD_INPUT
from tests.server.fakes import FakeOmni
from tests.server.serving import PATIENCE_S, Served, error_of, serving
from tests.server.test_images import GENERATIONS
from tests.server.test_process import main, one_line

ASKED = {"prompt": "x", "response_format": "url"}
PROXY = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "draw.example"}


def url_of(served: Served, path: str = GENERATIONS, **headers: str) -> str:
    answer = served.post(path, ASKED, headers=headers)
    assert answer.status_code == 200, answer.text
    url: str = answer.json()["data"][0]["url"]
    return url


def test_urls_are_those_of_the_proxys_client(served: Served) -> None:
    assert url_of(served).startswith(f"{served.url}/v1/files/")
    assert url_of(served, **PROXY).startswith("https://draw.example/v1/files/")
    # Each proxy adds its own at the end, and only that one is known.
    chained = {"X-Forwarded-Proto": "http, https", "X-Forwarded-Host": "evil.example, draw.example:8443"}
    assert url_of(served, **chained).startswith("https://draw.example:8443/v1/files/")
    for odd in ("a b", "evil.example/x", "x@y", "<x>", ""):
        assert url_of(served, **{"X-Forwarded-Host": odd}).startswith(served.url)
    with serving(FakeOmni(), forwarded_allow_ips="10.0.0.0/8, 192.168.1.7") as strict:
        assert url_of(strict, **PROXY).startswith(strict.url)
    with serving(FakeOmni(), forwarded_allow_ips="*") as open_to_all:
        assert url_of(open_to_all, **PROXY).startswith("https://draw.example/")


def test_a_page_with_a_name_of_its_own_is_not_helped_by_headers(served: Served) -> None:
    """DNS rebinding: such a page may send any header, but its Host is its own name."""
    answer = served.post(GENERATIONS, ASKED, headers={"Host": "evil.example", "X-Forwarded-Host": "localhost"})
    assert (answer.status_code, error_of(answer)["code"]) == (403, "foreign_host")


@pytest.mark.parametrize("root", ["/draw", "/a/b"])
def test_below_a_path(root: str) -> None:
    with serving(FakeOmni(), root_path=root, api_keys=("key",), ready=False) as served:
        key = {"Authorization": "Bearer key"}
        # A proxy takes the path off, or does not.
        for prefix in ("", root):
            assert served.get(f"{prefix}/health").status_code in (200, 503)
            assert served.post(prefix + GENERATIONS, ASKED).status_code == 401
            assert served.get(f"{prefix}/v1/info").status_code == 401
            url = url_of(served, prefix + GENERATIONS, **key, **PROXY)
            assert url.startswith(f"https://draw.example{root}/v1/files/")
            assert served.get(url.removeprefix("https://draw.example")).status_code == 200
            assert served.get(url.removeprefix(f"https://draw.example{root}")).status_code == 200
            assert served.get(f"{prefix}/docs").status_code == 200
            assert served.get(f"{prefix}/").status_code == 200
        assert served.get("/openapi.json").json()["servers"] == [{"url": root}]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(cert), "-keyout", str(key)]
    subprocess.run([*command, *more], check=True, capture_output=True, timeout=PATIENCE_S)
    return cert, key


def test_https(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    with serving(FakeOmni(), ssl_certfile=cert, ssl_keyfile=key, ready=False) as served:
        trusting = ssl.create_default_context(cafile=str(cert))
        with httpx2.Client(verify=trusting, trust_env=False, timeout=PATIENCE_S) as client:
            base = f"https://127.0.0.1:{served.port}"
            while client.get(f"{base}/health").status_code != 200:
                pass
            answer = client.post(base + GENERATIONS, json=ASKED)
            url = answer.json()["data"][0]["url"]
            assert url.startswith(f"{base}/v1/files/")
            assert client.get(url).status_code == 200


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ssl-certfile", "{key}", "--ssl-keyfile", "{cert}"], "no certificate with its key"),
        (["--ssl-certfile", "/no/such.pem"], "/no/such.pem"),
        (["--ssl-keyfile", "{key}"], "give the certificate too"),
        (["--root-path", "draw"], "give a path such as /draw"),
        (["--root-path", "/draw/"], "without a slash at its end"),
        (["--root-path", "/v1"], "/v1 is the API's own"),
        (["--forwarded-allow-ips", "proxy.example"], "give addresses or networks"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    options: list[str], words: str, certificate: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"cert": certificate[0], "key": certificate[1]}
    assert main(["--port", "0", *(option.format(**names) for option in options)]) == BAD_INPUT
    assert words in one_line(capsys)
