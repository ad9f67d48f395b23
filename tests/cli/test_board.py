"""The board in a real browser, over runs that train while it is open."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.smoke.local_s3 import S3Server
from tests.browser import chromium
from tests.cli.conftest import ENVIRONMENT
from tests.material import Workshop, make_data
from tests.needs import need
from tests.unit.evaluate.test_rollouts import choices
from tests.unit.export.test_served import stub
from tests.unit.launcher.test_board import HOSTILE, hostile_run
from trainer.config import dump_config
from trainer.run import layout
from trainer.run.records import newest_records
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store, open_store

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]

AXE = Path(__file__).parents[2] / ".servers/node_modules/axe-core/axe.min.js"
PATIENCE_MS = 300_000


@contextmanager
def board(*arguments: object, folder: Path) -> Iterator[tuple[str, str]]:
    """`capstan board` over `arguments`. Yields its address without a path, and its token. It ends by Ctrl-C."""
    command = [sys.executable, "-m", "launcher.cli", "board", *map(str, arguments), "--port", "0"]
    environment = {**ENVIRONMENT, **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            found = re.search(r"(http://127\.0\.0\.1:\d+)/\?token=(\S+)", process.stderr.readline())
            assert found, process.stderr.read()
            yield found[1], found[2]
        finally:
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
    assert process.returncode == 0, said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@contextmanager
def page_of(browser: Any, address: str, token: str, **options: Any) -> Iterator[Any]:
    """A tab that has the board's cookie. It fails when a script fails, a policy is broken or another server is asked."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    wrong: list[str] = []
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE_MS)
    tab.on("pageerror", lambda error: wrong.append(f"a script failed: {error}"))
    tab.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}") or dialog.dismiss())
    tab.on("console", lambda said: "Content Security Policy" in said.text and wrong.append(said.text))
    tab.on("request", lambda asked: asked.url.startswith((address, "data:")) or wrong.append(f"it asks {asked.url}"))
    try:
        tab.goto(f"{address}/?token={token}")
        assert "token" not in tab.url
        yield tab
    finally:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("board"))


def configured(workshop: Workshop, name: str, *settings: str) -> Path:
    held_out = make_data(workshop.folder / "eval.jsonl", documents=8, seed=9)
    prompts = workshop.folder / "prompts.txt"
    prompts.write_text("the ant?\nthe bee?\n")
    given = (f"data.eval=[{{path: '{held_out}'}}]", "eval.every=20", f"eval.prompts={prompts}")
    path = workshop.folder / f"{name}.yaml"
    path.write_text(dump_config(workshop.config(name, *given, *settings)))
    return path


def outcome(folder: Store) -> Any:
    return next((record["outcome"] for record in reversed(newest_records(folder)) if record["kind"] == "end"), None)


@pytest.fixture(scope="module")
def trained(workshop: Workshop) -> Store:
    """A run that has ended, with an evaluation, samples and checkpoints."""
    path = configured(workshop, "trained", "train.steps=40")
    command = [sys.executable, "-m", "launcher.cli", "train", str(path)]
    subprocess.run(command, check=True, env=ENVIRONMENT, cwd=workshop.folder, timeout=600, capture_output=True)
    return workshop.store.sub("trained")


def shown_step(tab: Any) -> int:
    return int(tab.locator("#summary data[data-of='progress/step']").get_attribute("value"))


def test_a_curve_grows_without_a_reload_and_the_buttons_stop_and_resume_the_run(
    workshop: Workshop, browser: Any
) -> None:
    path, folder = configured(workshop, "live", "train.steps=100000"), workshop.store.sub("live")
    training = subprocess.Popen(
        [sys.executable, "-m", "launcher.cli", "train", str(path)],
        env=ENVIRONMENT,
        cwd=workshop.folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with (
            board(f"{workshop.folder}/store", folder=workshop.folder) as (address, token),
            page_of(browser, address, token) as tab,
        ):
            tab.locator("a", has_text="live").click()
            tab.wait_for_selector("#course svg.chart")
            tab.evaluate("document.body.dataset.mark = 'not reloaded'")
            step, curve = shown_step(tab), tab.inner_html("#course")
            tab.wait_for_selector(f"#summary data[data-of='progress/step']:not([value='{step}'])")
            assert shown_step(tab) > step
            assert tab.inner_html("#course") != curve
            tab.click("[data-opens=dialog-stop]")
            tab.wait_for_selector(f"#dialog-stop:has-text('capstan stop live --store {workshop.folder}/store')")
            tab.click("#dialog-stop button:has-text('Stop')")
            tab.wait_for_selector("#how:has-text('done')")
            tab.wait_for_selector("#summary .state.stopped")
            assert training.wait(timeout=120) == 75
            stopped = max(committed_steps(folder))
            tab.click("[data-opens=dialog-resume]:enabled")
            tab.fill("#dialog-resume [name=settings]", f"train.steps={stopped + 10}")
            tab.wait_for_selector(f"#dialog-resume code:has-text('train.steps={stopped + 10}')")
            tab.click("#dialog-resume button:has-text('Resume')")
            tab.wait_for_selector("#summary .state.running, #summary .state.finished")
            tab.wait_for_selector("#summary .state.finished")
            assert shown_step(tab) == stopped + 10
            assert tab.evaluate("document.body.dataset.mark") == "not reloaded"
    finally:
        if training.poll() is None:
            os.killpg(training.pid, signal.SIGKILL)
    assert max(committed_steps(folder)) == stopped + 10


def test_a_run_of_the_form_goes_on_when_the_page_is_closed_and_the_board_has_ended(
    workshop: Workshop, browser: Any, tmp_path: Path
) -> None:
    with (
        board(tmp_path / "runs", folder=tmp_path) as (address, token),
        page_of(browser, address, token) as tab,
    ):
        tab.goto(f"{address}/new")
        tab.fill("[name=base]", str(workshop.base))
        tab.fill("[name=data]", str(workshop.data)[:-5])
        tab.wait_for_selector(f"#files option[value='{workshop.data}']", state="attached")
        tab.fill("[name=data]", str(workshop.data))
        tab.press("[name=data]", "Tab")
        tab.wait_for_selector("#verdict dt:has-text('length')")
        text = tab.input_value("[name=config]")
        tab.fill("[name=config]", text.replace("epochs:", "epoch:"))
        tab.wait_for_selector("#verdict .wrong:has-text('train.epoch')")
        changed = re.sub(r"epochs:.*", "steps: 3", text).replace("quant:", "model_unused:")
        tab.fill("[name=config]", changed)
        tab.wait_for_selector("#verdict .wrong:has-text('model_unused')")
        tab.fill("[name=config]", re.sub(r"epochs:.*", "steps: 3", text))
        tab.wait_for_selector("#verdict dd:has-text('3 steps')")
        tab.click("text=Look at the data")
        tab.wait_for_selector("#how:has-text('done')")
        assert "trained tokens" in tab.inner_text("#job pre")
        tab.click("#config button:has-text('Start')")
        tab.wait_for_selector("#job a:has-text('its page')")
        tab.wait_for_selector("#how:has-text('goes on')")
    assert (tmp_path / "run.yaml").is_file()
    (name,) = [text.split(":")[1].strip() for text in changed.splitlines() if text.strip().startswith("name:")][:1]
    folder = open_store(str(tmp_path / "runs")).sub(name.split("#")[0].strip())
    wait_until(lambda: outcome(folder) == "finished")


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait as long as the test may take; its time-out ends it."""
    while not holds():
        time.sleep(0.5)


def test_a_checkpoint_answers_beside_its_base_in_pieces(workshop: Workshop, trained: Store, browser: Any) -> None:
    with (
        board(f"{workshop.folder}/store", folder=workshop.folder) as (address, token),
        page_of(browser, address, token) as tab,
    ):
        tab.goto(f"{address}/runs/0/trained/talk")
        tab.click("button:has-text('Begin')")
        # What is said while the model is being loaded is answered when it is there.
        tab.fill("[name=text]", "the ant?")
        tab.click("button:has-text('Say')")
        tab.wait_for_selector(".turn h3:has-text('the base')")
        tab.wait_for_selector("#how:has-text('Your turn')")
        tab.reload()
        tab.fill("[name=text]", "the bee?")
        tab.click("button:has-text('Say')")
        tab.wait_for_selector(".turn:nth-of-type(6)")
        tab.wait_for_selector("#how:has-text('Your turn')")
        heads, texts = (tab.locator(f".turn {part}").all_inner_texts() for part in ("h3", "pre"))
        assert heads == ["you", "the base", "the checkpoint"] * 2
        assert (texts[0], texts[3]) == ("the ant?", "the bee?")
        tab.click("button:has-text('Begin anew')")
        tab.wait_for_selector(".turn", state="detached")


def test_a_server_answers_in_place_of_ranks(workshop: Workshop, trained: Store, browser: Any) -> None:
    with (
        stub(choices, "base", "trained") as url,
        board(f"{workshop.folder}/store", folder=workshop.folder) as (address, token),
        page_of(browser, address, token) as tab,
    ):
        tab.goto(f"{address}/runs/0/trained/talk")
        tab.fill("[name=server]", "no address")
        tab.click("button:has-text('Begin')")
        tab.wait_for_selector("#how:has-text('is no URL of a server')")
        tab.click("text=Another checkpoint")
        tab.fill("[name=server]", url)
        tab.click("button:has-text('Begin')")
        tab.fill("[name=text]", "the ant?")
        tab.click("button:has-text('Say')")
        tab.wait_for_selector("#how:has-text('Your turn')")
        tab.wait_for_selector(".turn h3:has-text('the checkpoint')")
        assert tab.locator(".turn h3").all_inner_texts() == ["you", "the checkpoint"]


def test_a_folder_that_an_adversary_made_is_shown_as_text(browser: Any, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "runs"))
    run = hostile_run(store)
    with (tmp_path / "runs/demo" / layout.rank_log(1, 0)).open("ab") as log:
        log.truncate(2**31)  # of nothing, which takes no room
        log.write(HOSTILE.encode() + b"\n")
    run.put("metrics/000003.jsonl", b"\x00\xff" * 2**20 + b'{"kind": "step", "step": ' + b"9" * 5000 + b"}\n")
    with board(tmp_path / "runs", folder=tmp_path) as (address, token), page_of(browser, address, token) as tab:
        for place in (
            "/",
            "/?words=<script>alert(1)</script>",
            "/runs/0/demo",
            "/runs/0/demo/logs?words=onload",
            "/runs/0/demo/logs",
            "/runs/0/demo/samples",
            "/runs/0/demo/rows",
            "/runs/0/broken",
            "/compare?run=0/demo&run=0/broken",
            "/runs/0/<script>alert(1)</script>",
        ):
            tab.goto(f"{address}{place}", wait_until="load")
            tab.wait_for_timeout(1000)  # what is loaded later would run by then
            assert tab.locator("script:not([src])").count() == 0, place
            assert tab.locator("[onload], [onclick], [href^=javascript]").count() == 0, place
            assert len(tab.content()) < 300_000, place


FIVE = ("/", "/runs/0/trained", "/compare?run=0/trained&run=0/trained", "/new", "/runs/0/trained/talk")
BELOW = ("logs", "samples", "rows")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("dark", 360)])
def test_axe_finds_nothing_serious(workshop: Workshop, trained: Store, browser: Any, scheme: str, width: int) -> None:
    need(None if AXE.is_file() else "axe-core is missing: make servers")
    with (
        board(f"{workshop.folder}/store", folder=workshop.folder) as (address, token),
        page_of(browser, address, token, color_scheme=scheme, bypass_csp=True) as tab,
    ):
        tab.set_viewport_size({"width": width, "height": 800})
        for place in (*FIVE, *(f"/runs/0/trained/{part}" for part in BELOW)):
            tab.goto(f"{address}{place}")
            tab.add_script_tag(path=AXE)
            found = tab.evaluate("axe.run()")["violations"]
            serious = [
                f"{place}: {one['id']}: {one['nodes'][0]['html'][:200]}"
                for one in found
                if one["impact"] in ("serious", "critical")
            ]
            assert serious == []


def test_pages_fit_a_phone_and_are_small(workshop: Workshop, trained: Store, browser: Any) -> None:
    with (
        board(f"{workshop.folder}/store", folder=workshop.folder) as (address, token),
        page_of(browser, address, token) as tab,
    ):
        tab.set_viewport_size({"width": 360, "height": 740})
        for place in (*FIVE, *(f"/runs/0/trained/{part}" for part in BELOW)):
            tab.goto(f"{address}{place}")
            tab.wait_for_timeout(500)
            wide = tab.evaluate("document.documentElement.scrollWidth")
            assert wide <= 360, (place, wide)
            assert len(tab.content().encode()) < 300_000


def test_a_dialog_is_left_by_the_keyboard_and_its_button_has_the_focus_again(
    workshop: Workshop, trained: Store, browser: Any
) -> None:
    with (
        board(f"{workshop.folder}/store", folder=workshop.folder) as (address, token),
        page_of(browser, address, token) as tab,
    ):
        tab.goto(f"{address}/runs/0/trained")
        tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.className") == "skip"
        tab.focus("[data-opens=dialog-export]")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("#dialog-export[open]")
        tab.keyboard.press("Escape")
        tab.wait_for_selector("#dialog-export", state="hidden")
        assert tab.locator("dialog[open]").count() == 0
        tab.wait_for_function("document.activeElement.dataset.opens == 'dialog-export'")


def test_a_thousand_runs_of_a_bucket_are_a_page(own_server: S3Server, tmp_path: Path, browser: Any) -> None:
    store = open_store(own_server.uri("many"))
    steps = ({"kind": "step", "step": step, "loss": 2.0, "time": 1.7e9 + step} for step in range(1, 50))
    lines = "".join(json.dumps(step) + "\n" for step in steps).encode()
    with ThreadPoolExecutor(16) as pool:
        every = [f"run-{number}" for number in range(1000)]
        list(pool.map(lambda name: store.put(f"{name}/config.yaml", b"run: {name: x}\n"), every))
        list(pool.map(lambda name: store.put(f"{name}/metrics/000001.jsonl", lines), every))
    with board(store.uri, folder=tmp_path) as (address, token), page_of(browser, address, token) as tab:
        assert tab.locator("tbody tr").count() == 50
        tab.wait_for_selector("#count:text-is('1,000 runs')")
        tab.goto(f"{address}/?words=run-77")
        assert "11 of 1,000 runs" in tab.inner_text("#count")
