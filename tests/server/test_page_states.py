"""The page while its server loads, is away, begins anew or wants a key; and the gallery that outlives all that."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from omni_sp.async_omni import ReplicaStats
from omni_sp.errors import EngineClosedError
from tests.server.browser import Browser
from tests.server.fakes import FakeOmni, held
from tests.server.pages import CARDS, READY, STEP, Relay, ended, opened, served, started, text_of, wait_for_focus


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with started(tmp_path_factory.mktemp("browser")) as found:
        yield found


def test_a_picture_that_is_lost_on_its_way_is_drawn_again(browser: Browser) -> None:
    omni = held()
    with served(omni) as url, Relay(url) as relay:
        page = opened(browser, relay.url)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for(f"{STEP}.startsWith('Step 1 of 4')")
        relay.cut()
        page.wait_for(f"{STEP} === 'The connection broke. It is drawn when the server is back.'")
        page.wait_for("document.querySelector('#status').textContent === 'The server does not answer.'")
        assert ended(omni) == "aborted"
        omni.go_on.set()
        relay.target = url
        page.wait_for(f"{CARDS} === 1")
        page.wait_for(READY)
        assert text_of(page, "#problem") == ""
        first, second = omni.requests
        assert first.params.seed == second.params.seed
        page.close()


def test_waits_for_a_server_that_ends_and_begins_anew(browser: Browser) -> None:
    omni = FakeOmni(errors=[EngineClosedError("the server is shutting down: try again later")])
    with served(omni) as url:
        page = opened(browser, url)
        page.type_in("#prompt", "a star")
        omni.force_status = "restarting"
        page.run("document.querySelector('#form').requestSubmit()")
        page.wait_for(f"{STEP}.startsWith('the server is shutting down')")
        page.wait_for("document.querySelector('#status').textContent === 'the ranks are starting again'")
        omni.force_status = None
        page.wait_for(f"{CARDS} === 1")
        assert len(omni.requests) == 2
        page.close()


def test_asks_for_a_key_and_keeps_it_for_the_tab(browser: Browser) -> None:
    omni = FakeOmni()
    with served(omni, api_keys=("secret",)) as url:
        page = opened(browser, url, is_ready=False)
        page.wait_for("!document.querySelector('#key-form').hidden")
        wait_for_focus(page, "key")
        page.type_in("#key", "wrong")
        page.press("Enter")
        page.wait_for("document.querySelector('#key-problem').textContent !== ''")
        page.type_in("#key", "secret")
        page.press("Enter")
        page.wait_for(READY)
        assert page.run("document.querySelector('#key-form').hidden")
        page.go(url + "/")
        page.wait_for(READY)
        page.type_in("#prompt", "a star")
        page.click("#draw")
        page.wait_for(f"{CARDS} === 1")
        page.close()


def test_shows_what_each_replica_does(browser: Browser) -> None:
    omni = FakeOmni()
    with served(omni) as url:
        page = opened(browser, url)
        assert "Replicas" not in text_of(page, "#server-facts")  # a single one is the server itself
        omni.force_replicas = (
            ReplicaStats(status="ready", running=1),
            ReplicaStats(status="ready"),
            ReplicaStats(status="restarting", restarts=2),
        )
        shown = "document.querySelector('#server-facts').textContent"
        page.wait_for(f"{shown}.includes('Replicasdrawing · ready · restartingDevice')")
        omni.force_replicas = (ReplicaStats(status="ready"), ReplicaStats(status="failed"))
        page.wait_for(f"{shown}.includes('Replicasready · failedDevice')")
        page.close()


def test_waits_while_the_model_loads_and_says_when_the_server_is_gone(browser: Browser) -> None:
    class Loading(FakeOmni):
        async def start(self) -> None:
            while not self.go_on.is_set():
                await asyncio.sleep(0.01)
            await super().start()

    omni = Loading()
    with served(omni) as url:
        page = opened(browser, url, is_ready=False)
        page.wait_for("document.querySelector('#status').textContent === 'loading the model'")
        assert page.run("document.querySelector('#draw').disabled")
        assert text_of(page, "#canvas") == "The model is loading."
        omni.go_on.set()
        page.wait_for(READY)
        assert text_of(page, "#status") == "ready"
    page.run("refresh()")
    assert "does not answer" in text_of(page, "#status")
    assert page.run("document.querySelector('#draw').disabled")
    page.close()


# The gallery


def test_gallery_gives_settings_back_and_forgets(browser: Browser) -> None:
    with served(FakeOmni()) as url:
        page = opened(browser, url)
        for count, prompt in enumerate(("one", "two", "three"), start=1):
            page.type_in("#prompt", prompt)
            page.type_in("#seed", str(count))
            page.click("#draw")
            page.wait_for(f"{CARDS} === {count}")
            page.wait_for(READY)
        page.click("#items li:nth-child(2) button")
        assert text_of(page, "#viewer-title") == "two"
        page.wait_for("document.querySelector('#facts').textContent.startsWith('size96 × 64seed2')")
        assert "steps4guidance4" in text_of(page, "#facts")  # the model's own
        assert page.run("document.querySelector('#download').download") == "two-2.png"
        page.press("ArrowRight")
        assert text_of(page, "#viewer-title") == "one"
        page.click("#delete")
        page.wait_for(f"{CARDS} === 2 && document.querySelector('#viewer-title').textContent === 'two'")
        page.click("#undo-last")
        page.wait_for(f"{CARDS} === 3 && document.querySelector('#viewer-title').textContent === 'one'")
        page.click("#delete")
        page.wait_for(f"{CARDS} === 2 && document.querySelector('#viewer-title').textContent === 'two'")
        page.click("#reuse")
        assert not page.run("document.querySelector('#viewer').open")
        wait_for_focus(page, "prompt")
        assert (
            page.run("['prompt', 'seed', 'width'].map((name) => document.getElementById(name).value).join()")
            == "two,2,"
        )
        page.click("#clear")
        assert page.run(CARDS) == 2  # it asks first
        page.click("#clear")
        page.wait_for(f"{CARDS} === 0")
        wait_for_focus(page, "undo")
        page.press("Enter")
        page.wait_for(f"{CARDS} === 2")
        assert text_of(page, "#say") == "Undone."
        assert not page.run("document.querySelector('#undo').checkVisibility()")
        page.go(url + "/")  # what came back is kept, in its order
        page.wait_for(f"{READY} && {CARDS} === 2")
        assert page.run("state.items.map((item) => item.settings.prompt).join()") == "three,two"
        page.click("#clear")
        page.click("#clear")
        page.wait_for(f"{CARDS} === 0")
        page.go(url + "/")
        page.wait_for(READY)
        assert page.run(CARDS) == 0
        assert not page.run("document.querySelector('#undo').checkVisibility()")
        assert page.complaints == []
        page.close()
