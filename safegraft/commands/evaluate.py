"""`safegraft evaluate`: a model asked before and after a repair, and what it did as a part of the report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from safegraft.adapter import CONFIG, WEIGHTS, describe, is_adapter
from safegraft.commands.report import read_report
from safegraft.commands.terminal import DeviceName, Json, ModelDtype, err, out, print_json, progress_bars, tell
from safegraft.contracts.report import Digest, Evaluation, Report
from safegraft.errors import InvalidParameter
from safegraft.files import sha256_file, write_atomic
from safegraft.ingest import companions_of
from safegraft.report import words
from safegraft.threads import share_cores

if TYPE_CHECKING:
    from safegraft.engine.behaviour import Asked
    from safegraft.engine.conversations import Conversation

PROMPTS = "CSV (`prompt`) or JSONL"


def evaluate(
    before: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The customer's adapter.")],
    after: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="The repaired one.")],
    base: Annotated[
        str,
        typer.Option(envvar="SAFEGRAFT_BASE", help="The model that serves them: a folder, or a package with a GGUF."),
    ],
    aligned: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            envvar="SAFEGRAFT_ALIGNED",
            help="The provider's adapter, active beside them: for fresh adapters. Left out for continued ones.",
        ),
    ] = None,
    harmful: Annotated[
        Path | None,
        typer.Option(envvar="SAFEGRAFT_HARMFUL", help=f"Harmful prompts, {PROMPTS}: which are not declined?"),
    ] = None,
    benign: Annotated[
        Path | None,
        typer.Option(envvar="SAFEGRAFT_BENIGN", help=f"Harmless prompts, {PROMPTS}: which are declined?"),
    ] = None,
    task: Annotated[
        Path | None,
        typer.Option(
            envvar="SAFEGRAFT_TASK",
            help="The customer's task, CSV or JSONL (`prompt`, `response`): which answers begin with the response?",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, envvar="SAFEGRAFT_LIMIT", help="Ask no more than so many of each file, spread over it."),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            max=4096,
            envvar="SAFEGRAFT_MAX_NEW_TOKENS",
            help="Of an answer to a harmful or harmless prompt; the task's get two more than its longest response.",
        ),
    ] = 24,
    report: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            envvar="SAFEGRAFT_REPORT",
            help="The repair's report.json: refuses other adapters than its own, and a continued one with --aligned.",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--out",
            dir_okay=False,
            envvar="SAFEGRAFT_OUT",
            help="Writes the evaluation as JSON; replaces what is there.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, envvar="SAFEGRAFT_ANSWERS", help="Writes every answer as JSONL; replaces what is there."
        ),
    ] = None,
    dtype: Annotated[ModelDtype, typer.Option(envvar="SAFEGRAFT_DTYPE", help="Of the model's weights.")] = (
        ModelDtype.bfloat16
    ),
    device: DeviceName = "cpu",
    as_json: Json = False,
) -> None:
    """Asks a model with the customer's adapter and with the repaired one, and counts: harmful prompts that are
    answered, harmless ones that are declined, right answers to the task. Takes prompts that no reference was built
    from; `safegraft report --evaluation` makes the result a part of the report."""
    if harmful is None and benign is None and task is None:
        raise InvalidParameter(
            "There is nothing to ask.",
            code="usage_error",
            param="--harmful",
            hint="Name a file of prompts: --harmful, --benign or --task.",
        )
    folders = [folder for folder in (before, after, aligned, Path(base)) if folder is not None and folder.is_dir()]
    _refuse_overwriting({"--out": to, "--answers": answers}, [harmful, benign, task, report], folders)
    if aligned is not None and not is_adapter(aligned):
        raise InvalidParameter(
            f"{aligned} holds no {CONFIG}: it is no adapter.",
            code="missing_config",
            param="--aligned",
            hint="A full aligned model is given as --base, and --aligned left out.",
        )
    for side, folder in (("BEFORE", before), ("AFTER", after)):
        _refuse_others_than_adapters(side, folder)
        # Nothing but their own files is read, as by `realign`.
        companions_of(folder)
        describe(folder, own=folder is after)
    if report is not None:
        _refuse_others(read_report(report, "--report"), before, after, aligned is not None)
    share_cores()
    import torch

    from safegraft.engine.behaviour import Questions, Subject
    from safegraft.engine.behaviour import evaluate as run
    from safegraft.engine.conversations import read_conversations
    from safegraft.engine.models import check_device, quiet_libraries, resolve_base

    quiet_libraries()
    check_device(device)
    asked = {
        name: _spread(read_conversations(path), limit) if path is not None else []
        for name, path in (("harmful", harmful), ("benign", benign), ("task", task))
    }
    questions = Questions(
        harmful=[item.prompt for item in asked["harmful"]],
        benign=[item.prompt for item in asked["benign"]],
        task=asked["task"],
    )
    folder = resolve_base(base)
    with progress_bars(as_json, log=True) as progress:
        progress("the model", 0, 1)
        subject = Subject(folder, aligned, device=device, dtype=getattr(torch, dtype.value))
        progress("the model", 1, 1)
        found, told = run(subject, before, after, questions, new_tokens=max_new_tokens, progress=progress)
    if to is not None:
        write_atomic(to, (found.model_dump_json(indent=1) + "\n").encode())
    if answers is not None:
        write_atomic(answers, _lines(told).encode())
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(_table(found))
    tell(words.evaluation(found), soft=not out.is_terminal)
    tell(f"Judged by: {found.judge}. Intervals are Wilson's, of 95 %.", soft=not out.is_terminal)
    for label, path in (("Evaluation", to), ("Answers", answers)):
        if path is not None:
            tell(f"{label}: {path}")
    if report is None and aligned is None:
        _tell_base()
    if to is None:
        err.print("The evaluation was not written; --out keeps it for `safegraft report --evaluation`.", style="yellow")


def _refuse_overwriting(
    outputs: dict[str, Path | None], inputs: Iterable[Path | None], folders: Iterable[Path]
) -> None:
    """Raises InvalidParameter, before hours of work, where an output would end on what it was made from, in one of its
    folders, on the other output, or on what is no file."""
    kept = [folder.resolve() for folder in folders]
    taken = {path.resolve() for path in inputs if path is not None}
    for name, path in outputs.items():
        if path is None:
            continue
        if path.resolve() in taken:
            raise InvalidParameter(f"{path} is read or written otherwise.", param=name, hint="Name another file.")
        taken.add(path.resolve())
        if any(path.resolve().is_relative_to(folder) for folder in kept):
            raise InvalidParameter(
                f"{path} lies in a folder that is measured.",
                code="output_in_input",
                param=name,
                hint="Name a file elsewhere.",
            )
        if path.exists() and not path.is_file():
            raise InvalidParameter(f"{path} is no file.", code="file_error", param=name)
        if not path.parent.is_dir():
            raise InvalidParameter(f"{path.parent} is no folder.", code="file_error", param=name)


def _refuse_others(report: Report, before: Path, after: Path, on_aligned: bool) -> None:
    """Raises InvalidParameter where the report is of other adapters, or they are not served on that model."""
    if report.output is None:
        raise InvalidParameter(
            "The report is of a measurement, which made no adapter.", code="nothing_evaluated", param="--report"
        )
    for side, folder, known in (("BEFORE", before, report.input), ("AFTER", after, report.output)):
        if not _is(folder, known):
            raise InvalidParameter(
                f"{folder} is not the adapter that the report is of.",
                code="other_adapter_evaluated",
                param=side,
                hint="BEFORE is the adapter that was sent, AFTER the one that came out (of several the first).",
            )
    if report.lineage == "continued" and on_aligned:
        raise InvalidParameter(
            "The report says that the adapter was continued from the provider's own, which it contains.",
            code="wrong_model_evaluated",
            param="--aligned",
            hint="It is served on the model alone: leave --aligned out.",
        )
    if report.lineage != "continued" and not on_aligned:
        _tell_base()


def _tell_base() -> None:
    err.print(
        "Note: an adapter that was not continued from the provider's own is served on the aligned model. Without "
        "--aligned, --base has to be that model.",
        style="yellow",
    )


def _refuse_others_than_adapters(side: str, folder: Path) -> None:
    if is_adapter(folder):
        return
    below = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    raise InvalidParameter(
        f"{folder} holds no {CONFIG}: it is no adapter" + (f", but {', '.join(below)} in it are." if below else "."),
        code="missing_config",
        param=side,
        hint=f"Name {folder / below[0]}, for example." if below else "Name the folder that PEFT saved.",
    )


def _spread(items: list["Conversation"], limit: int | None) -> list["Conversation"]:
    """At most `limit` of them, evenly: files are often sorted by kind."""
    count = min(limit or len(items), len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _is(folder: Path, known: Digest) -> bool:
    # The configuration holds the scaling; reports from before they had its digest have none.
    same = known.config_sha256 in (None, sha256_file(folder / CONFIG))
    return same and sha256_file(folder / WEIGHTS) == known.sha256


def _table(found: Evaluation) -> Table:
    table = Table("", "", "share", "from", "to", "counted")
    for name, *sides in found.measures():
        for side, share in zip(("before", "after"), sides, strict=True):
            label = words.MEASURES[name][0] if side == "before" else ""
            low, _, high = words.interval(share).partition(" to ")
            table.add_row(label, side, words.share(share), low, high, f"{share.hits} of {share.total}")
    return table


def _lines(told: dict[str, list["Asked"]]) -> str:
    rows: Iterable[dict[str, str]] = (
        {"side": side, "measure": item.measure, "prompt": item.prompt, "answer": item.answer}
        for side, items in told.items()
        for item in items
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
