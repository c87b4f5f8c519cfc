"""Building a reference: the models, the prompts and the passes over them. `reference.py` makes the bundle from that."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from safegraft.adapter import CONFIG, WEIGHTS, AdapterDescription, describe
from safegraft.contracts.reference import PromptSet, ReferenceManifest
from safegraft.engine import models
from safegraft.engine.conversations import Conversation, Encoded, encode
from safegraft.engine.evaluate import answer
from safegraft.engine.reference import BuildSettings, Ingredients, Progress, write_bundle
from safegraft.engine.statistics import Statistics, common_prefix, gather
from safegraft.engine.tensors import TensorReader
from safegraft.errors import Incompatible, InvalidPrompts
from safegraft.files import sha256_file


def build_reference(
    out: Path,
    *,
    base: Path,
    labels: Sequence[str],
    aligned: Path,
    safety: Sequence[Conversation],
    general: Sequence[Conversation] | None,
    settings: BuildSettings,
    progress: Progress = lambda stage, done, total: None,
) -> ReferenceManifest:
    """Builds the bundle `out` (a folder that must not exist yet), in one forward pass per prompt set.

    base: the unaligned model's folder; labels: names by which customers' adapters may know it; aligned: the provider's
    LoRA on it. Conversations without a response are answered by the aligned model first. Raises Incompatible where the
    aligned adapter does not fit the base model, InvalidPrompts where an answer has no room, and whatever `describe`
    raises for a folder that is no sound adapter.
    """
    from peft import PeftModel

    models.check_device(settings.device)
    adapter = describe(aligned)
    model = models.load_model(base, settings.device)
    tokenizer = models.load_tokenizer(base)
    shapes = models.linear_modules(model)
    _check_shapes(adapter, shapes)
    # Applied beside the weights, not merged: merging into bf16 would add noise of the adapter's own size.
    wrapped = PeftModel.from_pretrained(model, str(aligned)).eval()
    inner = wrapped.get_base_model()
    factors = _load_factors(aligned, adapter)

    encoded: dict[str, list[Encoded]] = {}
    prompts: dict[str, PromptSet] = {}
    for name, given in (("safety", safety), ("general", general)):
        if given is not None:
            answered = _answered(name, given, wrapped, tokenizer, settings, progress)
            encoded[name] = [encode(tokenizer, item, settings.max_tokens) for item in answered]
            _check_answers(name, answered, encoded[name], settings)
            prompts[name] = _identity(given, answered)
    skip = common_prefix([item for items in encoded.values() for item in items])

    gathered: dict[str, Statistics] = {}
    for name, items in encoded.items():
        gathered[name] = gather(
            inner,
            list(shapes),
            items,
            pad=tokenizer.pad_token_id,
            skip=skip,
            factors={module: a for module, (_, a) in factors.items()} if name == "safety" else None,
            batch_size=settings.batch_size,
            progress=_stage(progress, f"{name} statistics"),
        )
        counts = {"tokens": gathered[name].tokens, "response_tokens": gathered[name].response_tokens}
        prompts[name] = prompts[name].model_copy(update=counts)
    # Layers that no token reached (a vision tower, say) have no statistics, so nothing on them can be repaired.
    reached = gathered["safety"].sites
    for module in factors:
        if module not in reached:
            raise Incompatible(f"{module}: the forward pass never used this layer.", code="module_unused", param=module)
    shapes = {name: shape for name, shape in shapes.items() if name in reached}
    ingredients = Ingredients(
        labels=[label for label in dict.fromkeys([*labels, adapter.config.base_model_name_or_path or ""]) if label],
        config_sha256=models.config_hash(base),
        architecture=type(inner).__name__,
        dtype=str(inner.dtype).removeprefix("torch."),
        shapes=shapes,
        aligned_sha256=sha256_file(aligned / WEIGHTS),
        aligned_config_sha256=sha256_file(aligned / CONFIG),
        skipped_prefix=skip,
        factors=factors,
        safety=gathered["safety"],
        safety_prompts=prompts["safety"],
        general=gathered.get("general"),
        general_prompts=prompts.get("general"),
    )
    return write_bundle(out, ingredients, settings, progress)


def _stage(progress: Progress, name: str) -> Any:
    return lambda done, total: progress(name, done, total)


def _check_shapes(adapter: AdapterDescription, shapes: dict[str, tuple[int, int]]) -> None:
    for module in adapter.modules:
        if shapes.get(module.name) != (module.outputs, module.inputs):
            raise Incompatible(
                f"{module.name}: the aligned adapter is for {module.outputs}x{module.inputs}, the base model has "
                f"{shapes.get(module.name, 'no such layer')}.",
                code="base_mismatch",
                param=module.name,
            )


def _load_factors(folder: Path, adapter: AdapterDescription) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → (B with the scaling folded in, A), float32."""
    found = {}
    with TensorReader(folder / WEIGHTS, adapter.header) as reader:
        for module in adapter.modules:
            b = reader.tensor(module.b.name).float() * module.scaling
            found[module.name] = (b, reader.tensor(module.a.name).float())
    return found


def _answered(
    name: str,
    conversations: Sequence[Conversation],
    model: Any,
    tokenizer: Any,
    settings: BuildSettings,
    progress: Progress,
) -> list[Conversation]:
    """The conversations, with the model's own answers where there were none."""
    open_prompts = [item.prompt for item in conversations if item.response is None]
    if not open_prompts:
        return list(conversations)
    report = _stage(progress, f"{name} answers")
    texts = iter(answer(model, tokenizer, open_prompts, max_new_tokens=settings.answer_tokens, progress=report))
    return [Conversation(item.prompt, next(texts).strip()) if item.response is None else item for item in conversations]


def _check_answers(
    name: str, conversations: Sequence[Conversation], encoded: Sequence[Encoded], settings: BuildSettings
) -> None:
    """Raises InvalidPrompts where a prompt leaves no room for its answer, which would then silently not count."""
    for item, tokens in zip(conversations, encoded, strict=True):
        if tokens.response_start >= len(tokens.ids):
            raise InvalidPrompts(
                f"{name} prompts: {item.prompt[:60]!r} has no answer within {settings.max_tokens} tokens.",
                code="no_answer",
                param=name,
                hint="Give it a response, shorten it, or raise --max-tokens.",
            )


def _identity(given: Sequence[Conversation], answered: Sequence[Conversation]) -> PromptSet:
    text = json.dumps([(item.prompt, item.response) for item in answered])
    return PromptSet(
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        conversations=len(given),
        tokens=0,
        response_tokens=0,
        answered_by_model=any(item.response is None for item in given),
    )
