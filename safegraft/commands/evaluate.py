"""`safegraft evaluate`: a model asked before and after a repair, and what it did as a part of the report."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from safegraft.adapter import CONFIG, WEIGHTS, is_adapter
from safegraft.commands.report import read_report
from safegraft.commands.terminal import DeviceName, Json, err, out, print_json, progress_bars, tell
from safegraft.contracts.report import Evaluation, Report, Share
from safegraft.errors import InvalidParameter
from safegraft.files import sha256_file, write_atomic
from safegraft.report import words

if TYPE_CHECKING:
    from safegraft.engine.behaviour import Asked

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
        int | None, typer.Option(min=1, envvar="SAFEGRAFT_LIMIT", help="Ask no more than the first so many of each.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=4096, envvar="SAFEGRAFT_MAX_NEW_TOKENS", help="Of an answer to a prompt.")
    ] = 24,
    report: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            envvar="SAFEGRAFT_REPORT",
            help="The repair's report.json: refuses other adapters than its own, and a model that does not serve them.",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--out", envvar="SAFEGRAFT_OUT", help="Writes the evaluation as JSON; replaces what is there."),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(envvar="SAFEGRAFT_ANSWERS", help="Writes every answer as JSONL; replaces what is there."),
    ] = None,
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
    if aligned is not None and not is_adapter(aligned):
        raise InvalidParameter(
            f"{aligned} holds no {CONFIG}: it is no adapter.",
            code="missing_config",
            param="--aligned",
            hint="A full aligned model is given as --base, and --aligned left out.",
        )
    if report is not None:
        _refuse_others(read_report(report, "--report"), before, after, aligned is not None)
    from safegraft.engine.behaviour import Questions, Subject
    from safegraft.engine.behaviour import evaluate as run
    from safegraft.engine.conversations import read_conversations
    from safegraft.engine.models import check_device, quiet_libraries, resolve_base

    quiet_libraries()
    check_device(device)
    asked = {
        name: read_conversations(path)[:limit] if path is not None else []
        for name, path in (("harmful", harmful), ("benign", benign), ("task", task))
    }
    questions = Questions(
        harmful=[item.prompt for item in asked["harmful"]],
        benign=[item.prompt for item in asked["benign"]],
        task=asked["task"],
    )
    with progress_bars(as_json, log=True) as progress:
        subject = Subject(resolve_base(base), aligned, device=device)
        found, told = run(subject, before, after, questions, new_tokens=max_new_tokens, progress=progress)
    if answers is not None:
        write_atomic(answers, _lines(told).encode())
    if to is not None:
        write_atomic(to, (found.model_dump_json(indent=1) + "\n").encode())
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    out.print(_table(found))
    tell(words.evaluation(found), soft=not out.is_terminal)
    tell(f"Judged by: {found.judge}. In brackets: Wilson's 95 % interval.", soft=not out.is_terminal)
    for label, path in (("Evaluation", to), ("Answers", answers)):
        if path is not None:
            tell(f"{label}: {path}")
    if to is None:
        err.print("Nothing was written; --out keeps it for `safegraft report --evaluation`.", style="yellow")


def _refuse_others(report: Report, before: Path, after: Path, on_aligned: bool) -> None:
    """Raises InvalidParameter where the report is of other adapters, or they are not served on that model."""
    for side, folder, known in (("BEFORE", before, report.input), ("AFTER", after, report.output)):
        if known is None or sha256_file(folder / WEIGHTS) != known.sha256:
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


def _table(found: Evaluation) -> Table:
    table = Table("", "before", "after")
    for name, before, after in found.measures():
        table.add_row(words.MEASURES[name][0], _cell(before), _cell(after))
    return table


def _cell(share: Share) -> str:
    return f"{words.share(share)}  [{words.interval(share)}]  {share.hits} of {share.total}"


def _lines(told: dict[str, list["Asked"]]) -> str:
    rows: Iterable[dict[str, str]] = (
        {"side": side, "measure": item.measure, "prompt": item.prompt, "answer": item.answer}
        for side, items in told.items()
        for item in items
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
