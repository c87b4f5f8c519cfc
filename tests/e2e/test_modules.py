"""The console's own algorithms, in the browser that runs them, against Python's."""

import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from safegraft.adapter import is_companion
from safegraft.contracts.methods import METHOD_PARAMETERS, STRENGTH
from safegraft.contracts.report import ModuleLine
from safegraft.engine.methods import METHODS
from safegraft.report import grid, to_html, words
from tests.e2e.conftest import Console
from tests.report.samples import five, line, lines, report

SIZES = [0, 1, 3, 55, 56, 57, 63, 64, 65, 119, 120, 127, 128, 1000, 4096 * 3 + 17]


@pytest.fixture(scope="module")
def module(browser: Any, console: Console) -> Iterator[Any]:
    """Calls a function of one of the console's modules: module("sha256.js", "(m) => …", argument)."""
    page = browser.new_context().new_page()
    page.goto(console.url)

    def call(name: str, function: str, given: Any = None) -> Any:
        program = f"async (given) => ({function})(await import('{console.url}console/{name}'), given)"
        return page.evaluate(program, given)

    yield call
    page.context.close()


def test_sha256_is_sha256_however_the_bytes_come(module: Any) -> None:
    data = bytes((7 * number + number // 256) % 256 for number in range(max(SIZES)))
    digest = """(m, {size, step}) => {
        const data = Uint8Array.from({length: size}, (_, n) => (7 * n + Math.floor(n / 256)) % 256);
        const hash = new m.Sha256();
        for (let at = 0; at < size; at += step) hash.update(data.subarray(at, at + step));
        return hash.hex();
    }"""
    for size in SIZES:
        wanted = hashlib.sha256(data[:size]).hexdigest()
        for step in {1, 63, 64, 65, 100, max(1, size)}:
            assert module("sha256.js", digest, {"size": size, "step": step}) == wanted, (size, step)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        ("abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
    ],
)  # the vectors of FIPS 180-4
def test_sha256_of_the_standards_vectors(module: Any, text: str, wanted: str) -> None:
    assert (
        module("sha256.js", "(m, text) => new m.Sha256().update(new TextEncoder().encode(text)).hex()", text) == wanted
    )


@pytest.mark.parametrize("size", [0, 2**29 - 1, 2**29, 2**32 - 1, 2**32, 2**32 + 5, 5 * 10**9, 2**40 + 3, 2**53 - 1])
def test_lengths_beyond_four_gibibytes_are_written_right(module: Any, size: int) -> None:
    bits = size * 8
    assert module("sha256.js", "(m, size) => m.lengthWords(size)", size) == [bits >> 32, bits & 0xFFFFFFFF]


def test_the_worker_hashes_files_and_tars(module: Any) -> None:
    data = os.urandom(5_000_000)
    found = module(
        "hashing.js",
        """async ({Hasher}, text) => {
            const blob = new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]);
            const hasher = new Hasher();
            await hasher.begin();
            const parts = [await hasher.part(blob.slice(0, 3000000)), await hasher.part(blob.slice(3000000))];
            const answer = {of: await hasher.of(blob), parts, whole: await hasher.end()};
            try { await hasher.tar(blob); } catch (error) { answer.tar = error.message; }
            hasher.close();
            return answer;
        }""",
        base64.b64encode(data).decode(),
    )
    whole = hashlib.sha256(data).hexdigest()
    halves = [hashlib.sha256(data[:3_000_000]).hexdigest(), hashlib.sha256(data[3_000_000:]).hexdigest()]
    assert found["of"] == found["whole"] == whole
    assert found["parts"] == halves
    assert "tar" in found["tar"]


STREAM = (
    '\ufeffid: 7\nevent: started\ndata: {"a":\ndata: 1}\n\n: still here\n\ndata:x\r\n\r\n'
    "id\nevent: none\n\nevent: e\rdata:  two\r\r"
)
EVENTS = [
    {"type": "started", "data": '{"a":\n1}', "id": "7"},
    {"type": "message", "data": "x", "id": "7"},
    {"type": "e", "data": " two", "id": ""},
]


@pytest.mark.parametrize("step", [1, 2, 3, 7, 1000])
def test_streams_are_read_however_they_are_cut(module: Any, step: int) -> None:
    read = """({EventParser}, {text, step}) => {
        const found = [];
        const parser = new EventParser((event) => found.push(event));
        for (let at = 0; at < text.length; at += step) parser.push(text.slice(at, at + step));
        parser.push("\\n");
        return found;
    }"""
    assert module("sse.js", read, {"text": STREAM, "step": step}) == EVENTS


def test_files_are_cut_into_parts(module: Any) -> None:
    part = 8 * 2**20
    for size, wanted in (
        (1, [[0, 1]]), (part, [[0, part]]), (part + 1, [[0, part], [part, part + 1]]), (0, []),
    ):  # fmt: skip
        assert module("upload.js", "(m, size) => m.cuts(size)", size) == wanted
    last = module("upload.js", "(m, size) => m.cuts(size).at(-1)", 5 * 10**9)
    assert last == [5 * 10**9 // part * part, 5 * 10**9]


def test_what_travels_is_what_the_service_keeps(module: Any) -> None:
    names = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "vocab.txt",
             "chat_template.json", "chat_template.py", "chat_template.safetensors", "chat_template_x.jinja",
             "README.md", "readme.md", "optimizer.pt", "training_args.bin", "adapter_model.bin", "tokenizer.py",
             "xREADME.md", "merges.txt", "special_tokens_map.json", "rng_state.pth", "config.json"]  # fmt: skip
    for name in names:
        assert module("upload.js", "(m, name) => m.travels(name)", name) is is_companion(name), name
    assert module("upload.js", "(m) => m.travels('adapter_config.json') && m.travels('adapter_model.safetensors')")


@pytest.mark.parametrize(
    ("paths", "code"),
    [
        ([], "nothing"), (["a.tar.gz"], "compressed_archive"), (["x/readme.txt"], "missing_config"),
        (["x/adapter_config.json"], "missing_weights"),
        (["a/adapter_config.json", "b/adapter_config.json"], "several_adapters"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_by_its_names_is_told_at_once(module: Any, paths: list[str], code: str) -> None:
    judge = """({judged}, paths) => {
        try {
            judged(paths.map((path) => ({path, file: new File(["x"], path.split("/").at(-1))})));
        } catch (error) {
            return error.code;
        }
    }"""
    assert module("upload.js", judge, paths) == code


def test_an_empty_file_is_called_empty_and_not_missing(module: Any) -> None:
    judge = """({judged}, empty) => {
        const file = (name) => new File(name === empty ? [] : ["x"], name);
        try {
            const names = ["adapter_config.json", "adapter_model.safetensors"];
            judged(names.map((name) => ({path: name, file: file(name)})));
        } catch (error) {
            return error.message;
        }
    }"""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert module("upload.js", judge, name) == f"{name} is empty."


def test_of_nested_folders_the_outer_adapter_is_taken(module: Any) -> None:
    paths = ["run/adapter_config.json", "run/adapter_model.safetensors", "run/tokenizer.json", "run/training_args.bin",
             "run/checkpoint-10/adapter_config.json", "run/checkpoint-10/adapter_model.safetensors"]  # fmt: skip
    judge = """({judged}, paths) => {
        const found = judged(paths.map((path) => ({path, file: new File(["x"], path.split("/").at(-1))})));
        return {...found, files: found.files.map(({name}) => name), weights: found.weights.name};
    }"""
    found = module("upload.js", judge, paths)
    assert found["label"] == "run"
    assert found["files"] == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert found["left"] == paths[3:]


NUMBERS = [0.0, 0.5, 1.0, 0.004, 0.9999, 0.12345, -0.2, -0.0001, 0.73, 1.831, float("nan")]


def test_numbers_read_as_in_the_report(module: Any) -> None:
    given = [None if number != number else number for number in NUMBERS]
    found = module(
        "format.js",
        "(m, all) => all.map((one) => one ?? NaN).map((one) => [m.number(one, 2), m.percent(one), m.percent(one, 1)])",
        given,
    )
    assert found == [[words.number(one), words.percent(one), words.percent(one, 1)] for one in NUMBERS]
    signed = "(m, all) => all.map((one) => m.signed(one ?? NaN, 2))"
    assert module("format.js", signed, given) == [words.signed(one) for one in NUMBERS]
    for size in (0, 999, 1000, 4_939_072, 10**9, 8 * 10**9):
        assert module("format.js", "(m, size) => m.size(size)", size) == words.size(size)
    for value in (0.3, 1.0, 0.05, 10.0, 0.123456789):
        assert module("format.js", "(m, value) => m.plain(value)", value) == words.plain(value)
    for text in ("plain", "tab\there", "\u202eturned", "x" * 200, "two\nlines"):
        assert module("format.js", "(m, text) => m.shown(text)", text) == words.shown(text)


def test_a_file_in_an_object_store_is_told_with_its_own_way_out(module: Any) -> None:
    ask = """async ({downloadFile}, elsewhere) => {
        const kept = window.fetch;
        window.fetch = async () => ({ok: false, type: "opaqueredirect"});
        try {
            await downloadFile("v1/x", "x", elsewhere ? {elsewhere} : {});
        } catch (error) {
            return `${error.code}: ${error.message}`;
        } finally {
            window.fetch = kept;
        }
    }"""
    told = "elsewhere: This file lies in an object store, which this page may not reach."
    assert module("download.js", ask, "Take the stairs.") == f"{told} Take the stairs."
    assert module("download.js", ask, "") == f"{told} Use curl -L."


def test_times_read_as_people_say_them(module: Any) -> None:
    tell = "(m, away) => m.relative(1e9 + away, 1e9)"
    for away, wanted in (
        (0, "just now"),
        (-61, "1 minute ago"),
        (-7300, "2 hours ago"),
        (90, "in 1 minute"),
        (5, "in a few seconds"),
        (-5, "just now"),
        (-90000, "yesterday"),
    ):
        assert module("format.js", tell, away) == wanted
    for seconds, wanted in ((3, "3\u00a0s"), (245, "4\u00a0min 05\u00a0s"), (7800, "2\u00a0h 10\u00a0min")):
        assert module("format.js", "(m, seconds) => m.duration(seconds)", seconds) == wanted


def test_the_heatmap_has_the_reports_scale_and_colours(module: Any) -> None:
    for values in ([0.5, 0.93], [0.99, 1.0], [-1.0, -0.99], [], [0.1, 3.0], [0.52, 0.5501]):
        scale = grid.Scale.of(values)
        found = module("maps.js", "(m, values) => m.scaleOf(values)", values)
        assert found["low"] == pytest.approx(scale.low, abs=1e-9), values
        assert found["high"] == pytest.approx(scale.high, abs=1e-9), values
    for position in (0.0, 0.1, 0.5, 0.77, 1.0):
        assert module("maps.js", "(m, position) => m.colour(position)", position) == list(grid.colour(position))
        found = module("maps.js", "(m, position) => m.colour(position, m.DIFFERENCES)", position)
        assert found == list(grid.colour(position, grid.DIFFERENCES))
    for values in ([0.31, -0.02], [-0.7], [0.01], [], [3.0], [0.15]):
        scale = grid.Scale.around_zero(values)
        found = module("maps.js", "(m, values) => m.aroundZero(values)", values)
        assert found["low"] == pytest.approx(scale.low, abs=1e-9), values
        assert found["high"] == pytest.approx(scale.high, abs=1e-9), values


@pytest.mark.parametrize(
    ("method", "mode", "reached", "wanted"),
    [
        ({"type": "gram"}, "patch", False, False), ({"type": "antidote"}, "patch", False, False),
        ({"type": "antidote", "density": 0}, "patch", False, True), ({"type": "nlsr"}, "patch", False, True),
        ({"type": "safelora"}, "patch", False, True), ({"type": "none"}, "patch", False, True),
        ({"type": "gram"}, "analyze", False, True), ({"type": "auto"}, "analyze", False, True),
        ({"type": "auto"}, "patch", False, False), ({"type": "auto"}, "patch", True, True),
    ],
)  # fmt: skip
def test_only_jobs_that_measure_first_show_that_stage(
    module: Any, method: dict[str, Any], mode: str, reached: bool, wanted: bool
) -> None:
    job = {"mode": mode, "method": method}
    assert module("realignments.js", "(m, [job, reached]) => m.isScored(job, reached)", [job, reached]) is wanted
    if method["type"] != "auto" and mode == "patch":
        parameters = METHOD_PARAMETERS.validate_python(method)
        takes_all: Any = METHODS[method["type"]].takes_all
        assert takes_all.fget(SimpleNamespace(parameters=parameters)) is not wanted


def test_strengths_are_read_or_named_as_what_they_are(module: Any) -> None:
    read = """({numbersOf}, text) => { try { return numbersOf(text); } catch (error) { return error.message; } }"""
    assert module("start.js", read, "0.1, 0.3 1;3e0") == [0.1, 0.3, 1, 3]
    assert "is no number" in module("start.js", read, "0.1, x")
    assert "Each strength once" in module("start.js", read, "1, 1.0")
    assert "At most 16" in module("start.js", read, json.dumps(list(range(17))).strip("[]"))
    assert "Write the strengths" in module("start.js", read, " ")
    for slip in ("0x10", "0b1", "1e", "Infinity", "1_000"):
        assert f"“{slip}” is no number" in module("start.js", read, f"0.1, {slip}")
    assert "decimals with a point" in module("start.js", read, "0,1; 0,3")


def test_the_console_knows_each_methods_strength(module: Any) -> None:
    assert module("parts.js", "(m) => m.STRENGTH") == STRENGTH


@pytest.mark.parametrize("lineage", ["continued", "fresh", "foreign"])
@pytest.mark.parametrize("cosine", [None, 0.31])
def test_the_console_tells_what_the_page_tells(module: Any, lineage: str, cosine: float | None) -> None:
    cases: list[tuple[Literal["patch", "analyze"], str, list[ModuleLine]]] = [
        ("patch", "gram", lines(2)),
        ("analyze", "gram", [line("l.0.q_proj", 0, 0.5)]),
        ("analyze", "none", [line("l.0.q_proj", 0, 0.5)]),
        ("patch", "safelora", [line("l.0.q_proj", 0, 0.5)]),
    ]
    for mode, method, modules in cases:
        sample = report(modules, mode=mode, method=method, lineage=lineage, lineage_similarity=cosine)
        shown = sample.model_dump(mode="json")
        assert module("report.js", "(m, given) => m.done(given)", shown) == words.done(sample)
        if cosine is not None or lineage != "continued":
            assert module("report.js", "(m, given) => m.lineage(given)", shown) == words.lineage(sample)


def test_the_terms_are_the_pages(module: Any) -> None:
    page = html.unescape(re.sub(r"<.*?>", " ", to_html(five()))).replace("\xa0", " ")
    page = re.sub(r"\s+", " ", page)
    for term, text in module("report.js", "(m) => m.TERMS"):
        assert f"{term} {text}".replace("\xa0", " ") in page


def test_how_many_modules_lean_is_told_alike(module: Any) -> None:
    sample = five()
    for variant in sample.variants:
        given = [sample.model_dump(mode="json"), variant.summary.model_dump(mode="json")]
        told = module("report.js", "(m, [report, summary]) => m.leaning(report, summary)", given)
        assert told == words.still_leaning(sample, variant.summary)
