"""What else a person meets: wrong keys, bad adapters, lost connections, hostile names, long lists, nothing at all."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safegraft.adapter import CONFIG, WEIGHTS
from tests.e2e.conftest import CONTINUED, FRESH, Console, Tab
from tests.service.conftest import operate

MARKUP = '<img src=x onerror="document.title=1">'


def tar_of(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_the_first_paint_waits_for_no_data(tab: Tab) -> None:
    held: list[Any] = []
    tab.page.route("**/v1/**", lambda route: held.append(route))
    tab.open()
    assert tab.page.get_by_role("heading", name="Sign in").is_visible()
    assert tab.page.get_by_label("API key").is_editable()
    tab.look("sign-in")
    for route in held:
        route.abort()


def test_a_wrong_key_and_one_that_is_revoked_later(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.open()
    page.get_by_role("button", name="Sign in").click()
    assert page.get_by_text("Paste an API key first.").is_visible()
    page.get_by_label("API key").fill("sgk_wrong")
    page.keyboard.press("Enter")
    page.get_by_text("This key is not accepted").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    tab.look("wrong-key")

    key = console.new_key("--name", "short")
    tab.sign_in(key)
    page.reload()
    page.get_by_role("heading", name="Repair an adapter").wait_for()
    listed = json.loads(operate(console.running.data, "keys", "list", "--json"))
    held = next(item["id"] for item in listed if item["name"] == "short")
    operate(console.running.data, "keys", "revoke", held)
    page.get_by_role("link", name="Adapters", exact=True).click()
    page.get_by_text("The key is not accepted any more").wait_for()
    assert page.get_by_label("API key").is_visible()
    assert page.get_by_role("navigation").count() == 0
    assert page.evaluate("sessionStorage.getItem('safegraft.key')") is None
    assert "sgk_" not in page.url


def test_a_key_that_may_only_read_is_told_so_where_it_tries_to_write(tab: Tab, console: Console) -> None:
    tab.sign_in(console.new_key("--scopes", "read"))
    tab.choose(FRESH)
    fault = tab.page.locator(".drop").get_by_role("alert")
    fault.wait_for()
    assert "insufficient_scope" in fault.inner_text()


def test_nothing_yet_looks_like_nothing_yet(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in(console.new_key("--tenant", "newcomer"))
    page.get_by_text("No adapters yet.").wait_for()
    page.get_by_text("No realignments yet.").wait_for()
    tab.look("empty")
    for name in ("Adapters", "Realignments"):
        page.get_by_role("link", name=name, exact=True).click()
        page.get_by_text(f"No {name.lower()} yet.").wait_for()
    page.get_by_role("link", name="References", exact=True).click()
    with console.api() as client:
        (installed,) = client.get("/v1/references").json()["data"]
    page.get_by_role("heading", name=installed["name"], exact=True).wait_for()
    tab.look("references")
    tab.open("#/adapters/adp_0")
    page.get_by_role("heading", name="Adapter not found").wait_for()
    assert page.get_by_text("adapter_not_found").is_visible()
    tab.look("not-found")
    for path in ("#/adapters/%", "#/realignments/%E0%A4", "#/nothing"):
        tab.open("#/references")
        page.get_by_role("heading", name="References", exact=True).wait_for()
        tab.open(path)
        page.get_by_role("heading", name="There is no such page").wait_for()


def test_a_bad_adapter_is_refused_where_it_was_dropped(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    tab.sign_in()
    page.get_by_role("heading", name="Drop an adapter here").wait_for()
    fault = page.locator(".drop").get_by_role("alert")

    # Seen before a byte was sent.
    before = len(tab.asked)
    (tmp_path / "pickled").mkdir()
    shutil.copy(FRESH / CONFIG, tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"no pickle is opened")
    tab.choose(tmp_path / "pickled")
    fault.wait_for()
    assert "adapter_model.bin is a pickle, which is never opened" in fault.inner_text()
    assert not [url for url in tab.asked[before:] if "/v1/uploads" in url]

    # Judged by the service, which names the first offender.
    broken = tmp_path / "broken"
    shutil.copytree(FRESH, broken)
    weights = (broken / WEIGHTS).read_bytes()
    (broken / WEIGHTS).write_bytes(weights[:-100])
    tab.choose(broken)
    page.get_by_text("broken cannot be taken").wait_for()
    assert "invalid_safetensors" in fault.inner_text() or "truncated" in fault.inner_text()
    assert "req_" in fault.inner_text()
    tab.look("bad-adapter")
    # Nothing of it stays in this tab, nor at the service.
    assert page.evaluate("Object.keys(sessionStorage)") == ["safegraft.key"]
    with tab.console.api() as client:
        assert client.get("/v1/files").json()["data"] == []


def test_markup_in_names_is_text(tab: Tab, console: Console, tmp_path: Path) -> None:
    page = tab.page
    dialogs: list[Any] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog))
    tab.sign_in()
    config = json.loads((FRESH / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = f"{MARKUP}\u202egnp.exe"
    files = {CONFIG: json.dumps(config).encode(), WEIGHTS: (FRESH / WEIGHTS).read_bytes()}
    files[f"{MARKUP.replace('/', '')}.bin"] = b"left out"
    archive = tar_of(tmp_path / f"{MARKUP}.tar", files)
    tab.choose_archive(archive)
    page.get_by_role("heading", name="What it is").wait_for()
    assert page.get_by_role("heading", level=1).inner_text() == MARKUP
    assert page.locator("main img").count() == 0
    assert page.get_by_text("No installed reference knows the label").is_visible()
    # What turns the direction of writing is shown as what it is.
    assert "\u202e" not in page.locator("main").inner_text()
    tab.look("hostile-names")
    page.get_by_role("link", name="Adapters", exact=True).first.click()
    page.get_by_role("link", name=MARKUP).wait_for()
    assert page.title() == "Adapters · safegraft"
    assert dialogs == []


def test_a_folder_is_dropped_as_a_file_manager_drops_it(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    tab.sign_in()
    run = tmp_path / "run-7"
    shutil.copytree(CONTINUED, run / "final")
    shutil.copytree(CONTINUED, run / "final" / "checkpoint-10")
    (run / "final" / "training_args.bin").write_bytes(b"no pickle is opened")
    box = page.locator(".drop").bounding_box()
    browser = page.context.new_cdp_session(page)
    where = {"x": box["x"] + 20, "y": box["y"] + 20}
    data = {"items": [], "files": [str(run)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver"):
        browser.send("Input.dispatchDragEvent", {"type": kind, **where, "data": data})
    page.locator(".drop.over").wait_for()
    tab.look("drag-over")
    browser.send("Input.dispatchDragEvent", {"type": "drop", **where, "data": data})
    page.get_by_role("heading", name="What it is").wait_for()
    # Of several folders the highest that holds an adapter; what lies beside and below it stays at home.
    assert page.get_by_role("heading", level=1).inner_text() == "final"
    warned = page.get_by_label("Warnings").inner_text()
    assert "training_args.bin" in warned
    assert "checkpoint-10" in warned
    assert not [url for url in tab.asked if "training_args" in url]


def test_an_upload_goes_on_after_a_reload_and_after_a_break(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    files = {path.name: path.read_bytes() for path in CONTINUED.iterdir()}
    # Kept out of the adapter, but five parts long.
    archive = tar_of(tmp_path / "long.tar", {**files, "optimizer.pt": bytes(range(256)) * (34 * 4096)})
    parts = "**/v1/uploads/*/parts"
    sent: list[str] = []
    held: list[Any] = []

    def hold_from(number: int) -> Callable[[Any], None]:
        def handle(route: Any) -> None:
            if route.request.method != "POST":
                route.continue_()
            elif len(sent) < number:
                sent.append(route.request.url)
                route.continue_()
            else:
                held.append(route)

        return handle

    page.on("dialog", lambda dialog: dialog.accept())
    tab.sign_in()
    page.route(parts, hold_from(2))
    tab.choose_archive(archive)
    page.get_by_text("hashed while it is sent").wait_for()
    page.wait_for_function("() => document.querySelector('.drop progress').value > 0.3")
    tab.look("uploading")
    page.unroute(parts)
    page.reload()
    page.get_by_role("heading", name="Drop an adapter here").wait_for()

    # The same file again: two parts are there; then the line breaks.
    asked = len(tab.asked)
    offline: list[str] = []

    def lose(route: Any) -> None:
        if route.request.method == "POST" and not offline:
            offline.append(route.request.url)
            page.context.set_offline(True)
            route.abort()
        else:
            route.continue_()

    page.route(parts, lose)
    tab.choose_archive(archive)
    page.get_by_text("Waiting for the connection.").wait_for()
    page.get_by_text("This device is offline").wait_for()
    tab.look("offline")
    page.unroute(parts)
    page.context.set_offline(False)
    page.get_by_role("heading", name="What it is").wait_for()
    uploads = [url for url in tab.asked[asked:] if url.endswith("/v1/uploads")]
    assert uploads == [], "it went on with the upload that was there"
    assert "optimizer.pt" in page.get_by_label("Warnings").inner_text()


def held_upload(tab: Tab, path: Path) -> Path:
    """An archive of two parts, chosen, of which the first is on its way and does not arrive."""
    files = {file.name: file.read_bytes() for file in CONTINUED.iterdir()}
    archive = tar_of(path, {**files, "optimizer.pt": bytes(range(256)) * (34 * 4096)})
    held: list[Any] = []
    tab.page.route("**/v1/uploads/*/parts", lambda route: held.append(route))
    tab.choose_archive(archive)
    tab.page.locator(".uploading progress").wait_for()
    while not held:
        tab.page.wait_for_timeout(50)
    return archive


def test_an_upload_goes_on_while_other_pages_are_looked_at(tab: Tab, tmp_path: Path) -> None:
    page = tab.page
    tab.sign_in()
    archive = held_upload(tab, tmp_path / "wandering.tar")
    tab.open("#/adapters")
    page.get_by_role("heading", name="Adapters", exact=True).wait_for()
    tab.open("#/")
    page.locator(".drop.busy progress").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped. Drop the same files again").wait_for()
    page.unroute_all(behavior="ignoreErrors")
    page.reload()
    page.get_by_text("Not sent to its end: wandering.tar").wait_for()
    tab.look("unfinished")
    page.route("**/v1/adapters", lambda route: (page.wait_for_timeout(1500), route.continue_()))
    tab.choose_archive(archive)
    page.get_by_text("Hashed and sent.").wait_for()
    tab.open("#/references")
    page.get_by_role("heading", name="References", exact=True).wait_for()
    page.wait_for_timeout(4000)
    assert page.url.endswith("#/references"), "nobody is taken away from what they look at"
    tab.open("#/")
    page.get_by_role("link", name="wandering").first.wait_for()
    page.locator(".drop").get_by_text("has arrived.").wait_for()


def test_signing_out_in_mid_upload_leaves_nothing_to_who_comes_next(tab: Tab, console: Console, tmp_path: Path) -> None:
    page = tab.page
    tab.sign_in()
    held_upload(tab, tmp_path / "left.tar")
    page.get_by_role("link", name="References", exact=True).click()
    page.get_by_role("heading", name="References", exact=True).wait_for()
    page.get_by_role("button", name="Sign out").click()
    page.unroute_all(behavior="ignoreErrors")
    page.get_by_label("API key").fill(console.key)
    page.keyboard.press("Enter")
    # At the beginning, not on the page that somebody else had left.
    page.get_by_role("heading", name="Repair an adapter").wait_for()
    page.wait_for_timeout(500)
    assert page.locator(".upload-state").inner_text() == ""
    assert page.get_by_text("Not sent to its end").count() == 0


def test_a_page_that_was_left_does_nothing_more(tab: Tab, console: Console) -> None:
    page = tab.page
    adapter = console.upload(FRESH, name="left alone")
    tab.sign_in()
    page.get_by_role("link", name="References", exact=True).click()
    page.get_by_role("heading", name="References", exact=True).wait_for()
    page.get_by_role("link", name="Adapters", exact=True).click()
    page.get_by_label("Name", exact=True).fill("not sent")
    page.go_back()
    page.get_by_role("heading", name="References", exact=True).wait_for()
    page.wait_for_timeout(300)
    assert page.url.endswith("#/references")

    tab.open(f"#/adapters/{adapter['id']}")
    page.get_by_role("button", name="Delete adapter").click()
    page.get_by_role("dialog").wait_for()
    page.go_back()
    page.get_by_role("heading", name="References", exact=True).wait_for()
    assert page.get_by_role("dialog").count() == 0

    tab.open(f"#/adapters/{adapter['id']}")
    page.route("**/v1/realignments", lambda route: (page.wait_for_timeout(1000), route.continue_()))
    page.get_by_role("button", name="Start the realignment").click()
    page.get_by_role("link", name="References", exact=True).click()
    page.wait_for_timeout(2500)
    assert page.url.endswith("#/references")
    with console.api() as client:
        jobs = client.get("/v1/realignments", params={"adapter_id": adapter["id"]}).json()["data"]
        assert len(jobs) == 1
        assert client.get(f"/v1/adapters/{adapter['id']}").status_code == 200


def test_an_answer_that_is_lost_makes_no_second_job(tab: Tab, console: Console) -> None:
    page = tab.page
    adapter = console.upload(FRESH, name="lost answer")
    tab.sign_in()
    tab.open(f"#/adapters/{adapter['id']}")
    page.get_by_label("general_weight", exact=True).fill("0.4")

    def lose(route: Any) -> None:
        if route.request.method == "POST":
            route.fetch()
            route.abort()
        else:
            route.continue_()

    page.route("**/v1/realignments", lose)
    page.get_by_role("button", name="Start the realignment").click()
    page.locator("form.start").get_by_text("The service does not answer.").wait_for()
    page.unroute_all(behavior="ignoreErrors")
    page.reload()
    assert page.get_by_label("general_weight", exact=True).input_value() == "0.4"
    page.get_by_role("button", name="Start the realignment").click()
    page.wait_for_url("**#/realignments/*")
    with console.api() as client:
        assert len(client.get("/v1/realignments", params={"adapter_id": adapter["id"]}).json()["data"]) == 1


def test_a_list_of_references_that_cannot_be_read_is_not_called_empty(tab: Tab, console: Console) -> None:
    page = tab.page
    adapter = console.upload(FRESH, name="without references for now")
    tab.sign_in()
    fault = {"error": {"message": "The database does not answer.", "code": "database_unavailable", "type": "x"}}
    page.route("**/v1/references", lambda route: route.fulfill(status=503, json=fault))
    tab.open(f"#/adapters/{adapter['id']}")
    page.get_by_text("The database does not answer.").wait_for()
    assert page.get_by_text("No reference is installed").count() == 0
    page.unroute("**/v1/references")
    page.get_by_role("button", name="Try again").click()
    page.get_by_role("heading", name="Realign it").wait_for()


def test_nothing_scrolls_sideways_on_the_narrowest_phones(tab: Tab, console: Console) -> None:
    page = tab.page
    adapter = console.upload(FRESH, name="narrow")
    tab.sign_in()
    page.set_viewport_size({"width": 320, "height": 640})
    for where in ("#/", "#/adapters", f"#/adapters/{adapter['id']}", "#/realignments", "#/references"):
        tab.open(where)
        page.locator("h1").wait_for()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= 320, where


def test_cancel_and_delete_ask_first(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="to be cancelled")
    with console.engine_stopped(), console.api() as client:
        job = client.post("/v1/realignments", json={"adapter_id": adapter["id"]}).json()
        tab.open(f"#/realignments/{job['id']}")
        page.locator(".badge", has_text="Running").wait_for()
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("dialog").get_by_role("button", name="Keep it").click()
        assert console.job(job["id"])["status"] == "running"
        page.get_by_role("button", name="Cancel").click()
        tab.look("cancel")
        page.get_by_role("button", name="Cancel it").click()
        page.locator(".badge", has_text="Cancelling").wait_for()
        # A worker hears of it with a heartbeat, which leaves no trace; an engine that goes on before has ended by then.
        page.wait_for_timeout(8000)
    page.locator(".badge", has_text="Cancelled").wait_for()
    assert page.evaluate("document.activeElement.tagName") == "H1", "the button that had the keyboard is gone"
    tab.look("cancelled")
    page.get_by_role("button", name="Delete").click()
    page.keyboard.press("Escape")
    assert console.job(job["id"])["status"] == "cancelled"
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete it").click()
    page.get_by_role("heading", name="Realignments", exact=True).wait_for()
    assert console.job(job["id"])["error"]["code"] == "realignment_not_found"

    tab.open(f"#/adapters/{adapter['id']}")
    page.get_by_role("button", name="Delete adapter").click()
    page.get_by_role("button", name="Delete it").click()
    page.get_by_role("heading", name="Adapters", exact=True).wait_for()
    with console.api() as client:
        assert client.get(f"/v1/adapters/{adapter['id']}").status_code == 404


def test_a_job_that_fails_says_whose_move_it_is(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="not continued")
    with console.api() as client:
        method = {"type": "nlsr", "form": "factor"}
        job = client.post("/v1/realignments", json={"adapter_id": adapter["id"], "method": method}).json()
    tab.open(f"#/realignments/{job['id']}")
    page.get_by_text("It failed: another request is needed").wait_for()
    assert page.get_by_text("lineage_mismatch").is_visible()
    tab.look("failed")


def test_a_download_that_was_damaged_is_not_saved(tab: Tab, console: Console) -> None:
    page = tab.page
    adapter = console.upload(FRESH, name="damaged on the way")
    saved: list[Any] = []
    page.on("download", lambda download: saved.append(download))

    def damage(route: Any) -> None:
        answer = route.fetch()
        body = bytearray(answer.body())
        body[len(body) // 2] ^= 1
        route.fulfill(response=answer, body=bytes(body))

    page.route("**/download", damage)
    page.route("**/files/*", damage)
    tab.sign_in()
    tab.open(f"#/adapters/{adapter['id']}")
    page.get_by_role("button", name="Download (.tar)").click()
    page.get_by_text(f"{WEIGHTS} arrived with another SHA-256").wait_for()
    tab.look("damaged")
    page.get_by_role("button", name=f"Download {CONFIG}").click()
    page.get_by_text(f"{CONFIG} arrived with another SHA-256").wait_for()
    assert saved == []


def test_lists_turn_pages_and_narrow(tab: Tab, console: Console) -> None:
    page = tab.page
    adapter = console.upload(FRESH, name="listed")
    with console.api() as client:
        made = []
        with console.engine_stopped():
            for number in range(23):
                body = {"adapter_id": adapter["id"], "metadata": {"team": "even" if number % 2 == 0 else "odd"}}
                job = client.post("/v1/realignments", json=body).raise_for_status().json()
                made.append(job["id"])
                client.post(f"/v1/realignments/{job['id']}/cancel").raise_for_status()
    tab.sign_in()
    tab.open(f"#/realignments?adapter_id={adapter['id']}")
    rows = page.get_by_role("list", name="realignments").get_by_role("listitem")
    page.get_by_text("Page 1", exact=True).wait_for()
    assert rows.count() == 20
    tab.look("realignments")
    page.get_by_role("button", name="Older →").click()
    page.get_by_text("Page 2", exact=True).wait_for()
    assert rows.count() == 3
    rows.first.get_by_role("link").first.click()
    page.get_by_role("heading", name="The request").wait_for()
    page.go_back()
    page.get_by_text("Page 2", exact=True).wait_for()
    page.get_by_role("button", name="← Newer").press("Enter")
    page.get_by_text("Page 1", exact=True).wait_for()
    assert page.evaluate("document.activeElement.textContent") == "← Newer", "the keyboard stays where it was"
    # Twice, before the first answer: one page further.
    page.get_by_role("button", name="Older →").dblclick()
    page.get_by_text("Page 2", exact=True).wait_for()
    page.wait_for_timeout(300)
    assert (rows.count(), page.get_by_text("Page 2", exact=True).count()) == (3, 1)
    page.get_by_role("button", name="← Newer").click()
    page.get_by_text("Page 1", exact=True).wait_for()
    page.get_by_label("Metadata").fill("team")
    page.keyboard.press("Enter")
    page.get_by_text("Write key=value").wait_for()
    page.get_by_label("Metadata").fill("team=odd")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.rows > li').length === 11")
    assert page.url.endswith("metadata=team%3Dodd")
    page.reload()
    page.wait_for_function("() => document.querySelectorAll('.rows > li').length === 11")
    # Metadata that is there and empty is another thing than none looked for.
    page.get_by_label("Metadata").fill("team=")
    page.keyboard.press("Enter")
    page.get_by_role("paragraph").filter(has_text="No realignment matches these filters.").wait_for()
    page.get_by_label("Metadata").fill("team=odd")
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('.rows > li').length === 11")
    page.get_by_label("Status").select_option("succeeded")
    page.get_by_role("paragraph").filter(has_text="No realignment matches these filters.").wait_for()
    tab.open("#/adapters")
    page.get_by_role("list", name="adapters").wait_for()
    tab.look("adapters")
    page.get_by_label("Name", exact=True).fill("LISTE")
    page.keyboard.press("Enter")
    names = "[...document.querySelectorAll('.rows a')].map((a) => a.textContent)"
    page.wait_for_function(f"() => {names}.length && {names}.every((name) => name === 'listed')")
    assert page.url.endswith("#/adapters?name=LISTE")
    page.get_by_label("Origin").select_option("realigned")
    page.get_by_role("paragraph").filter(has_text="No adapter matches these filters.").wait_for()
    tab.look("adapters-none")
    page.reload()
    page.get_by_role("paragraph").filter(has_text="No adapter matches these filters.").wait_for()
    assert page.get_by_label("Name", exact=True).input_value() == "LISTE"


def test_streams_that_are_refused_become_questions(tab: Tab, console: Console) -> None:
    """The service has no place for another stream: the page asks instead, and still sees the end."""
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="polled")
    body = {"error": {"message": "Too many streams.", "code": "too_many_streams", "type": "x", "param": None}}

    def refuse(route: Any) -> None:
        if "text/event-stream" in route.request.headers.get("accept", ""):
            route.fulfill(status=429, json=body)
        else:
            route.continue_()

    page.route("**/events", refuse)
    with console.engine_stopped(), console.api() as client:
        job = client.post("/v1/realignments", json={"adapter_id": adapter["id"]}).json()
        tab.open(f"#/realignments/{job['id']}")
        page.get_by_text("asked every two seconds").wait_for()
    page.get_by_role("heading", name="Report", exact=True).wait_for()


def test_progress_goes_on_where_it_was_after_a_break(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.sign_in()
    adapter = console.upload(FRESH, name="interrupted")
    seen: list[str | None] = []

    def note(request: Any) -> None:
        if request.url.endswith("/events") and "text/event-stream" in request.headers.get("accept", ""):
            seen.append(request.headers.get("last-event-id"))

    page.on("request", note)
    with console.engine_stopped(), console.api() as client:
        job = client.post("/v1/realignments", json={"adapter_id": adapter["id"]}).json()
        tab.open(f"#/realignments/{job['id']}")
        page.get_by_text("Attempt 1 started.").wait_for()
        page.context.set_offline(True)
        page.get_by_text("No connection.").wait_for()
        tab.look("running-offline")
        page.context.set_offline(False)
        page.get_by_text("Live.").wait_for()
        page.get_by_text("This device is offline").wait_for(state="hidden")
    page.get_by_role("heading", name="Report", exact=True).wait_for()
    # The first time from the beginning, then after the last event that had come; and nothing is told twice.
    assert seen[0] is None
    assert seen[-1] is not None
    assert page.locator(".events li").all_inner_texts()[-1].endswith("The result is ready.")
    assert page.locator(".events li").count() == 3


def test_what_is_loading_and_what_could_not_be_loaded(tab: Tab) -> None:
    page = tab.page
    tab.sign_in()
    held: list[Any] = []
    page.route("**/v1/adapters?*", lambda route: held.append(route))
    page.get_by_role("link", name="Adapters", exact=True).click()
    page.get_by_text("Loading …").wait_for()
    page.get_by_role("heading", name="Adapters", exact=True).wait_for()
    tab.look("loading")
    for route in held:
        route.abort()
    page.get_by_text("The list of adapters could not be read.").wait_for()
    page.get_by_text("The service does not answer. What is shown").wait_for()
    tab.look("unreachable")
    page.unroute("**/v1/adapters?*")
    # By hand, or by itself when the next look at the service's health succeeds: whichever comes first.
    page.evaluate("() => document.querySelector('.fault-note button')?.click()")
    page.get_by_role("alert").wait_for(state="hidden")
    page.get_by_text("What is shown may be old").wait_for(state="hidden")


def test_a_keyboard_is_enough_and_themes_are_kept(tab: Tab, console: Console) -> None:
    page = tab.page
    tab.open()
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type(console.key)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Repair an adapter").wait_for()
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator(".skip").focus()
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Choose a folder"
    theme = page.get_by_role("button", name="Theme")
    for name, colour in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(17, 22, 28)")):
        theme.click()
        assert f"Theme: {name}" in theme.inner_text()
        page.reload()
        theme.wait_for()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colour
    page.get_by_role("button", name="Sign out").click()
    assert page.get_by_label("API key").is_visible()
    assert page.evaluate("sessionStorage.getItem('safegraft.key')") is None
