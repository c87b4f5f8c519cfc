"""The command line. Every option is also an environment variable, SAFEGRAFT_<OPTION>: --batch-size is
SAFEGRAFT_BATCH_SIZE (not --help and --version, which are questions). `--json` prints one JSON object for machines.

Exit status: 0 done, 2 bad usage or bad input, 1 our failure. SAFEGRAFT_TRACEBACK=1 shows where an unexpected one arose.
"""

import json
import math
import os
import re
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.table import Table

from safegraft import __version__, logs
from safegraft.adapter import CONFIG, WEIGHTS, describe, is_adapter
from safegraft.bundle import MANIFEST, MAX_MANIFEST_BYTES, read_manifest, reference_id, verify_bundle
from safegraft.commands import evaluate as evaluate_command
from safegraft.commands import report as report_command
from safegraft.commands.groups import Groups
from safegraft.commands.report import tell_report
from safegraft.commands.terminal import (
    Data,
    DeviceName,
    Json,
    ModelDtype,
    database_of,
    err,
    out,
    plain,
    print_json,
    print_list,
    progress_bars,
    references_of,
    settings_for,
    tell,
    use_any_encoding,
)
from safegraft.contracts.base import told
from safegraft.contracts.methods import DEFAULT_METHOD, METHOD_PARAMETERS, MODELS, STRENGTH
from safegraft.contracts.report import Subject
from safegraft.dsse import load_public_key, load_signing_key
from safegraft.errors import InvalidParameter, SafegraftError
from safegraft.files import read_bounded, sha256_file
from safegraft.finite import check_finite
from safegraft.ids import new_id
from safegraft.ingest import companions_of
from safegraft.memory import prepare_memory
from safegraft.prompts import GENERAL, SAFETY
from safegraft.provenance import (
    Invocation,
    folder_digests,
    input_digests,
    make_statement,
    media_type,
    write_provenance,
)
from safegraft.records import compatibility
from safegraft.report import render, with_headline
from safegraft.report.text import Look, inspection
from safegraft.sizes import update_sizes
from safegraft.threads import share_cores
from safegraft.verification import MAX_DOCUMENT_BYTES, Evidence

app = typer.Typer(
    name="safegraft",
    cls=Groups,
    help="Repairs the safety of fine-tuned LoRA adapters, after the fine-tuning and without training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
reference_app = typer.Typer(help="Build, install and check references.", no_args_is_help=True)
app.add_typer(reference_app, name="reference")
app.command("report")(report_command.show)
app.command("evaluate")(evaluate_command.evaluate)

KNOWN_PARAMETERS = " ".join(
    f"{name}: {', '.join(field for field in model.model_fields if field != 'type')}."
    for name, model in MODELS.items()
    if len(model.model_fields) > 1
)


Folder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A PEFT LoRA folder.")]
ReferenceFolder = Annotated[
    Path, typer.Option(exists=True, file_okay=False, envvar="SAFEGRAFT_REFERENCE", help="A reference's folder.")
]
SigningKeyFile = Annotated[
    Path | None,
    typer.Option(envvar="SAFEGRAFT_SIGNING_KEY", help="Signs provenance; see `safegraft provenance keygen`."),
]


class MaskScope(StrEnum):
    row = "row"
    factor = "factor"


class OutputRank(StrEnum):
    customer = "customer"
    exact = "exact"


def main() -> None:
    """Entry point: turns every error into one line and a status."""
    # Read by tqdm when it is imported, so before anything of the engine is: the only bars here are ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    as_json = _json_asked()
    use_any_encoding()
    try:
        sys.exit(app(standalone_mode=not as_json))
    except SafegraftError as error:
        _fail(error, as_json)
    except (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        _fail(InvalidParameter(str(error), code="file_error"), as_json)
    except Exception as error:
        # typer's own errors of usage are no public class; they are known by this method.
        usage = getattr(error, "format_message", None)
        if usage is not None:
            _fail(InvalidParameter(usage(), code="usage_error"), as_json)
        if os.environ.get("SAFEGRAFT_TRACEBACK"):
            raise
        message = " ".join(str(error).split())
        _fail(SafegraftError(f"{type(error).__name__}: {message}"), as_json)


def _json_asked() -> bool:
    # Not from the parsed options: an error of usage is one before they are parsed.
    return "--json" in sys.argv or os.environ.get("SAFEGRAFT_JSON", "").lower() in ("1", "true", "t", "yes", "y", "on")


def _fail(error: SafegraftError, as_json: bool) -> NoReturn:
    if as_json:
        body = {"code": error.code, "message": str(error), "param": error.param, "class": error.fault}
        sys.stdout.write(json.dumps({"error": body}) + "\n")
    # Soft: a line broken at column 80 would break paths, and be two lines for those who search logs.
    err.print(f"[bold red]{error.code}[/]: ", end="")
    # A message may quote a stranger's file; those of usage have lines of their own.
    message = plain(re.sub(r"\s*[\n\t]\s*", " ", str(error)))
    err.print(message, markup=False, highlight=False, soft_wrap=True)
    sys.exit(2 if error.fault == "user" else 1)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Show the version and end.")] = False) -> None:
    if version:
        sys.stdout.write(f"safegraft {__version__}\n")
        raise typer.Exit
    prepare_memory()


@app.command()
def serve(
    host: Annotated[str, typer.Option(envvar="SAFEGRAFT_HOST")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="SAFEGRAFT_PORT", min=1, max=65535)] = 8000,
    data: Data = Path("var"),
    workers: Annotated[int, typer.Option(envvar="SAFEGRAFT_WORKERS", min=1, max=64)] = 1,
    dev: Annotated[bool, typer.Option("--dev", envvar="SAFEGRAFT_DEV", help="No keys; loopback only.")] = False,
    device: DeviceName = "cpu",
    signing_key: SigningKeyFile = None,
) -> None:
    """Runs gateway, workers and an embedded queue on this machine. Ctrl-C ends all of them."""
    from safegraft.launch import Plan
    from safegraft.launch import serve as run

    logs.setup(settings_for(data).log_format)
    if dev and host not in ("127.0.0.1", "::1", "localhost"):
        raise InvalidParameter(
            f"--dev asks for no keys, so it only listens on loopback, not on {host}.", param="--host"
        )
    if signing_key is not None:
        load_signing_key(signing_key)  # said here, and not in a log of a worker that is started again and again
    if not dev and not _has_key(data):
        raise InvalidParameter(
            "There is no API key yet.",
            code="no_api_keys",
            hint=f"Make one with: safegraft keys create --data {data}. Or try it with --dev.",
        )
    if not references_of(settings_for(data)).installed():
        how = f"safegraft reference add DIR --data {plain(str(data))}"
        err.print(f"No reference is installed yet; jobs need one: {how}", style="yellow", soft_wrap=True)
    broker = os.environ.get("SAFEGRAFT_REDIS_URL") or os.environ.get("REDIS_URL", "")
    run(
        Plan(
            host=host,
            port=port,
            data=data,
            workers=workers,
            dev=dev,
            redis_url=broker,
            device=device,
            signing_key=signing_key,
            drain_seconds=settings_for(data).drain_seconds,
        )
    )


@app.command()
def inspect(adapter: Folder, as_json: Json = False) -> None:
    """Says what an adapter is and where its update is large, or why it cannot be treated. Reads no base model."""
    companions_of(adapter)
    description = describe(adapter)
    with progress_bars(as_json) as progress:
        check_finite(adapter / WEIGHTS, description.header, lambda done, total: progress("finite values", done, total))
        sizes = (
            update_sizes(adapter / WEIGHTS, description, lambda done, total: progress("sizes", done, total))
            if not as_json
            else {}
        )
    found = {
        "base_model": description.config.base_model_name_or_path,
        "rank": description.config.r,
        "alpha": description.config.lora_alpha,
        "dtype": description.dtype,
        "modules": len(description.modules),
        "target_modules": description.kinds,
        "parameters": description.parameters,
        "bytes": description.header.file_bytes,
        "compatibility": compatibility(description).model_dump(),
    }
    if as_json:
        print_json(found)
        return
    out.print(inspection(description, sizes, Look.of(out)), soft_wrap=not out.is_terminal, highlight=False)
    table = Table(show_header=False, box=None)
    for key, value in found.items():
        if key == "compatibility":
            for server, answer in compatibility(description).model_dump().items():
                word = "yes" if answer["ok"] else "no"
                table.add_row(f"loads in {server}", word + (f" ({answer['reason']})" if answer["reason"] else ""))
        else:
            text = ", ".join(value) if isinstance(value, list) else str(value)
            # The label is a stranger's text, which may hold what a terminal acts on.
            table.add_row(key.replace("_", " "), text if text.isprintable() else ascii(text)[1:-1])
    out.print(table, markup=False)


@app.command()
def realign(
    adapter: Folder,
    reference: ReferenceFolder,
    to: Annotated[Path, typer.Option("--out", envvar="SAFEGRAFT_OUT", help="A folder that does not exist yet.")],
    method: Annotated[
        str,
        typer.Option(
            envvar="SAFEGRAFT_METHOD",
            help=f"{', '.join(MODELS)}, or auto: the one that is recommended for the adapter.",
        ),
    ] = DEFAULT_METHOD,
    settings: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            envvar="SAFEGRAFT_SET",
            help="A parameter of the method; where none is named, of the only one that knows it; repeatable. "
            f"{KNOWN_PARAMETERS}",
        ),
    ] = [],  # noqa: B006
    strengths: Annotated[
        str,
        typer.Option(
            envvar="SAFEGRAFT_STRENGTHS",
            metavar="V,V,…",
            help="Several values of the method's strength at once; OUT then holds one adapter a value. "
            + "; ".join(f"{name}: {parameter}" for name, parameter in STRENGTH.items()),
        ),
    ] = "",
    output_rank: Annotated[
        OutputRank,
        typer.Option(
            envvar="SAFEGRAFT_OUTPUT_RANK", help="Keep the adapter's rank, or take the one that loses nothing."
        ),
    ] = OutputRank.customer,
    analyze: Annotated[
        bool, typer.Option("--analyze", envvar="SAFEGRAFT_ANALYZE", help="Only measure; write the report alone.")
    ] = False,
    probe: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            envvar="SAFEGRAFT_PROBE",
            help="Prompts on which to compare the model's next tokens before and after; needs --base or --aligned.",
        ),
    ] = None,
    base: Annotated[
        str, typer.Option(envvar="SAFEGRAFT_BASE", help="For --probe: the model, as in `reference build`.")
    ] = "",
    aligned: Annotated[
        str, typer.Option(envvar="SAFEGRAFT_ALIGNED", help="For --probe: the alignment, as in `reference build`.")
    ] = "",
    device: DeviceName = "cpu",
    signing_key: SigningKeyFile = None,
    builder_id: Annotated[
        str, typer.Option(envvar="SAFEGRAFT_BUILDER_ID", help="A URI that names you in the provenance.")
    ] = "urn:safegraft:cli",
    as_json: Json = False,
) -> None:
    """Repairs an adapter without a server. The report lies beside OUT as OUT.report.json, .html, .csv and pictures, and
    where it comes from as OUT.provenance.json."""
    invocation = Invocation(id=new_id("run"), builder=builder_id, started=time.time())
    signer = load_signing_key(signing_key) if signing_key is not None else None
    parameters = parse_parameters(method, settings)
    values = _numbers(strengths)
    if probe is not None and (analyze or values or not (base or aligned)):
        raise InvalidParameter(
            "--probe compares one patched adapter with the one that came, on a model.",
            param="--probe",
            hint="Name the model by --base or --aligned, and leave out --analyze and --strengths.",
        )
    _refuse_inside(to, adapter)
    if to.exists():
        raise InvalidParameter(
            f"{to} exists already.", code="output_exists", param="--out", hint="Name another folder, or move it away."
        )
    _bundle(reference)
    companions_of(adapter)  # before a reference and models are loaded, which takes long
    from safegraft.engine.models import check_device
    from safegraft.engine.pipeline import realign as run
    from safegraft.engine.reference import LoadedReference

    check_device(device)
    known = LoadedReference(reference, device)
    # Read before anything is written: a mistake in them must not leave an adapter without its report.
    probing = _probing(probe, base, aligned, known.manifest) if probe is not None else None
    stem = to.with_name(f"{to.name}.report")
    with progress_bars(as_json) as progress:
        report = run(
            adapter,
            known,
            parameters,
            None if analyze else to,
            strengths=values,
            output_rank=output_rank.value,
            progress=progress,
        )
        subject = Subject(adapter=adapter.resolve().name, written_at=int(time.time()))
        report = report.model_copy(update={"subject": subject})
        files = render(report, stem)
        if probing is not None:
            report = _probed(report, *probing, adapter, to, device)
            files = render(report, stem)
        statement = make_statement(
            report,
            known.manifest,
            invocation=invocation,
            outputs=folder_digests(to) if not analyze else {},
            inputs=input_digests(adapter, report),
            report_sha256=sha256_file(files[0]),
        )
        write_provenance(statement, to.with_name(f"{to.name}.provenance.json"), signer)
    if as_json:
        print_json(with_headline(report).model_dump(mode="json"))
        return
    tell_report(report)
    tell(f"Adapter: {to}" if not analyze else "Only measured; nothing was patched.")
    from safegraft.files import side_car_folder

    for path in sorted(side_car_folder(to).glob("*.safetensors")) if not analyze else []:
        tell(f"Beside it: {path}")
    tell("Report:  " + " ".join(str(path) for path in files))
    tell(f"Provenance ({'signed' if signer is not None else 'not signed'}): {to}.provenance.json")


def _refuse_inside(to: Path, adapter: Path) -> None:
    """What came must stay as it came: a result in it would be taken for a part of it, and reports beside it too."""
    # By os.path, because pathlib raises RuntimeError for links that lead in circles.
    if Path(os.path.realpath(to)).is_relative_to(os.path.realpath(adapter)):
        raise InvalidParameter(
            f"{to} is, or lies in, the folder of the adapter that is to be repaired.",
            code="output_in_input",
            param="--out",
            hint="Name a folder elsewhere, for example beside it.",
        )


def _has_key(data: Path) -> bool:
    from safegraft.stores.keys import KeyStore
    from safegraft.vault import open_vault

    settings = settings_for(data)
    if not settings.database_url and not data.exists():
        return False  # asked without making anything
    return KeyStore(database_of(settings), open_vault(settings)).any_live()


def _numbers(text: str) -> list[float]:
    """`0.1,0.3` → [0.1, 0.3]. Raises InvalidParameter."""
    try:
        found = [float(part) for part in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise InvalidParameter(
            f"--strengths {text!r}: expected numbers, like 0.1,0.3,1.", param="--strengths"
        ) from error
    if not all(map(math.isfinite, found)):
        raise InvalidParameter(f"--strengths {text!r}: expected finite numbers.", param="--strengths")
    return found


def _probing(probe: Path, base: str, aligned: str, manifest: Any) -> tuple[Any, list[str]]:
    """The models and prompts of a probe. Raises where they are not the reference's."""
    from safegraft.engine.build import BuildSources
    from safegraft.engine.conversations import read_conversations
    from safegraft.engine.models import quiet_libraries
    from safegraft.engine.probe import check_sources

    quiet_libraries()
    asked = [item.prompt for item in read_conversations(probe)]
    sources = BuildSources(aligned=_model(aligned or base), base=_model(base) if base and aligned else None)
    check_sources(sources, manifest)
    return sources, asked


def _probed(report: Any, sources: Any, asked: list[str], before: Path, after: Path, device: str) -> Any:
    from safegraft.engine.probe import compare

    found = compare(sources, asked, before, after, report.lineage != "continued", device)
    return report.model_copy(update={"probe": found})


def _model(name: str) -> Path:
    """A folder, adapter or model, or the folder of a model that an installed package carries."""
    from safegraft.engine.models import resolve_base

    return Path(name) if is_adapter(Path(name)) else resolve_base(name)


@app.command("verify")
def verify_report(
    report: Annotated[
        Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="A report.json or a provenance.json.")
    ],
    adapter: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            envvar="SAFEGRAFT_ADAPTER",
            help="Of a report: the adapter that was sent. Of provenance: the one that came out.",
        ),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            envvar="SAFEGRAFT_REFERENCE",
            help="A folder or an id. Left out: the report's, if it is installed in --data.",
        ),
    ] = "",
    given: Annotated[
        Path | None,
        typer.Option(
            "--input", exists=True, file_okay=False, envvar="SAFEGRAFT_INPUT", help="Of provenance: what was sent."
        ),
    ] = None,
    side_cars: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, envvar="SAFEGRAFT_SIDE_CARS", help="Of provenance: the side-cars' folder."
        ),
    ] = None,
    attested: Annotated[
        Path | None,
        typer.Option(
            "--report", exists=True, dir_okay=False, envvar="SAFEGRAFT_REPORT", help="Of provenance: the report.json."
        ),
    ] = None,
    public_key: Annotated[
        Path | None,
        typer.Option(envvar="SAFEGRAFT_PUBLIC_KEY", help="Of provenance: the key that must have signed it."),
    ] = None,
    data: Data = Path("var"),
    device: DeviceName = "cpu",
    as_json: Json = False,
) -> None:
    """Runs a report's realignment again and compares the bytes, or checks provenance against files and a key, offline.
    Exit status 1 where something differs."""
    body = read_bounded(report, MAX_DOCUMENT_BYTES)
    if media_type(body) is not None:
        from safegraft.commands import provenance

        evidence = Evidence(
            adapter=adapter,
            side_cars=side_cars,
            report=attested,
            given=given,
            reference=_find(reference, data) if reference else None,
            key=load_public_key(public_key) if public_key is not None else None,
        )
        sys.exit(provenance.check(body, evidence, as_json))
    if adapter is None:
        raise InvalidParameter(
            "A report is checked by running it again, which needs --adapter, the adapter that was sent.",
            code="usage_error",
            param="--adapter",
        )
    from safegraft.contracts.report import Report

    try:
        claimed = Report.model_validate_json(body)
    except ValidationError as error:
        raise InvalidParameter(
            f"{report} is neither report nor provenance.", code="not_a_report", param="FILE"
        ) from error
    # Where it lies is for whoever checks to say: a path out of the report would be of its author's choice.
    folder = _find(reference, data) if reference else references_of(settings_for(data)).folder(claimed.reference.id)
    from safegraft.engine.models import check_device
    from safegraft.engine.rerun import rerun

    check_device(device)
    with progress_bars(as_json) as progress:
        found = rerun(claimed, adapter, folder, device, progress)
    if as_json:
        print_json({"ok": not found.problems, "problems": found.problems, "differences": found.differences})
    else:
        for line in found.differences:
            out.print(plain(f"Note: {line}"), markup=False, style="yellow", soft_wrap=True)
        for line in found.problems:
            out.print(plain(f"Differs: {line}"), markup=False, style="red", soft_wrap=True)
        if not found.problems:
            out.print("The report is reproduced: same input, same reference, same bytes out.", markup=False)
    sys.exit(1 if found.problems else 0)


def parse_parameters(method: str, settings: list[str]) -> Any:
    """Parameters from `--method` and `--set name=value`. Raises InvalidParameter with the name at fault."""
    if method not in (*MODELS, DEFAULT_METHOD):
        known = ", ".join([*MODELS, DEFAULT_METHOD])
        raise InvalidParameter(f"Unknown method {method!r}; known: {known}.", param="--method")
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise InvalidParameter(f"--set {setting!r}: expected name=value.", param="--set")
        if name == "type":
            raise InvalidParameter("The method is chosen by --method, not by --set type=….", param="--set")
        values[name] = value
    if method == DEFAULT_METHOD and values:
        method = _knowing(list(values))
    try:
        # All of them are text here.
        return METHOD_PARAMETERS.validate_python({"type": method, **values}, strict=False)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        known = ", ".join(key for key in MODELS[method].model_fields if key != "type")
        raise InvalidParameter(f"{name}: {told(first)}.", param=name, hint=f"{method} knows: {known}.") from error


def _knowing(names: list[str]) -> str:
    """The one method that has all of these parameters: which one is recommended is only known later. Raises
    InvalidParameter."""
    found = [method for method, model in MODELS.items() if set(names) <= model.model_fields.keys() - {"type"}]
    if len(found) == 1:
        return found[0]
    for name in names:
        if not any(name in model.model_fields for model in MODELS.values()):
            raise InvalidParameter(f"{name}: no method has such a parameter.", param=name, hint=KNOWN_PARAMETERS)
    which = f"{' and '.join(found)} have {' and '.join(names)}" if found else f"no method has all of {', '.join(names)}"
    raise InvalidParameter(f"Of which method? {which}.", param="--method", hint="Name it with --method.")


@reference_app.command("build")
def build(
    aligned: Annotated[
        str,
        typer.Option(
            envvar="SAFEGRAFT_ALIGNED",
            help="The alignment: the provider's adapter on --base, or a full model (folder, or package with a GGUF).",
        ),
    ],
    to: Annotated[
        Path, typer.Option("--out", envvar="SAFEGRAFT_OUT", help="The bundle's folder; it must not exist yet.")
    ],
    base: Annotated[
        str,
        typer.Option(
            envvar="SAFEGRAFT_BASE",
            help="The unaligned model: a folder, or an installed package with a GGUF. Left out: --aligned is a full "
            "model that stands alone.",
        ),
    ] = "",
    weak: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, envvar="SAFEGRAFT_WEAK", help="A weaker adapter, from which to extrapolate."
        ),
    ] = None,
    prompts: Annotated[
        Path,
        typer.Option(
            envvar="SAFEGRAFT_PROMPTS",
            help="Harmful prompts: CSV (`prompt`) or JSONL (`prompt`, `response`). Left out: those of this package.",
        ),
    ] = SAFETY,
    general: Annotated[
        str,
        typer.Option(
            envvar="SAFEGRAFT_GENERAL",
            help="Ordinary prompts, likewise; `none` leaves out what gram and antidote need.",
        ),
    ] = str(GENERAL),
    beta: Annotated[
        float, typer.Option(min=0.0, max=10.0, envvar="SAFEGRAFT_BETA", help="Amplification of the aligned adapter.")
    ] = 0.9,
    sparsity: Annotated[
        float,
        typer.Option(
            min=0.0, max=0.99, envvar="SAFEGRAFT_SPARSITY", help="P_SR: the share that is not safety-critical."
        ),
    ] = 0.8,
    mask_scope: Annotated[
        MaskScope,
        typer.Option(envvar="SAFEGRAFT_MASK_SCOPE", help="Take the safety-critical share per row, or per factor."),
    ] = MaskScope.row,
    snip: Annotated[
        bool, typer.Option("--snip", envvar="SAFEGRAFT_SNIP", help="Also score neurons by gradients (a pass back).")
    ] = False,
    preference_snip: Annotated[
        bool,
        typer.Option(
            "--preference-snip", envvar="SAFEGRAFT_PREFERENCE_SNIP", help="Also by gradients of a preference loss."
        ),
    ] = False,
    safelock: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, envvar="SAFEGRAFT_SAFELOCK", help="Published SafetyLock directions to use."
        ),
    ] = None,
    label: Annotated[
        list[str],
        typer.Option(envvar="SAFEGRAFT_LABEL", help="A name by which adapters know this base; repeatable."),
    ] = [],  # noqa: B006
    rank: Annotated[
        int,
        typer.Option(min=1, max=4096, envvar="SAFEGRAFT_RANK", help="Of the difference between two full models."),
    ] = 64,
    max_pairs: Annotated[
        int | None,
        typer.Option(min=1, envvar="SAFEGRAFT_MAX_PAIRS", help="Keep no more eigenpairs a layer input than this."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=8, envvar="SAFEGRAFT_MAX_TOKENS", help="Longer conversations are cut.")
    ] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, envvar="SAFEGRAFT_BATCH_SIZE")] = 8,
    dtype: Annotated[ModelDtype, typer.Option(envvar="SAFEGRAFT_DTYPE", help="Of the model's weights.")] = (
        ModelDtype.bfloat16
    ),
    device: DeviceName = "cpu",
    as_json: Json = False,
) -> None:
    """Builds a reference: one pass over each prompt set gathers what every method needs.

    A build that is killed goes on where it was when it is started again; until then it keeps OUT.partial.
    """
    if to.exists():
        raise InvalidParameter(
            f"{to} exists already.", code="output_exists", param="--out", hint="Name another folder, or move it away."
        )
    if Path(aligned).is_dir() and not any((Path(aligned) / name).is_file() for name in (CONFIG, "config.json")):
        raise InvalidParameter(
            f"{aligned} holds neither {CONFIG} nor config.json; it is no adapter and no model.",
            code="missing_config",
            param="--aligned",
        )
    share_cores()
    from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
    from safegraft.engine.bundle import BuildSettings
    from safegraft.engine.conversations import read_conversations
    from safegraft.engine.models import quiet_libraries, resolve_base

    quiet_libraries()
    sources = BuildSources(
        aligned=_model(aligned),
        base=resolve_base(base) if base else None,
        weak=weak,
        safelock=safelock,
        # Customers may name the model on which they trained: the aligned one, or the one below it.
        labels=[*label, *(Path(name).name for name in (base, aligned) if name and not is_adapter(Path(name)))],
    )
    asked = BuildPrompts(
        safety=read_conversations(prompts),
        general=None if general == "none" else read_conversations(Path(general)),
    )
    settings = BuildSettings(
        amplification=beta,
        sparsity=sparsity,
        mask_scope=mask_scope.value,
        snip=snip,
        preference_snip=preference_snip,
        rank=rank,
        max_pairs=max_pairs,
        max_tokens=max_tokens,
        batch_size=batch_size,
        dtype=dtype.value,
        device=device,
    )
    with progress_bars(as_json, log=True) as progress:
        manifest = build_reference(to, sources=sources, prompts=asked, settings=settings, progress=progress)
    if as_json:
        # Without what has a line for every layer.
        large: Any = {"base_model": {"modules"}, "aligned": True, "gram": True, "safetylock": {"layers"}}
        print_json(manifest.model_dump(mode="json", exclude=large))
    else:
        size = sum(file.bytes for file in manifest.files.values()) / 2**20
        out.print(
            f"{to}: {len(manifest.base_model.modules)} modules, methods {', '.join(manifest.methods)}, {size:.0f} MiB",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


@reference_app.command("add")
def add(
    reference: Annotated[Path, typer.Argument(exists=True, file_okay=False)],
    data: Data = Path("var"),
    as_json: Json = False,
) -> None:
    """Verifies a bundle and installs it in the data folder, and in SAFEGRAFT_STORAGE_URL where that is set.

    A running service sees it without a restart.
    """
    installed = references_of(settings_for(data)).add(reference)
    if as_json:
        print_json({"id": installed.id, "name": installed.manifest.name, "folder": str(installed.folder)})
    else:
        out.print(installed.id, markup=False, highlight=False)


@reference_app.command("list")
def list_(data: Data = Path("var"), as_json: Json = False) -> None:
    """Lists the installed references, newest first."""
    found = references_of(settings_for(data)).installed()
    if as_json:
        print_json([{"id": item.id, "name": item.manifest.name, "methods": item.manifest.methods} for item in found])
        return
    if not found:
        where = plain(str(data))
        err.print(
            f"No reference is installed in {where}: safegraft reference add DIR --data {where}",
            markup=False,
            soft_wrap=True,
        )
        return
    table = Table("id", "name", "base model", "methods", box=None)
    for item in found:
        # Names that whoever built the bundle gave.
        name, base_model = plain(item.manifest.name), plain(item.manifest.base_model.labels[0])
        table.add_row(item.id, name, base_model, plain(", ".join(item.manifest.methods)))
    print_list(table)


@reference_app.command("show")
def show(reference: str, data: Data = Path("var"), as_json: Json = False) -> None:
    """Prints the manifest of an installed reference (by id) or of a bundle (by folder); it is JSON in any case."""
    if Path(reference).is_dir():
        raw = read_bounded(_bundle(Path(reference)) / MANIFEST, MAX_MANIFEST_BYTES)
    else:
        raw = references_of(settings_for(data)).manifest(reference)
    text = raw.decode("utf-8", "replace")
    # Programs get it as it is; a folder may hold anything under this name, which no terminal is to act on.
    sys.stdout.write("\n".join(map(plain, text.split("\n"))) if sys.stdout.isatty() else text)


@reference_app.command("verify")
def verify(reference: str, data: Data = Path("var"), as_json: Json = False) -> None:
    """Re-hashes every file of a bundle; exit status 1 where one differs."""
    folder = _find(reference, data)
    manifest = verify_bundle(folder)
    identity = reference_id(read_manifest(folder)[1])
    if as_json:
        print_json({"id": identity, "ok": True, "files": list(manifest.files)})
    else:
        out.print(f"{identity}: {len(manifest.files)} files are as they were built", markup=False, highlight=False)


def _find(reference: str, data: Path) -> Path:
    """The folder of an installed reference (by id) or of a bundle (by folder)."""
    if Path(reference).is_dir():
        return _bundle(Path(reference))
    return references_of(settings_for(data)).folder(reference)


def _bundle(folder: Path) -> Path:
    """Raises InvalidParameter for a folder that never was a reference; a broken one is another matter."""
    if not (folder / MANIFEST).is_file():
        raise InvalidParameter(f"{folder} holds no {MANIFEST}; it is no reference.", code="not_a_reference")
    return folder
