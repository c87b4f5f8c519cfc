"""The pepper: one for an installation, in a file that its owner alone reads, and of no use to be guessed at."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from safegraft.errors import SystemFault
from safegraft.settings import SharedSettings
from safegraft.vault import FILE, Vault, open_vault


def test_marks_depend_on_text_and_pepper() -> None:
    vault = Vault(b"pepper one")
    assert vault.mark("key") == vault.mark("key") == Vault(b"pepper one").mark("key")
    assert len({vault.mark("key"), vault.mark("Key"), vault.mark(""), Vault(b"pepper two").mark("key")}) == 4
    assert "key" not in vault.mark("key")


def test_seals_open_with_their_pepper_alone() -> None:
    vault = Vault(b"pepper one")
    sealed = vault.seal("whsec_ü")
    assert vault.unseal(sealed) == Vault(b"pepper one").unseal(sealed) == "whsec_ü"
    assert "whsec" not in sealed
    assert vault.seal("whsec_ü") != sealed  # equal secrets do not look equal
    with pytest.raises(SystemFault) as raised:
        Vault(b"pepper two").unseal(sealed)
    assert raised.value.code == "wrong_pepper"
    assert "SAFEGRAFT_KEY_PEPPER" in str(raised.value)
    middle = len(sealed) // 2
    changed = sealed[:middle] + ("A" if sealed[middle] != "A" else "B") + sealed[middle + 1 :]
    for wrong in (changed, "", "nothing", sealed[:-4]):
        with pytest.raises(SystemFault, match="cannot be read with this pepper"):
            vault.unseal(wrong)


def test_a_pepper_is_made_once_and_is_its_owners_alone(tmp_path: Path) -> None:
    settings = SharedSettings(data=tmp_path / "new" / "data")
    before = os.umask(0)
    try:
        first = open_vault(settings)
    finally:
        os.umask(before)
    path = settings.data / FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 64
    assert [item.name for item in settings.data.iterdir()] == [FILE]
    assert open_vault(settings).mark("x") == first.mark("x")
    assert open_vault(SharedSettings(data=tmp_path / "other")).mark("x") != first.mark("x")


def test_a_given_pepper_needs_no_file(tmp_path: Path) -> None:
    settings = SharedSettings(data=tmp_path / "data", key_pepper=SecretStr("sixteen letters!"))
    assert open_vault(settings).mark("x") == Vault(b"sixteen letters!").mark("x")
    assert not (tmp_path / "data").exists()
    assert "sixteen" not in repr(settings)


def test_a_short_pepper_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="at least 16 characters"):
        SharedSettings(data=tmp_path, key_pepper=SecretStr("fifteen letters"))


@pytest.mark.parametrize("body", [b"", b"\n", b"short", b"  fifteen letters \n"])
def test_a_file_without_a_pepper_is_not_used(tmp_path: Path, body: bytes) -> None:
    """An empty one, after a disk was full, would let anybody compute marks."""
    (tmp_path / FILE).write_bytes(body)
    with pytest.raises(SystemFault) as raised:
        open_vault(SharedSettings(data=tmp_path))
    assert raised.value.code == "wrong_pepper"
    assert (tmp_path / FILE).read_bytes() == body  # nor is it replaced: what was marked with it would be lost


def test_processes_that_start_together_have_one_pepper(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from safegraft.settings import SharedSettings;"
        "from safegraft.vault import open_vault; print('ready', flush=True); sys.stdin.readline();"
        "print(open_vault(SharedSettings(data=Path(sys.argv[1]))).mark('x'))"
    )
    for turn in range(3):
        data = tmp_path / str(turn)
        command = [sys.executable, "-c", program, str(data)]
        started = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
        ]
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        marks = {process.communicate(timeout=30)[0] for process in started}
        assert [process.returncode for process in started] == [0, 0, 0, 0]
        assert len(marks) == 1
        assert [path.name for path in data.iterdir()] == [FILE]
