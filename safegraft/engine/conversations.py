"""Prompt files, and prompts with answers as tokens.

Knows the two file forms (CSV, JSONL) and the tokenizer's own chat template. Does not know what the tokens are
used for: statistics weight them, training masks them, evaluation continues them.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safegraft.errors import InvalidPrompts


@dataclass(frozen=True)
class Conversation:
    """One prompt with its answer; `response` is None where a model still has to give one.

    unsafe: the answer that must not be given, where a method compares the two and a placeholder will not do.
    """

    prompt: str
    response: str | None = None
    unsafe: str | None = None


def read_conversations(path: Path) -> list[Conversation]:
    """Reads CSV with a `prompt` (and optional `response` and `unsafe`) column, or JSONL with the same keys.

    Raises InvalidPrompts with the file and line of the first fault.
    """
    if not path.is_file():
        missing = "is no file" if os.path.lexists(path) else "no such file"
        raise InvalidPrompts(f"{path}: {missing}.", code="prompts_missing", param=str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidPrompts(f"{path}: not UTF-8 text ({error}).", param=str(path)) from error
    rows: list[tuple[int, Any]]
    if path.suffix == ".jsonl":
        rows = []
        # Not splitlines: JSON may hold other line separators inside of strings.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                rows.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise InvalidPrompts(f"{path}:{number}: not JSON ({error.msg}).", param=str(path)) from error
            except (RecursionError, ValueError) as error:
                # Of thousands of brackets, or digits.
                raise InvalidPrompts(f"{path}:{number}: not JSON that can be read.", param=str(path)) from error
    else:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        if "prompt" not in (reader.fieldnames or []):
            raise InvalidPrompts(
                f"{path}: no `prompt` column; found {reader.fieldnames}.",
                param=str(path),
                hint="Give a CSV with a `prompt` column, or JSONL with `prompt` and `response`.",
            )
        try:
            rows = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise InvalidPrompts(f"{path}:{reader.line_num}: {error}.", param=str(path)) from error
    found = [_conversation(path, number, row) for number, row in rows]
    if not found:
        raise InvalidPrompts(f"{path}: holds no prompt.", param=str(path))
    return found


def _conversation(path: Path, number: int, row: Any) -> Conversation:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise InvalidPrompts(f"{path}:{number}: `prompt` is missing or empty.", param=str(path))
    for key in ("prompt", "response", "unsafe"):
        value = row.get(key)
        if not isinstance(value, str | None):
            raise InvalidPrompts(f"{path}:{number}: `{key}` is not text.", param=str(path))
        if value is not None and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise InvalidPrompts(f"{path}:{number}: `{key}` holds half of a character.", param=str(path))
    return Conversation(prompt.strip(), row.get("response") or None, row.get("unsafe") or None)


@dataclass(frozen=True)
class Encoded:
    """Token ids of one conversation; ids[response_start:] are the answer's (with its end token)."""

    ids: list[int]
    response_start: int


def encode(tokenizer: Any, conversation: Conversation, max_tokens: int = 1024) -> Encoded:
    """Renders with the tokenizer's chat template, or as plain text where it has none."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": conversation.prompt}], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        prompt = tokenizer(conversation.prompt + "\n")["input_ids"]
    answer: list[int] = []
    if conversation.response is not None:
        answer = tokenizer(conversation.response, add_special_tokens=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            answer = [*answer, tokenizer.eos_token_id]
    return Encoded([*prompt, *answer][:max_tokens], min(len(prompt), max_tokens))


@dataclass(frozen=True)
class Batch:
    """ids, attention, response: all (batch, time); response marks the answers' tokens.

    rows: the positions of these conversations in the list that was batched.
    """

    ids: Tensor
    attention: Tensor
    response: Tensor
    rows: list[int]


def batches(encoded: Sequence[Encoded], size: int, pad: int, *, left: bool = False) -> Iterator[Batch]:
    """Yields batches of similar length (longest first, so that a shortage of memory shows at once).

    left: pad on the left, as generation needs.
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        width = len(encoded[rows[0]].ids)
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        attention = torch.zeros((len(rows), width), dtype=torch.long)
        response = torch.zeros((len(rows), width), dtype=torch.bool)
        for j, i in enumerate(rows):
            n, shift = len(encoded[i].ids), width - len(encoded[i].ids) if left else 0
            ids[j, shift : shift + n] = torch.tensor(encoded[i].ids)
            attention[j, shift : shift + n] = 1
            response[j, shift + encoded[i].response_start : shift + n] = True
        yield Batch(ids, attention, response, rows)
