"""Statements about real results, and what `verify` says when a byte of anything is another one."""

import base64
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import safegraft
from safegraft.adapter import CONFIG, WEIGHTS
from safegraft.contracts.methods import METHOD_PARAMETERS
from safegraft.contracts.provenance import ENVELOPE_MEDIA, STATEMENT_MEDIA, Statement
from safegraft.contracts.report import Report
from safegraft.dsse import PublicKey, load_public_key, load_signing_key, make_keys
from safegraft.files import sha256_file
from safegraft.provenance import Invocation, folder_digests, input_digests, make_statement, media_type, write_provenance
from safegraft.report import to_json
from safegraft.verification import Checked, Evidence, check_provenance

if TYPE_CHECKING:
    from safegraft.engine.reference import LoadedReference

COMPANION = "tokenizer_config.json"


@dataclass(frozen=True)
class Made:
    """A result as it lies on a disk, signed and not."""

    report: Report
    statement: Statement
    evidence: Evidence
    signed: bytes
    bare: bytes


def make(sent: Path, reference: "LoadedReference", bundle: Path, folder: Path, method: str, *strengths: float) -> Made:
    from safegraft.engine.pipeline import realign
    from safegraft.files import side_car_folder

    folder.mkdir(parents=True)
    given = folder / "sent"
    shutil.copytree(sent, given)
    (given / COMPANION).write_text("{}")
    (given / "training_args.bin").write_bytes(b"a pickle")
    parameters: dict[str, Any] = {"type": method}
    if method == "safetylock":
        parameters |= {"heads": 3, "output": "side_car"}
    started = time.time()
    out = folder / "out"
    report = realign(given, reference, METHOD_PARAMETERS.validate_python(parameters), out, strengths=strengths)
    (folder / "report.json").write_text(to_json(report))
    private, public, _ = make_keys(folder / "keys")
    statement = make_statement(
        report,
        reference.manifest,
        invocation=Invocation(id="rlg_1/2", builder="urn:example:builder", started=started),
        outputs=folder_digests(out),
        inputs=input_digests(given, report),
        report_sha256=sha256_file(folder / "report.json"),
    )
    paths = folder / "signed.json", folder / "bare.json"
    write_provenance(statement, paths[0], load_signing_key(private))
    write_provenance(statement, paths[1], None)
    side_cars = side_car_folder(out)
    evidence = Evidence(
        adapter=out,
        side_cars=side_cars if side_cars.exists() else None,
        report=folder / "report.json",
        given=given,
        reference=bundle,
        key=load_public_key(public),
    )
    return Made(report, statement, evidence, paths[0].read_bytes(), paths[1].read_bytes())


@pytest.fixture(scope="module")
def made(fresh: Path, reference: "LoadedReference", bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(fresh, reference, bundle, tmp_path_factory.mktemp("made") / "one", "gram")


@pytest.fixture(scope="module")
def several(fresh: Path, reference: "LoadedReference", bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(fresh, reference, bundle, tmp_path_factory.mktemp("made") / "several", "gram", 0.1, 1.0)


@pytest.fixture
def here(made: Made, tmp_path: Path) -> Evidence:
    """The evidence, as copies that a test may damage."""
    for path in (made.evidence.adapter, made.evidence.given):
        assert path is not None
        shutil.copytree(path, tmp_path / path.name)
    assert made.evidence.report is not None
    shutil.copyfile(made.evidence.report, tmp_path / "report.json")
    return replace(made.evidence, adapter=tmp_path / "out", given=tmp_path / "sent", report=tmp_path / "report.json")


def key_of(made: Made) -> PublicKey:
    assert made.evidence.key is not None
    return made.evidence.key


def flip(path: Path, at: int = -1) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_the_statement_says_what_was_made_from_what(made: Made, bundle: Path) -> None:
    body = json.loads(made.bare)
    assert body["_type"] == "https://in-toto.io/Statement/v1"
    assert body["predicateType"] == "https://slsa.dev/provenance/v1"
    assert set(body) == {"_type", "subject", "predicateType", "predicate"}
    subjects = {item["name"]: item["digest"]["sha256"] for item in body["subject"]}
    assert set(subjects) == {CONFIG, WEIGHTS, COMPANION, "report.json"}
    assert made.report.output is not None
    assert subjects[WEIGHTS] == made.report.output.sha256
    definition = body["predicate"]["buildDefinition"]
    assert definition["buildType"] == "urn:safegraft:realignment:v1"
    assert definition["externalParameters"] == {
        "method": {"type": "gram", "general_weight": 0.2, "steepness": 2.0, "amplification": 0.0, "pairs": None},
        "mode": "patch",
        "strengths": [],
        "output_rank": "customer",
        "reference": made.report.reference.id,
    }
    internal = {"dtype": "BF16", "device": "cpu", "resolved": {}}
    assert {key: value for key, value in definition["internalParameters"].items() if key != "seed"} == internal
    found = {item["name"]: item["digest"]["sha256"] for item in definition["resolvedDependencies"]}
    assert found["reference/manifest.json"] == sha256_file(bundle / "manifest.json") == made.report.reference.sha256
    assert found[f"adapter/{WEIGHTS}"] == made.report.input.sha256
    assert found[f"adapter/{CONFIG}"] == made.report.input.config_sha256
    sources = {name.removeprefix("reference_source/") for name in found if name.startswith("reference_source/")}
    assert sources == set(json.loads((bundle / "manifest.json").read_text())["origin"]["files"])
    # The pickle beside the adapter was neither read nor kept.
    assert not any("training_args" in name for name in {*found, *subjects})
    run = body["predicate"]["runDetails"]
    assert run["builder"]["id"] == "urn:example:builder"
    assert set(run["builder"]["version"]) == {"safegraft", "torch", "safetensors", "numpy", "python", "products"}
    assert run["builder"]["version"]["safegraft"] == safegraft.__version__
    assert run["metadata"]["invocationId"] == "rlg_1/2"
    times = [run["metadata"][name] for name in ("startedOn", "finishedOn")]
    assert all(text.endswith("Z") for text in times)
    first, last = (datetime.fromisoformat(text) for text in times)
    assert first < last < datetime.now(UTC)
    assert Statement.model_validate_json(made.bare) == made.statement


def test_a_signature_is_around_the_same_statement(made: Made) -> None:
    assert (media_type(made.signed), media_type(made.bare)) == (ENVELOPE_MEDIA, STATEMENT_MEDIA)
    envelope = json.loads(made.signed)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert base64.b64decode(envelope["payload"]) + b"\n" == made.bare
    for other in (b"", b"{", b"[]", b"null", b"{}", b'{"payload": 1}', to_json(made.report).encode(), b"[" * 10**5):
        assert media_type(other) is None


def test_everything_that_is_given_is_checked_and_the_rest_is_named(made: Made) -> None:
    found = check_provenance(made.signed, made.evidence)
    assert (found.signature, found.problems) == ("valid", [])
    assert {WEIGHTS, CONFIG, COMPANION, "report.json", f"adapter/{WEIGHTS}"} <= set(found.checked)
    assert {"reference/manifest.json", "reference/gram.safetensors"} <= set(found.checked)
    assert {line.partition("/")[0] for line in found.unchecked} == {"reference_source"}
    nothing = check_provenance(made.signed, Evidence(key=made.evidence.key))
    assert (nothing.signature, nothing.problems, nothing.checked) == ("valid", [], [])
    names = {item.name for item in made.statement.subject}
    names |= {item.name for item in made.statement.predicate.build_definition.resolved_dependencies}
    assert {line.partition(" (what was sent")[0] for line in nothing.unchecked} == names


def test_it_is_said_where_nobody_vouches(made: Made) -> None:
    without = replace(made.evidence, key=None)
    assert check_provenance(made.bare, without).signature == "unsigned"
    assert check_provenance(made.bare, without).problems == []
    assert check_provenance(made.signed, without).signature == "not checked"
    assert check_provenance(made.signed, without).problems == []
    # Who asks for a signature is not content with none: an attacker could have taken it off.
    found = check_provenance(made.bare, made.evidence)
    assert found.signature == "unsigned"
    assert found.problems == ["A public key was given, and the statement is not signed."]


def test_a_stranger_cannot_sign(made: Made, tmp_path: Path) -> None:
    stranger = load_signing_key(make_keys(tmp_path / "k")[0])
    write_provenance(made.statement, tmp_path / "forged.json", stranger)
    forged = json.loads((tmp_path / "forged.json").read_text())
    forged["signatures"][0]["keyid"] = key_of(made).keyid
    found = check_provenance(json.dumps(forged).encode(), made.evidence)
    assert (found.signature, found.checked) == ("invalid", [])
    assert len(found.problems) == 1


def test_no_bit_of_an_envelopes_payload_or_signature_can_be_flipped(made: Made) -> None:
    envelope = json.loads(made.signed)
    only = Evidence(key=made.evidence.key)
    for part in (("payload",), ("payloadType",), ("signatures", 0, "sig")):
        holder: Any = json.loads(made.signed)
        for step in part[:-1]:
            holder = holder[step]
        text = holder[part[-1]]
        for at in range(0, len(text), max(1, len(text) // 200)):
            for bit in (1, 2, 32):
                changed: Any = json.loads(made.signed)
                inner = changed
                for step in part[:-1]:
                    inner = inner[step]
                inner[part[-1]] = text[:at] + chr(ord(text[at]) ^ bit) + text[at + 1 :]
                found = check_provenance(json.dumps(changed).encode(), only)
                assert found.problems, (part, at, bit)
                assert found.signature != "valid"
    assert check_provenance(json.dumps(envelope).encode(), only).problems == []


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("name", "at"),
    [
        (f"out/{WEIGHTS}", -1),
        (f"out/{WEIGHTS}", 0),
        (f"out/{CONFIG}", 5),
        (f"out/{COMPANION}", 0),
        ("report.json", 100),
        (f"sent/{WEIGHTS}", -1),
        (f"sent/{CONFIG}", 5),
    ],
)
def test_no_byte_of_a_file_can_be_flipped(
    made: Made, here: Evidence, tmp_path: Path, name: str, at: int, signed: bool
) -> None:
    body, evidence = (made.signed, here) if signed else (made.bare, replace(here, key=None))
    assert check_provenance(body, evidence).problems == []
    flip(tmp_path / name, at)
    found = check_provenance(body, evidence)
    shown = name.removeprefix("out/").replace("sent/", "adapter/")
    assert [problem.split()[0] for problem in found.problems] == [shown]
    assert shown not in found.checked


def test_files_that_are_missing_or_that_nobody_attested_are_named(made: Made, here: Evidence) -> None:
    assert here.adapter is not None
    assert here.given is not None
    (here.adapter / COMPANION).unlink()
    (here.adapter / "deep").mkdir()
    (here.adapter / "deep" / "handler.py").write_text("import os")
    (here.given / "notes.txt").write_text("beside the adapter, and never read")
    found = check_provenance(made.signed, here)
    assert found.problems == [f"{COMPANION} is missing.", "deep/handler.py is not attested."]


def test_another_reference_is_noticed(made: Made, bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "bundle")
    evidence = Evidence(reference=tmp_path / "bundle")
    assert check_provenance(made.signed, evidence).problems == []
    flip(tmp_path / "bundle" / "gram.safetensors")
    assert "gram.safetensors is not the file" in check_provenance(made.signed, evidence).problems[0]
    flip(tmp_path / "bundle" / "gram.safetensors")
    manifest = tmp_path / "bundle" / "manifest.json"
    body = json.loads(manifest.read_text())
    name = next(iter(body["origin"]["files"]))
    body["origin"]["files"][name] = "0" * 64
    manifest.write_text(json.dumps(body))
    problems = check_provenance(made.signed, evidence).problems
    assert [problem.split()[0] for problem in problems] == ["reference/manifest.json", f"reference_source/{name}"]
    manifest.unlink()
    assert "not a readable manifest" in check_provenance(made.signed, evidence).problems[0]


def test_several_strengths_are_checked_together_or_one_by_one(several: Made, made: Made, tmp_path: Path) -> None:
    names = {item.name for item in several.statement.subject}
    assert {f"0.1/{WEIGHTS}", f"1/{WEIGHTS}", f"1/{CONFIG}", "report.json"} <= names
    assert several.statement.predicate.build_definition.external_parameters.strengths == [0.1, 1.0]
    assert check_provenance(several.signed, several.evidence).problems == []
    assert several.evidence.adapter is not None
    # As a service hands one of them out: a folder of its own, whose name says nothing.
    shutil.copytree(several.evidence.adapter / "1", tmp_path / "adp_1")
    found = check_provenance(several.signed, Evidence(adapter=tmp_path / "adp_1"))
    assert found.problems == []
    assert {f"1/{CONFIG}", f"1/{WEIGHTS}", f"1/{COMPANION}"} == set(found.checked)
    assert f"0.1/{WEIGHTS} (another strength)" in found.unchecked
    # The weights of one with the configuration of no one.
    flip(tmp_path / "adp_1" / CONFIG, 5)
    assert check_provenance(several.signed, Evidence(adapter=tmp_path / "adp_1")).problems != []
    found = check_provenance(several.signed, Evidence(adapter=made.evidence.adapter))
    assert found.problems == [f"{WEIGHTS} is that of none of the strengths 0.1, 1."]
    shutil.copytree(several.evidence.adapter, tmp_path / "both")
    flip(tmp_path / "both" / "0.1" / WEIGHTS)
    assert len(check_provenance(several.signed, Evidence(adapter=tmp_path / "both")).problems) == 1


def test_side_cars_are_subjects(fresh: Path, reference: "LoadedReference", bundle: Path, tmp_path: Path) -> None:
    made = make(fresh, reference, bundle, tmp_path / "m", "safetylock")
    assert check_provenance(made.signed, made.evidence).problems == []
    name = "side_car/side_car.safetensors"
    assert name in check_provenance(made.signed, made.evidence).checked
    assert name in check_provenance(made.signed, replace(made.evidence, side_cars=None)).unchecked
    assert made.evidence.side_cars is not None
    flip(made.evidence.side_cars / "side_car.safetensors")
    assert len(check_provenance(made.signed, made.evidence).problems) == 1


def test_a_job_that_only_measured_attests_its_report_alone(
    made: Made, reference: "LoadedReference", tmp_path: Path
) -> None:
    from safegraft.engine.pipeline import realign

    assert made.evidence.given is not None
    report = realign(made.evidence.given, reference, METHOD_PARAMETERS.validate_python({"type": "gram"}), None)
    (tmp_path / "report.json").write_text(to_json(report))
    statement = make_statement(
        report,
        reference.manifest,
        invocation=Invocation("run_1", "urn:x", time.time()),
        outputs={},
        inputs=input_digests(made.evidence.given, report),
        report_sha256=sha256_file(tmp_path / "report.json"),
    )
    write_provenance(statement, tmp_path / "p.json", None)
    body = (tmp_path / "p.json").read_bytes()
    assert check_provenance(body, Evidence(report=tmp_path / "report.json")).checked == ["report.json"]
    found = check_provenance(body, Evidence(adapter=made.evidence.adapter))
    assert found.problems == ["The statement attests no adapter: its job only measured one."]


def with_name_twice(body: Any) -> None:
    body["subject"].append(dict(body["subject"][0], digest={"sha256": "0" * 64}))


def with_other_digest(body: Any) -> None:
    body["subject"][0]["digest"] = {"sha512": "0" * 128}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.update(predicateType="https://slsa.dev/provenance/v2"), "no in-toto statement"),
        (lambda body: body.update(_type="https://in-toto.io/Statement/v0.1"), "no in-toto statement"),
        (lambda body: body["predicate"].pop("runDetails"), "no in-toto statement"),
        (lambda body: body["predicate"]["buildDefinition"].update(buildType="urn:other:v1"), "buildType is 'urn:other"),
        (with_name_twice, "twice, or without its SHA-256"),
        (with_other_digest, "twice, or without its SHA-256"),
    ],
)
def test_statements_of_another_kind_are_problems(made: Made, change: Callable[[Any], None], says: str) -> None:
    body = json.loads(made.bare)
    change(body)
    found = check_provenance(json.dumps(body).encode(), replace(made.evidence, key=None))
    assert says in found.problems[0]


def test_what_a_later_version_adds_is_read_over(made: Made) -> None:
    """in-toto and DSSE both demand it of a reader."""
    body = json.loads(made.bare)
    body["predicate"]["runDetails"]["byproducts"] = []
    body["predicate"]["buildDefinition"]["externalParameters"]["more"] = 1
    body["predicate"]["buildDefinition"]["externalParameters"]["method"]["more"] = 1
    body["subject"][0]["mediaType"] = "text/plain"
    assert check_provenance(json.dumps(body).encode(), replace(made.evidence, key=None)).problems == []
    envelope = json.loads(made.signed) | {"more": 1}
    assert check_provenance(json.dumps(envelope).encode(), made.evidence).problems == []


@pytest.mark.parametrize(
    "body",
    [
        {"payload": "e30=", "signatures": []},
        {"payload": 1, "payloadType": "application/vnd.in-toto+json", "signatures": []},
        {"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": {}},
        {"payload": "e30", "payloadType": "application/vnd.in-toto+json", "signatures": []},
        {"payload": "e30=", "payloadType": "application/json", "signatures": []},
        {"payload": "e30=", "payloadType": "application/vnd.in-toto+json", "signatures": []},
    ],
)
def test_broken_envelopes_are_problems(body: dict[str, Any]) -> None:
    found: Checked = check_provenance(json.dumps(body).encode(), Evidence())
    assert len(found.problems) == 1
