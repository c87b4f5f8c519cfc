"""`safegraft keys` as an operator starts it: a key is shown once, and what is wrong is said in one line."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from safegraft.stores.keys import well_formed
from tests.test_cli import refused, safegraft

BLOCKED = (
    "torch",
    "matplotlib",
    "tqdm",
    "transformers",
    "peft",
    "safetensors",
    "accelerate",
    "gguf",
    "celery",
    "fastapi",
)


def create(data: Path, *options: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(safegraft("keys", "create", "--data", data, "--json", *options).stdout)
    return made


def listed(data: Path, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(safegraft("keys", "list", "--data", data, "--json", *options).stdout)
    return found


def test_a_key_alone_is_on_standard_output_and_never_shown_again(tmp_path: Path) -> None:
    made = safegraft("keys", "create", "--data", tmp_path)
    key = made.stdout.removesuffix("\n")
    assert well_formed(key)
    assert key not in made.stderr
    assert "not shown again" in made.stderr
    [shown] = listed(tmp_path)
    assert (shown["tenant"], shown["name"], shown["scopes"]) == ("default", "default", ["write"])
    assert key.startswith(shown["hint"])
    assert len(shown["hint"]) < 10
    for command in (["keys", "list"], ["keys", "list", "--json"], ["keys", "revoke", shown["id"]]):
        after = safegraft(*command, "--data", tmp_path)
        assert key[4:] not in after.stdout + after.stderr


def test_the_key_is_nowhere_on_the_disk(tmp_path: Path) -> None:
    key = create(tmp_path)["key"]
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    assert not [path for path in kept if key[8:].encode() in path.read_bytes()]
    assert (tmp_path / "pepper").stat().st_mode & 0o077 == 0


def test_what_was_asked_for_is_what_is_made(tmp_path: Path) -> None:
    asked = ("--tenant", "acme", "--name", "ci", "--scopes", "read, admin", "--expires", "12h")
    made = create(tmp_path, *asked)
    assert (made["tenant"], made["name"], made["scopes"]) == ("acme", "ci", ["admin", "read"])
    assert made["expires_at"] - made["created_at"] == 12 * 3600
    assert well_formed(made.pop("key"))
    other = create(tmp_path)
    assert listed(tmp_path, "--tenant", "acme") == [made]
    assert [key["id"] for key in listed(tmp_path)] == [other["id"], made["id"]]


def test_options_are_environment_variables_too(tmp_path: Path) -> None:
    done = safegraft(
        "keys", "create", SAFEGRAFT_DATA=str(tmp_path), SAFEGRAFT_TENANT="acme", SAFEGRAFT_SCOPES="read",
        SAFEGRAFT_EXPIRES="1w", SAFEGRAFT_JSON="1", SAFEGRAFT_NAME="n",
    )  # fmt: skip
    made = json.loads(done.stdout)
    assert (made["tenant"], made["scopes"], made["name"]) == ("acme", ["read"], "n")
    assert made["expires_at"] - made["created_at"] == 7 * 86400


def test_a_third_live_key_is_refused_until_one_is_revoked(tmp_path: Path) -> None:
    old, new = create(tmp_path), create(tmp_path)
    assert "2 live keys" in refused("keys", "create", "--data", tmp_path, code="too_many_keys")
    create(tmp_path, "--name", "another purpose")
    create(tmp_path, "--tenant", "another")
    revoked = json.loads(safegraft("keys", "revoke", old["id"], "--data", tmp_path, "--json").stdout)
    assert revoked["revoked_at"] is not None
    create(tmp_path)
    # Again, it stays as it was.
    assert json.loads(safegraft("keys", "revoke", old["id"], "--data", tmp_path, "--json").stdout) == revoked
    live = {key["id"] for key in listed(tmp_path, "--tenant", "default") if key["revoked_at"] is None}
    assert new["id"] in live
    assert old["id"] not in live


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--scopes", "root"], "invalid_parameter"),
        (["--scopes", ""], "invalid_parameter"),
        (["--scopes", "read,,wirte"], "invalid_parameter"),
        (["--expires", "soon"], "invalid_parameter"),
        (["--expires", "0d"], "invalid_parameter"),
        (["--expires", "-1d"], "invalid_parameter"),
        (["--expires", "1y"], "invalid_parameter"),
        (["--expires", "999999w"], "invalid_parameter"),
        (["--tenant", "ACME"], "bad_tenant"),
        (["--tenant", "a/b"], "bad_tenant"),
        (["--tenant", "../up"], "bad_tenant"),
        (["--tenant", ""], "bad_tenant"),
        (["--tenant", "a" * 41], "bad_tenant"),
        (["--name", ""], "bad_name"),
        (["--name", "a\nb"], "bad_name"),
        (["--name", "n" * 101], "bad_name"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, options: list[str], code: str) -> None:
    refused("keys", "create", "--data", tmp_path, *options, code=code)
    if options[0] in ("--scopes", "--expires"):
        assert list(tmp_path.iterdir()) == []
    else:
        assert listed(tmp_path) == []


def test_a_key_that_is_not_there_cannot_be_revoked(tmp_path: Path) -> None:
    for command in (("list",), ("revoke", "key_nothing")):
        refused("keys", *command, "--data", tmp_path / "typo", code="no_installation")
    assert not (tmp_path / "typo").exists()
    create(tmp_path)
    refused("keys", "revoke", "key_nothing", "--data", tmp_path, code="key_not_found")


def test_settings_that_cannot_be_are_named(tmp_path: Path) -> None:
    message = refused("keys", "list", "--data", tmp_path, code="invalid_parameter", SAFEGRAFT_KEY_PEPPER="short")
    assert "key_pepper" in message
    assert "short" not in message.partition("at least")[0]


def test_a_list_is_whole_where_no_terminal_cuts_it(tmp_path: Path) -> None:
    made = create(tmp_path, "--name", "a rather long name [/red] of a key", "--tenant", "t" * 40)
    text = safegraft("keys", "list", "--data", tmp_path).stdout
    assert made["id"] in text
    assert "t" * 40 in text
    assert "a rather long name [/red] of a key" in text
    assert f"{made['hint']}…" in text


def test_serve_wants_a_key_that_is_alive(tmp_path: Path) -> None:
    """Not one that was revoked, nor one that has expired."""
    data = tmp_path / "data"
    assert "safegraft keys create" in refused("serve", "--data", data, code="no_api_keys")
    assert not data.exists()
    safegraft("keys", "revoke", create(data)["id"], "--data", data)
    refused("serve", "--data", data, code="no_api_keys")
    create(data, "--expires", "1m")
    with sqlite3.connect(data / "safegraft.sqlite") as database:
        database.execute("UPDATE api_keys SET expires_at = expires_at - 61")
    database.close()
    refused("serve", "--data", data, code="no_api_keys")


@pytest.mark.parametrize(
    "command",
    [
        ["keys", "create"], ["keys", "list"], ["reference", "add", "BUNDLE"], ["reference", "list"],
        ["reference", "verify", "BUNDLE"], ["inspect", "ADAPTER"], ["--version"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_gateways_image_can_run_it(tmp_path: Path, bundle: Path, fresh: Path, command: list[str]) -> None:
    """It holds neither torch nor what draws and trains; here such an import fails as it would there."""
    program = (
        "import sys\n"
        f"class Missing:\n"
        f"    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {BLOCKED[:-2]!r}: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from safegraft.cli import main\n"
        "main()\n"
    )
    (tmp_path / "safegraft.sqlite").touch()
    places = {"BUNDLE": str(bundle), "ADAPTER": str(fresh)}
    arguments = [places.get(word, word) for word in command]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SAFEGRAFT_")}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=clean | {"SAFEGRAFT_DATA": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_the_command_line_loads_nothing_heavy_before_it_is_needed() -> None:
    program = "import sys, safegraft.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not set(re.findall(r"\S+", done.stdout)) & set(BLOCKED)
