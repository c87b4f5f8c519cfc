"""`safegraft realign` and `inspect` on a real terminal, on a pipe, and with little to show things with."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from pathlib import Path

import pytest

from safegraft.contracts.report import Report
from safegraft.report import headline
from safegraft.report.text import ASCII_SHADES, SHADES
from tests.test_cli import SAFEGRAFT, safegraft

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
BACKGROUND = re.compile(r"\x1b\[[0-9;]*48;(?:2|5);")


class Terminal:
    """A pseudo-terminal of so many columns; what was written to it is `text` after `close`."""

    def __init__(self, columns: int) -> None:
        self._mine, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self._pieces: list[bytes] = []
        # A terminal that nobody reads is full after a few kB, and who writes to it then waits.
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._mine, 65536):
                self._pieces.append(piece)
        except OSError:
            # Linux' word for: nobody has the other end open any more.
            pass

    def close(self) -> str:
        os.close(self.theirs)
        self._reader.join(30)
        os.close(self._mine)
        return b"".join(self._pieces).decode("utf-8").replace("\r\n", "\n")


def on_terminal(*arguments: str | Path, columns: int = 80, shared: bool = True, **environment: str) -> tuple[str, str]:
    """(what the terminal got, standard output where that is no terminal): a terminal for both, or for errors alone."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SAFEGRAFT_")}
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES", "COLORTERM", "REDIS_URL"):
        clean.pop(name, None)
    terminal = Terminal(columns)
    done = subprocess.run(
        [SAFEGRAFT, *map(str, arguments)],
        env=clean | {"TERM": "xterm-256color"} | environment,
        stdin=subprocess.DEVNULL,
        stdout=terminal.theirs if shared else subprocess.PIPE,
        stderr=terminal.theirs,
        timeout=120,
    )
    text = terminal.close()
    assert done.returncode == 0, text
    return text, (done.stdout or b"").decode()


@pytest.fixture(scope="module")
def arguments(fresh: Path, bundle: Path) -> list[str | Path]:
    """But for OUT."""
    return ["realign", fresh, "--reference", bundle, "--method", "nlsr", "--out"]


def words_of(text: str) -> str:
    return " ".join(ESCAPE.sub("", text).split())


@pytest.mark.parametrize("columns", [pytest.param(40, marks=pytest.mark.long), 80])
def test_a_terminal_gets_bars_colours_and_the_headline(
    arguments: list[str | Path], tmp_path: Path, columns: int
) -> None:
    text, _ = on_terminal(*arguments, tmp_path / "out", columns=columns)
    report = Report.model_validate_json((tmp_path / "out.report.json").read_bytes())
    assert words_of(headline(report)) in words_of(text)
    assert "patch" in text
    assert "14/14" in text, "a bar says how far it is"
    assert BACKGROUND.search(text)
    # The story comes after the last bar; paths alone may be longer than a line.
    story = ESCAPE.sub("", text[text.index("Before: median") :]).split("Report:")[0]
    for line in story.splitlines():
        assert len(line) <= columns or str(tmp_path) in line, line


@pytest.mark.long
def test_no_color_means_shades(arguments: list[str | Path], tmp_path: Path) -> None:
    text, _ = on_terminal(*arguments, tmp_path / "out", NO_COLOR="1")
    assert not BACKGROUND.search(text)
    assert re.search(rf"^ *q [{SHADES}]+$", ESCAPE.sub("", text), re.M)


@pytest.mark.long
def test_a_terminal_of_sixteen_colours_gets_shades(arguments: list[str | Path], tmp_path: Path) -> None:
    text, _ = on_terminal(*arguments, tmp_path / "out", TERM="xterm")
    assert re.search(rf"^ *q [{SHADES}]+$", ESCAPE.sub("", text), re.M)


@pytest.mark.long
def test_the_bar_is_on_standard_error_alone(arguments: list[str | Path], tmp_path: Path) -> None:
    text, out = on_terminal(*arguments, tmp_path / "out", shared=False)
    assert "14/14" in text
    assert "Before" not in text
    assert "\x1b" not in out
    assert "14/14" not in out
    report = Report.model_validate_json((tmp_path / "out.report.json").read_bytes())
    assert out.splitlines()[0] == headline(report), "in one line, for programs"


def test_json_is_the_report_alone_also_on_a_terminal(arguments: list[str | Path], tmp_path: Path) -> None:
    text, out = on_terminal(*arguments, tmp_path / "out", "--json", shared=False)
    assert text == "", "no bar where a program asks"
    assert json.loads(out) == json.loads((tmp_path / "out.report.json").read_bytes())


def test_a_pipe_gets_shades_and_no_bar(arguments: list[str | Path], tmp_path: Path) -> None:
    done = safegraft(*arguments, tmp_path / "out")
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert re.search(rf"^ *down [{SHADES}]+$", done.stdout, re.M)


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1"])
@pytest.mark.long
def test_where_the_encoding_has_few_letters_ascii_does(
    arguments: list[str | Path], tmp_path: Path, encoding: str
) -> None:
    done = safegraft(*arguments, tmp_path / "out", PYTHONIOENCODING=encoding)
    assert done.stdout.isascii()
    assert re.search(rf"^ *q [{re.escape(ASCII_SHADES)}]+$", done.stdout, re.M)


def test_inspect_shows_where_the_update_is_large(fresh: Path) -> None:
    text, _ = on_terminal("inspect", fresh)
    plain = ESCAPE.sub("", text)
    assert "14 modules in 2 layers, rank 4; the update is largest in model.layers." in words_of(text)
    assert "14/14" in plain
    assert BACKGROUND.search(text)
    assert "loads in vllm" in plain
    piped = safegraft("inspect", fresh)
    assert piped.stderr == ""
    assert re.search(rf"^ *gate [{SHADES}]+$", piped.stdout, re.M)


def test_inspect_for_programs_is_as_it_was(fresh: Path) -> None:
    text, out = on_terminal("inspect", fresh, "--json", shared=False)
    assert text == ""
    assert list(json.loads(out)) == [
        "base_model", "rank", "alpha", "dtype", "modules", "target_modules", "parameters", "bytes", "compatibility",
    ]  # fmt: skip


def test_what_lies_in_a_folder_as_a_manifest_does_not_act_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\x1b[2J\xff\n{}\n")
    text, _ = on_terminal("reference", "show", tmp_path)
    assert text == "\ufffd[2J\ufffd\n{}\n"
    assert safegraft("reference", "show", tmp_path).stdout == "\x1b[2J\ufffd\n{}\n", "programs get it as it is"
