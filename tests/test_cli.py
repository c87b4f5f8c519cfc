"""The command line as a user starts it: statuses, one-line errors, JSON, environment variables, files."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from safegraft import __version__
from safegraft.cli import app
from safegraft.contracts.methods import MODELS, GramParameters
from safegraft.contracts.reference import ReferenceManifest
from safegraft.contracts.report import Report
from safegraft.stores.references import ReferenceRegistry
from tests import tiny, zygote

SAFEGRAFT = str(Path(sys.executable).parent / "safegraft")
METHODS = list(MODELS)
FORMS = ("changes.png", "csv", "html", "json", "layers.png", "png")


def safegraft(*arguments: str | Path, status: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs it; whatever happens, nobody is shown a traceback."""
    return _run(arguments, status, environment, real=False)


def started(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The same from the interpreter's start on, as a user runs it."""
    return _run(arguments, 0, {}, real=True)


def _run(
    arguments: Sequence[str | Path], status: int, environment: dict[str, str], *, real: bool
) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SAFEGRAFT_") and key != "REDIS_URL"}
    done = zygote.run(list(map(str, arguments)), clean | environment, real=real)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done


def refused(*arguments: str | Path, code: str, status: int = 2, **environment: str) -> str:
    """Runs what must be refused with one line on standard error, and returns the message."""
    done = safegraft(*arguments, status=status, **environment)
    assert re.fullmatch(rf"{code}: .*\n", done.stderr), done.stderr
    assert done.stdout == ""
    return done.stderr


def reports(out: Path) -> list[str]:
    """What lies beside OUT."""
    return sorted(path.name for path in out.parent.iterdir() if path.name.startswith(f"{out.name}.report."))


def test_version_and_help() -> None:
    assert safegraft("--version").stdout == f"safegraft {__version__}\n"
    assert "realign" in safegraft("--help").stdout


@pytest.mark.long
def test_by_fork_it_does_what_it_does_from_its_start(
    base: Path, aligned: Path, fresh: Path, built: Path, tmp_path: Path
) -> None:
    shown, written = [], []
    for name, run in (("forked", safegraft), ("started", started)):
        at = tmp_path / name
        at.mkdir()
        prompts = built.parent / "harmful.csv"
        told = [
            run("--help"),
            run("inspect", fresh),
            run(
                "reference", "build", "--base", base, "--aligned", aligned, "--prompts", prompts, "--out", at / "built"
            ),
            run("realign", fresh, "--reference", built, "--out", at / "out"),
            run(
                "evaluate",
                fresh,
                at / "out",
                "--base",
                base,
                "--aligned",
                aligned,
                "--harmful",
                prompts,
                "--limit",
                "2",
            ),
            run("report", at / "out.report.json"),
        ]
        shown.append([(done.stdout.replace(str(at), ""), done.stderr.replace(str(at), "")) for done in told])
        written.append({path.name: path.read_bytes() for path in sorted((at / "out").iterdir())})
    assert shown[0] == shown[1]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["realign"],
        ["inspect", "/nowhere"],
        ["inspect", ".", "--what"],
        ["serve", "--port", "0"],
        ["serve", "--device", "gpu"],
        ["reference", "nothing"],
        ["reference", "build", "--beta", "much"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_status_2(arguments: list[str]) -> None:
    done = safegraft(*arguments, status=2)
    assert done.stdout == ""
    assert done.stderr


def test_bad_usage_is_json_for_those_who_asked_for_it() -> None:
    for asked in (["--json"], []):
        done = safegraft("inspect", "/nowhere", *asked, status=2, SAFEGRAFT_JSON="" if asked else "1")
        error = json.loads(done.stdout)["error"]
        assert (error["code"], error["class"]) == ("usage_error", "user")
        assert "/nowhere" in error["message"]


def test_every_option_has_its_environment_variable() -> None:
    """interface: every option, with the prefix; these names are other people's."""
    checked = set()

    def check(command: Any) -> None:
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name not in ("help", "version"):
                option = parameter.opts[0]
                assert parameter.envvar == "SAFEGRAFT_" + option.removeprefix("--").replace("-", "_").upper()
                checked.add(option)
        if isinstance(command, TyperGroup):
            context = typer.Context(command)
            for name in command.list_commands(context):
                check(command.get_command(context, name))

    check(typer.main.get_command(app))
    assert {"--json", "--data", "--set", "--out", "--batch-size", "--analyze", "--dev", "--scopes", "--dead"} <= checked


def test_the_database_is_imported_by_commands_that_ask_it() -> None:
    """It takes as long as everything else that the others import."""
    listed = "import sys, safegraft.cli; print([name for name in ('sqlalchemy', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True).stdout == "[]\n"


def test_inspect(fresh: Path) -> None:
    found = json.loads(safegraft("inspect", fresh, "--json").stdout)
    assert (found["rank"], found["alpha"], found["modules"], found["dtype"]) == (4, 8, 14, "BF16")
    assert found["target_modules"] == sorted(found["target_modules"])
    assert set(found["compatibility"]) == {"peft", "vllm", "lorax", "tgi"}
    shown = safegraft("inspect", fresh).stdout
    assert "q_proj" in shown
    assert "loads in vllm" in shown
    assert json.loads(safegraft("inspect", fresh, SAFEGRAFT_JSON="true").stdout) == found


def test_inspect_says_in_one_line_what_is_wrong(fresh: Path, tmp_path: Path) -> None:
    broken = tmp_path / "a folder with a rather long name, longer than a terminal of eighty columns is wide" / "broken"
    shutil.copytree(fresh, broken)
    tiny.change_tensors(broken, lambda tensors: {name: tensor * float("nan") for name, tensor in tensors.items()})
    message = refused("inspect", broken, code="non_finite")
    assert "lora_" in message
    done = safegraft("inspect", broken, "--json", status=2)
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["class"]) == ("non_finite", "user")
    assert done.stderr == message
    (broken / "adapter_config.json").write_text("{")
    refused("inspect", broken, code="[a-z_]+")
    (broken / "adapter_model.safetensors").unlink()
    refused("inspect", broken, code="[a-z_]+")


@pytest.fixture(scope="module")
def built(base: Path, aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference as an operator builds it: from CSV files without answers, which the aligned model then gives."""
    folder = tmp_path_factory.mktemp("build")
    for name, conversations in (("harmful", tiny.HARMFUL), ("general", tiny.GENERAL)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt"])
            writer.writerows([item.prompt] for item in conversations)
    done = safegraft(
        "reference", "build", "--base", base, "--aligned", aligned, "--prompts", folder / "harmful.csv",
        "--general", folder / "general.csv", "--out", folder / "reference", "--json",
        SAFEGRAFT_SPARSITY="0.5", SAFEGRAFT_BETA="0.7", SAFEGRAFT_BATCH_SIZE="4",
    )  # fmt: skip
    shown = json.loads(done.stdout)
    assert shown["methods"] == METHODS
    return folder / "reference"


def test_build_takes_settings_from_the_environment_and_answers_the_prompts(built: Path) -> None:
    manifest = ReferenceManifest.model_validate_json((built / "manifest.json").read_bytes())
    assert (manifest.parameters.sparsity, manifest.parameters.amplification) == (0.5, 0.7)
    assert manifest.safety_prompts.answered_by_model
    assert manifest.safety_prompts.conversations == len(tiny.HARMFUL)
    assert manifest.safety_prompts.response_tokens > 0


def test_build_refuses_bad_input_before_it_loads_a_model(
    base: Path, aligned: Path, built: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("text\nhow\n")
    common = ["reference", "build", "--base", str(base), "--aligned", str(aligned), "--prompts", str(prompts)]
    assert "`prompt` column" in refused(*common, "--out", tmp_path / "out", code="invalid_prompts")
    refused(*common, "--out", built, code="output_exists")
    safegraft(*common, "--out", tmp_path / "out", "--sparsity", "1.5", status=2)
    assert not (tmp_path / "out").exists()


def test_references_are_verified_installed_listed_and_shown(built: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    assert safegraft("reference", "list", "--data", data, "--json").stdout == "[]\n"
    empty = safegraft("reference", "list", "--data", data)
    assert empty.stdout == ""
    assert f"No reference is installed in {data}" in "".join(empty.stderr.splitlines())
    added = json.loads(safegraft("reference", "add", built, "--json", SAFEGRAFT_DATA=str(data)).stdout)
    assert safegraft("reference", "add", built, "--data", data).stdout == f"{added['id']}\n"
    listed = json.loads(safegraft("reference", "list", "--data", data, "--json").stdout)
    assert listed == [{"id": added["id"], "name": "reference", "methods": METHODS}]
    assert added["id"] in safegraft("reference", "list", "--data", data).stdout
    shown = safegraft("reference", "show", added["id"], "--data", data).stdout
    assert shown == (built / "manifest.json").read_text()
    assert safegraft("reference", "show", built, "--json").stdout == shown
    for wanted in (added["id"], str(built)):
        verified = json.loads(safegraft("reference", "verify", wanted, "--data", data, "--json").stdout)
        assert (verified["id"], verified["ok"]) == (added["id"], True)
    refused("reference", "show", "ref_nothing", "--data", data, code="reference_not_found")
    refused("reference", "verify", "ref_nothing", "--data", data, code="reference_not_found")
    refused("reference", "verify", tmp_path, "--data", data, code="not_a_reference")
    refused("reference", "show", tmp_path, "--data", data, code="not_a_reference")
    refused("reference", "add", built, "--data", built / "manifest.json", code="file_error")
    refused("reference", "add", tmp_path, "--data", data, code="not_a_reference")
    assert [item.id for item in ReferenceRegistry(data / "references").installed()] == [added["id"]]


def test_names_out_of_a_bundle_cannot_write_on_the_terminal(built: Path, tmp_path: Path) -> None:
    bundle, data = tmp_path / "bundle", tmp_path / "data"
    shutil.copytree(built, bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["name"] = "\x1b[2J[/red] name"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    safegraft("reference", "add", bundle, "--data", data)
    listed = safegraft("reference", "list", "--data", data, COLUMNS="200").stdout
    assert "\ufffd[2J[/red] name" in listed


def test_verify_names_the_file_that_changed(built: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(built, broken)
    path = broken / "nlsr.safetensors"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert str(path) in refused("reference", "verify", broken, code="corrupt_reference", status=1)
    error = json.loads(safegraft("reference", "verify", broken, "--json", status=1).stdout)["error"]
    assert (error["code"], error["class"], error["param"]) == ("corrupt_reference", "system", str(path))
    refused("reference", "add", broken, "--data", tmp_path / "data", code="corrupt_reference", status=1)
    assert not list((tmp_path / "data").glob("references/ref_*"))
    (broken / "gram.safetensors").unlink()
    path.write_bytes((built / "nlsr.safetensors").read_bytes())
    assert "gram.safetensors" in refused("reference", "verify", broken, code="corrupt_reference", status=1)


def test_realign_writes_adapter_and_reports(fresh: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "v1.2"
    done = safegraft(
        "realign", fresh, "--reference", built, "--out", out, "--set", "skip_share=0.25", "--set", "form=neuron"
    )
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert reports(out) == [f"v1.2.report.{form}" for form in FORMS]
    report = Report.model_validate_json((tmp_path / "new" / "v1.2.report.json").read_bytes())
    assert report.method.parameters.model_dump()["skip_share"] == 0.25
    assert report.summary.repaired > 0
    # Paths can be copied from the screen, however narrow it is.
    assert f"Adapter: {out}\n" in done.stdout
    assert f"{out}.report.json" in done.stdout
    assert done.stderr == ""


def test_analyze_writes_the_reports_alone_and_environment_variables_work(
    fresh: Path, built: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    environment = {
        "SAFEGRAFT_REFERENCE": str(built),
        "SAFEGRAFT_OUT": str(out),
        "SAFEGRAFT_METHOD": "gram",
        "SAFEGRAFT_SET": "general_weight=2.5",
        "SAFEGRAFT_ANALYZE": "1",
        "SAFEGRAFT_JSON": "1",
    }
    report = Report.model_validate_json(safegraft("realign", fresh, status=0, **environment).stdout)
    assert report.mode == "analyze"
    assert report.output is None
    assert report.method.parameters == GramParameters(general_weight=2.5)
    assert not out.exists()
    assert reports(out) == [f"out.report.{form}" for form in FORMS]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--method", "magic"], "invalid_parameter", "nlsr, gram"),
        (["--set", "skip_shar=0.5"], "invalid_parameter", "skip_share"),
        (["--set", "skip_share=2"], "invalid_parameter", "skip_share: .*less than or equal to 1"),
        (["--set", "skip_share=half"], "invalid_parameter", "skip_share: .*number"),
        (["--set", "skip_share=nan"], "invalid_parameter", "skip_share"),
        (["--set", "form=whole"], "invalid_parameter", "form: .*neuron"),
        (["--set", "skip_share"], "invalid_parameter", "name=value"),
        (["--set", "=1"], "invalid_parameter", "name=value"),
        (["--set", "type=gram"], "invalid_parameter", "--method"),
        (["--set", "general_weight=much"], "invalid_parameter", "general_weight: .*number"),
        (["--set", "amplification=1"], "invalid_parameter", "nlsr and gram have amplification"),
        (["--set", "skip_share=.5", "--set", "general_weight=.1"], "invalid_parameter", "no method has all of"),
        (["--method", "gram", "--set", "skip_share=0.5"], "invalid_parameter", "general_weight"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_method_or_parameter_is_refused_by_name(
    fresh: Path, built: Path, tmp_path: Path, arguments: list[str], code: str, says: str
) -> None:
    message = refused("realign", fresh, "--reference", built, "--out", tmp_path / "out", *arguments, code=code)
    assert re.search(says, message), message
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_no_half_result_is_left(fresh: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert str(out) in refused("realign", fresh, "--reference", built, "--out", out, code="output_exists")
    out.rmdir()
    message = refused(
        "realign", fresh, "--reference", built, "--out", out, "--set", "form=factor", code="lineage_mismatch"
    )
    assert "neuron" in message
    refused("realign", fresh, "--reference", tmp_path, "--out", out, code="not_a_reference")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "make", "code"),
    [
        ("tokenizer.json", lambda path: path.symlink_to("/etc/passwd"), "link_leaves_folder"),
        ("README.md", lambda path: path.symlink_to("/dev/zero"), "link_leaves_folder"),
        ("tokenizer.json", os.mkfifo, "not_a_file"),
        ("vocab.txt", lambda path: path.symlink_to("."), "not_a_file"),
        ("merges.txt", lambda path: path.symlink_to("nowhere"), "not_a_file"),
    ],
    ids=["link-to-a-secret", "link-without-end", "pipe", "link-to-a-folder", "link-to-nothing"],
)
def test_a_strangers_folder_reads_nothing_but_its_own_files(
    fresh: Path, built: Path, tmp_path: Path, name: str, make: Callable[[Path], None], code: str
) -> None:
    sent = tmp_path / "sent"
    shutil.copytree(fresh, sent)
    make(sent / name)
    message = refused("realign", sent, "--reference", built, "--out", tmp_path / "out", "--method", "gram", code=code)
    assert message.startswith(f"{code}: {name} ")
    assert refused("inspect", sent, code=code) == message
    assert [path.name for path in tmp_path.iterdir()] == ["sent"]


def test_what_came_stays_as_it_came(fresh: Path, built: Path, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    shutil.copytree(fresh, sent)
    before = sorted(sent.rglob("*"))
    (tmp_path / "link").symlink_to(sent)
    for out in (sent, sent / "out", sent / "new" / "out", tmp_path / "link" / "out", sent / ".." / "sent" / "out"):
        for mode in ([], ["--analyze"]):
            message = refused("realign", sent, "--reference", built, "--out", out, *mode, code="output_in_input")
            assert str(out) in message
    assert sorted(sent.rglob("*")) == before


def test_several_strengths_make_a_folder_each(fresh: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    common: list[str | Path] = ["realign", fresh, "--reference", built, "--out", out]
    done = safegraft(*common, "--method", "gram", "--strengths", "0.1,1", "--json")
    assert sorted(path.name for path in out.iterdir()) == ["0.1", "1"]
    assert [variant["strength"] for variant in json.loads(done.stdout)["variants"]] == [0.1, 1.0]
    for wrong in ("much", "0.1,nan", "0.1,0.1", "0", "0.1,,0.2"):
        elsewhere: list[str | Path] = ["realign", fresh, "--reference", built, "--out", tmp_path / "other"]
        refused(*elsewhere, "--method", "gram", "--strengths", wrong, code="(invalid_parameter|bad_strengths)")
    refused(*elsewhere, "--strengths", "0.1", "--method", "none", code="bad_strengths")


def test_a_report_is_verified_by_running_it_again(fresh: Path, continued: Path, built: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "out.report.json"
    safegraft("realign", fresh, "--reference", built, "--out", out, "--method", "gram", "--strengths", "0.1,1")
    given: list[str | Path] = ["--reference", built, "--adapter"]
    assert "reproduced" in safegraft("verify", report, *given, fresh).stdout
    other = json.loads(safegraft("verify", report, *given, continued, "--json", status=1).stdout)
    assert not other["ok"]
    assert "adapter's SHA-256" in other["problems"][0]
    claimed = json.loads(report.read_text())
    # A sentence is no measurement, and another version may word it anew.
    claimed["headline"] = None
    report.write_text(json.dumps(claimed))
    assert "reproduced" in safegraft("verify", report, *given, fresh).stdout
    claimed["variants"][1]["output"]["sha256"] = "0" * 64
    claimed["environment"]["versions"]["torch"] = "0.1"
    report.write_text(json.dumps(claimed))
    told = safegraft("verify", report, *given, fresh, status=1).stdout
    assert "`variants` is not what the report says" in told
    assert "torch 0.1 ran then" in told
    report.write_text("{}")
    refused("verify", report, *given, fresh, code="not_a_report")


def test_a_report_names_no_folder_as_its_reference(fresh: Path, built: Path, tmp_path: Path) -> None:
    report, data = tmp_path / "out.report.json", tmp_path / "data"
    safegraft("realign", fresh, "--reference", built, "--out", tmp_path / "out", "--method", "gram")
    given: list[str | Path] = ["verify", report, "--adapter", fresh, "--data", data]
    refused(*given, code="reference_not_found")
    claimed = json.loads(report.read_text())
    claimed["reference"]["id"] = str(built)
    report.write_text(json.dumps(claimed))
    assert repr(str(built))[1:60] in refused(*given, code="reference_not_found")
    assert "reproduced" in safegraft(*given, "--reference", built).stdout
    claimed["reference"]["id"] = safegraft("reference", "add", built, "--data", data).stdout.strip()
    report.write_text(json.dumps(claimed))
    assert "reproduced" in safegraft(*given).stdout


def test_nothing_out_of_a_report_acts_on_the_terminal(fresh: Path, built: Path, tmp_path: Path) -> None:
    report, escape = tmp_path / "out.report.json", "\x1b]0;owned\x07\x1b[2J\nThe report is reproduced"
    safegraft("realign", fresh, "--reference", built, "--out", tmp_path / "out", "--method", "gram", "--analyze")
    original = report.read_text()
    given: list[str | Path] = ["verify", report, "--adapter", fresh, "--reference", built]

    def change(*path: str) -> None:
        claimed = json.loads(original)
        part = claimed
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = escape
        report.write_text(json.dumps(claimed))

    for part in (("input", "sha256"), ("reference", "sha256"), ("input", "config_sha256")):
        change(*part)
        told = safegraft(*given, status=1).stdout
        assert told.startswith("Differs: ")
        assert "[2J" in told
        assert told.count("\n") == 1
        assert told[:-1].isprintable()
    for name in (["device"], ["versions", "torch"], ["versions", "x"]):
        change("environment", *name)
        told = safegraft(*given).stdout
        assert told.startswith("Note: ")
        assert told.count("\n") == 2
        assert told.replace("\n", "").isprintable()
    change("reference", "id")
    assert refused(*given[:4], "--data", tmp_path, code="reference_not_found")[:-1].isprintable()
    change(escape)
    assert refused("report", report, code="not_a_report")[:-1].isprintable()


def test_next_tokens_are_compared_where_a_model_is_given(
    fresh: Path, built: Path, base: Path, aligned: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt\nhow do i bake a cake\nplease help\n")
    common: list[str | Path] = ["realign", fresh, "--reference", built, "--method", "gram", "--probe", prompts]
    refused(*common, "--out", tmp_path / "no", code="invalid_parameter")
    # Compared on another model, or on the one without its alignment, the numbers would mean nothing.
    refused(*common, "--out", tmp_path / "no", "--base", base, code="probe_model_mismatch")
    refused(*common, "--out", tmp_path / "no", "--base", base, "--aligned", fresh, code="probe_model_mismatch")
    assert not (tmp_path / "no").exists()
    models: list[str | Path] = ["--base", base, "--aligned", aligned]
    done = safegraft(*common, "--out", tmp_path / "out", *models, "--json")
    probe = json.loads(done.stdout)["probe"]
    assert probe["prompts"] == 2
    assert probe["before_from_base"]["divergence"] > 0
    assert probe["after_from_before"]["divergence"] > 0
    nothing: list[str | Path] = [
        *common[:4],
        "--method",
        "none",
        "--probe",
        prompts,
        "--out",
        tmp_path / "none",
        *models,
        "--json",
    ]
    probe = json.loads(safegraft(*nothing).stdout)["probe"]
    assert probe["after_from_before"] == {"divergence": 0.0, "same_token": 1.0}


def test_serve_asks_for_keys_unless_it_is_for_development(tmp_path: Path) -> None:
    refused("serve", "--data", tmp_path / "data", code="no_api_keys")
    assert "loopback" in refused("serve", "--dev", "--host", "0.0.0.0", code="invalid_parameter")
    refused("serve", code="invalid_parameter", SAFEGRAFT_DEV="1", SAFEGRAFT_HOST="0.0.0.0")
    assert not (tmp_path / "data").exists()
