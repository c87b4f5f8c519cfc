"""What a repair does to a model's next tokens: base, with the customer's adapter, and with the patched one.

Needs the model, so it is no part of a job: whoever has it asks for it. The distributions compared are those of the
first token of an answer, after the chat template's own beginning of it.
"""

import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safegraft.adapter import WEIGHTS, describe, is_adapter
from safegraft.contracts.reference import ReferenceManifest
from safegraft.contracts.report import Distance, Probe
from safegraft.engine import models
from safegraft.engine.behaviour import lay_out, refuse_unloadable
from safegraft.engine.build import BuildSources
from safegraft.engine.conversations import Conversation, batches, encode
from safegraft.errors import Incompatible, InvalidParameter
from safegraft.files import sha256_file

BATCH = 16


def check_sources(sources: BuildSources, manifest: ReferenceManifest) -> None:
    """Raises Incompatible unless these are the models that the reference was built from: another would be compared
    without a word."""
    beside = is_adapter(sources.aligned)
    if beside != (manifest.origin.source in ("adapter", "two_adapters")):
        raise Incompatible(
            f"The reference's alignment is {'a full model' if beside else 'an adapter'}.",
            code="probe_model_mismatch",
            param="aligned",
            hint="Give --base and --aligned as they were given to `reference build`.",
        )
    model = sources.base if beside and sources.base is not None else sources.aligned
    same = models.config_hash(model) == manifest.base_model.config_sha256
    if beside:
        same = same and sha256_file(sources.aligned / WEIGHTS) == manifest.origin.files.get(WEIGHTS)
    if not same:
        raise Incompatible(
            "The model or the aligned adapter is not the one that the reference was built from.",
            code="probe_model_mismatch",
            param="base",
        )


def compare(
    sources: BuildSources, prompts: Sequence[str], before: Path, after: Path, on_aligned: bool, device: str = "cpu"
) -> Probe:
    """before, after: adapter folders; on_aligned: they sit on the aligned model, as fresh ones do.

    Raises InvalidParameter (`base_missing`), UnsupportedAdapter (`peft_cannot_load`).
    """
    from peft import PeftModel

    beside = sources.aligned if is_adapter(sources.aligned) else None
    if beside is not None and sources.base is None:
        raise InvalidParameter(
            "The aligned adapter needs the model on which it sits.", code="base_missing", param="base"
        )
    if beside is None and not on_aligned and sources.base is None:
        raise InvalidParameter(
            "A continued adapter sits on the unaligned model, which was not given.", code="base_missing", param="base"
        )
    folder = sources.base if sources.base is not None and (beside is not None or not on_aligned) else sources.aligned
    tokenizer = models.load_tokenizer(folder)
    # Active beside the others, not merged: merging into bf16 would add noise of the adapters' own size.
    under = ["aligned"] if beside is not None and on_aligned else []
    adapters = {"before": before, "after": after} | ({"aligned": beside} if beside is not None and under else {})
    model: Any = models.load_model(folder, device)
    with tempfile.TemporaryDirectory() as work:
        for name, given in adapters.items():
            description = describe(given, own=True)
            refuse_unloadable(description, name)
            lay_out(given, description, Path(work) / name)
            if name == "before":
                model = PeftModel.from_pretrained(model, str(Path(work) / name), adapter_name=name)
            else:
                model.load_adapter(str(Path(work) / name), name)
    model.eval()
    found = {}
    for name in ("before", "after"):
        model.base_model.set_adapter([*under, name])
        found[name] = _next_tokens(model, tokenizer, prompts)
    if under:
        model.base_model.set_adapter(under)
        found["base"] = _next_tokens(model, tokenizer, prompts)
    else:
        with model.disable_adapter():
            found["base"] = _next_tokens(model, tokenizer, prompts)
    return Probe(
        prompts=len(prompts),
        prompts_sha256=hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        before_from_base=_distance(found["before"], found["base"]),
        after_from_base=_distance(found["after"], found["base"]),
        after_from_before=_distance(found["after"], found["before"]),
    )


@torch.inference_mode()
def _next_tokens(model: Any, tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Log-probabilities (prompt, vocabulary), float32."""
    encoded = [encode(tokenizer, Conversation(prompt)) for prompt in prompts]
    rows: list[Tensor] = [torch.empty(0)] * len(prompts)
    for batch in batches(encoded, BATCH, tokenizer.pad_token_id, left=True):
        logits = model(
            input_ids=batch.ids.to(model.device), attention_mask=batch.attention.to(model.device), use_cache=False
        ).logits[:, -1]
        for row, values in zip(batch.rows, logits.float().log_softmax(dim=-1).cpu(), strict=True):
            rows[row] = values
    return torch.stack(rows)


def _distance(of: Tensor, other: Tensor) -> Distance:
    """KL(of ‖ other), and agreement of the likeliest tokens."""
    divergence = (of.exp() * (of - other)).sum(dim=1).mean()
    return Distance(
        divergence=max(0.0, float(divergence)),
        same_token=float((of.argmax(dim=1) == other.argmax(dim=1)).float().mean()),
    )
