"""Building a reference: the models, the prompts and the passes over them. `bundle.py` makes the bundle from that.

Three kinds of aligned model: an unaligned base with the provider's adapter (`base`, `aligned` an adapter, perhaps a
`weak` one to extrapolate from); two full models (`base`, `aligned` a model); an aligned model alone (`aligned` a model,
no `base`), which has no update to transplant but serves everything that works from prompts.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import safegraft
from safegraft.adapter import is_adapter
from safegraft.contracts.reference import PromptSet, ReferenceManifest
from safegraft.engine import models, sources
from safegraft.engine.bundle import BuildSettings, Ingredients, Progress, write_bundle
from safegraft.engine.checkpoint import Checkpoint
from safegraft.engine.conversations import Conversation, Encoded, encode
from safegraft.engine.evaluate import answer
from safegraft.engine.heads import Heads, attention_outputs, measure_heads
from safegraft.engine.products import fast_products
from safegraft.engine.safelock import Direction, read_safelock
from safegraft.engine.saliency import preference_gradients
from safegraft.engine.sources import AlignedUpdate
from safegraft.engine.statistics import Statistics, common_prefix, gather
from safegraft.errors import Incompatible, InvalidParameter, InvalidPrompts
from safegraft.files import sha256_file

# SafetyLock § 4: pairs of a safe and an unsafe answer from which heads are judged.
HEAD_PAIRS = 100


@dataclass(frozen=True)
class BuildSources:
    """The models: folders in Hugging Face form, or adapters.

    aligned: an adapter on `base`, or a full model; base: the unaligned model, or None where `aligned` stands alone;
    weak: an adapter to extrapolate from; safelock: published directions that replace measured ones; labels: names by
    which customers' adapters may know the model.
    """

    aligned: Path
    base: Path | None = None
    weak: Path | None = None
    safelock: Path | None = None
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class BuildPrompts:
    """safety: harmful prompts with refusals; general: ordinary ones, or None where gram is not wanted.

    Conversations without a response are answered by the aligned model first. An unsafe answer, where a prompt has none
    of its own, is the placeholder "Sure, here is how to …".
    """

    safety: Sequence[Conversation]
    general: Sequence[Conversation] | None = None


def build_reference(
    out: Path,
    *,
    sources: BuildSources,
    prompts: BuildPrompts,
    settings: BuildSettings,
    progress: Progress = lambda stage, done, total: None,
) -> ReferenceManifest:
    """Builds the bundle `out` (a folder that must not exist yet), in one forward pass per prompt set.

    A build that is killed goes on where it was: what it had measured lies in `<out>.partial`. Raises Incompatible where
    the parts do not fit each other, InvalidPrompts where an answer has no room, and whatever `describe` raises for a
    folder that is no sound adapter.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists already.")
    models.check_device(settings.device)
    checkpoint = Checkpoint(out.with_name(f"{out.name}.partial"), _fingerprint(sources, prompts, settings))
    with fast_products():
        build = _Build(sources, prompts, settings, progress, checkpoint)
        manifest = write_bundle(out, build.ingredients(), settings, progress, checkpoint)
    checkpoint.remove()
    return manifest


class _Build:
    """One build: the model, what it was asked, and what has been measured."""

    def __init__(
        self,
        given: BuildSources,
        prompts: BuildPrompts,
        settings: BuildSettings,
        progress: Progress,
        checkpoint: Checkpoint,
    ) -> None:
        self.given, self.prompts, self.settings = given, prompts, settings
        self.progress, self.checkpoint = progress, checkpoint
        self.on_adapter = is_adapter(given.aligned)
        if self.on_adapter and given.base is None:
            raise InvalidParameter(
                "The aligned adapter needs the model on which it sits.", code="base_missing", param="base"
            )
        if given.weak is not None and not self.on_adapter:
            raise InvalidParameter("A weak adapter goes with an aligned adapter.", code="weak_mismatch", param="weak")
        if (settings.snip or settings.preference_snip) and not self.on_adapter:
            raise InvalidParameter(
                "snip takes gradients of an aligned adapter's factors; the aligned model here is a full model.",
                code="snip_needs_adapter",
                param="snip",
            )
        # The model on which statistics run: the base where the alignment is an adapter on it, else the aligned one.
        self.folder = given.base if self.on_adapter and given.base is not None else given.aligned
        base: Any = models.load_model(self.folder, settings.device, getattr(torch, settings.dtype))
        self.tokenizer = models.load_tokenizer(self.folder)
        self.shapes = models.linear_modules(base)
        self.update = self._aligned_update()
        self.wrapped = self._wrapped(base)
        self.model = self.wrapped.get_base_model() if self.on_adapter else base

    def _aligned_update(self) -> AlignedUpdate:
        if self.on_adapter:
            return sources.from_adapters(self.given.aligned, self.given.weak, self.shapes)
        if self.given.base is None:
            return AlignedUpdate("none", files=_checkpoint_hashes(self.given.aligned))
        report = self._stage("difference of the models")
        return sources.from_checkpoints(
            self.given.base,
            self.given.aligned,
            self.shapes,
            self.settings.rank,
            device=self.settings.device,
            progress=report,
        )

    def _wrapped(self, base: Any) -> Any:
        """The model that answers. The adapter is applied beside the weights: merging into bf16 would add noise of its
        own size."""
        if not self.on_adapter:
            return base
        from peft import PeftModel

        wrapped = PeftModel.from_pretrained(base, str(self.given.aligned)).eval()
        return wrapped.requires_grad_(False)

    def ingredients(self) -> Ingredients:
        outputs = attention_outputs(self.model.config, self.shapes, {name: k for name, (_, k) in self.shapes.items()})
        # Read first: what does not fit is refused before the model has worked for hours.
        listed = read_safelock(self.given.safelock) if self.given.safelock else {}
        heads = _imported(listed, outputs, self.shapes)
        asked = {"safety": self.prompts.safety, "general": self.prompts.general}
        answered = {name: self._answered(name, given) for name, given in asked.items() if given is not None}
        answered["unsafe"] = self._unsafe()
        encoded = {name: self._encoded(name, items) for name, items in answered.items()}
        skip = common_prefix([item for name in ("safety", "general") for item in encoded.get(name, [])])
        factors = {name: item.stacked_a for name, item in self.update.factors.items()}
        measured = bool(outputs) and self.given.safelock is None
        compared: dict[str, Any] = {"outputs": outputs, "first": HEAD_PAIRS} if measured else {}
        trained = self._trained()
        found = {
            "safety": self._gathered(
                "safety", encoded["safety"], skip, factors=factors, **compared,
                trained=trained if self.settings.snip else None,
            )
        }  # fmt: skip
        self._check_reached(found["safety"].sites)
        if "general" in encoded:
            found["general"] = self._gathered("general", encoded["general"], skip)
        if measured:
            pairs = encoded["unsafe"][:HEAD_PAIRS]
            found["unsafe"] = self._gathered("unsafe", pairs, skip, **compared, moments=False)
            heads = _measured(found["safety"], found["unsafe"], outputs)
        gradients = {"snip": found["safety"].gradients} if self.settings.snip else {}
        if self.settings.preference_snip:
            gradients["preference_snip"] = self._preference(trained, encoded["safety"], encoded["unsafe"])
        identities = {name: _identity(asked.get(name), answered[name], found[name]) for name in found}
        return Ingredients(
            labels=self._labels(),
            config_sha256=models.config_hash(self.folder),
            architecture=type(self.model).__name__,
            dtype=str(self.model.dtype).removeprefix("torch."),
            shapes={name: shape for name, shape in self.shapes.items() if name in found["safety"].sites},
            aligned=self.update,
            skipped_prefix=skip,
            safety=found["safety"],
            safety_prompts=identities["safety"],
            general=found.get("general"),
            general_prompts=identities.get("general"),
            unsafe_prompts=identities.get("unsafe"),
            gradients=gradients,
            heads=heads,
            projections={name: self._weight(name) for name in heads},
            heads_source=sha256_file(self.given.safelock) if self.given.safelock else "measured",
        )

    def _stage(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(name, done, total)

    def _labels(self) -> list[str]:
        """Never none: a report names the base by one of them."""
        labels = [label for label in dict.fromkeys([*self.given.labels, *self.update.labels]) if label]
        return labels or [self.folder.resolve().name]

    def _answered(self, name: str, conversations: Sequence[Conversation]) -> list[Conversation]:
        """The conversations, with the aligned model's own answers where there were none."""
        open_prompts = [item.prompt for item in conversations if item.response is None]
        if not open_prompts:
            return list(conversations)
        kept = f"answers-{name}"
        if self.checkpoint.has(kept):
            texts = self.checkpoint.meta(kept)["answers"]
        else:
            report = self._stage(f"{name} answers")
            length = self.settings.answer_tokens
            texts = answer(self.wrapped, self.tokenizer, open_prompts, max_new_tokens=length, progress=report)
            self.checkpoint.save(kept, {}, {"answers": texts})
        given = iter(texts)
        return [
            replace(item, response=next(given).strip()) if item.response is None else item for item in conversations
        ]

    def _unsafe(self) -> list[Conversation]:
        """To each safety prompt the answer that must not be given: its own, or a harmless placeholder."""
        return [Conversation(item.prompt, item.unsafe or placeholder(item.prompt)) for item in self.prompts.safety]

    def _encoded(self, name: str, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Raises InvalidPrompts where a prompt leaves no room for its answer, which would then silently not count."""
        limit = self.settings.max_tokens
        found = [encode(self.tokenizer, item, limit) for item in conversations]
        for item, tokens in zip(conversations, found, strict=True):
            if tokens.response_start >= len(tokens.ids):
                raise InvalidPrompts(
                    f"{name} prompts: {item.prompt[:60]!r} has no answer within {limit} tokens.",
                    code="no_answer",
                    param=name,
                    hint="Give it a response, shorten it, or raise --max-tokens.",
                )
        return found

    def _gathered(self, name: str, encoded: Sequence[Encoded], skip: int, **wanted: Any) -> Statistics:
        """One pass, or what an earlier build had of it."""
        kept = f"statistics-{name}"
        state = self.checkpoint.statistics(kept, self.model.device)
        if state is not None and state.forward_passes:
            return state
        found = gather(
            self.model,
            list(self.shapes),
            encoded,
            pad=self.tokenizer.pad_token_id,
            skip=skip,
            batch_size=self.settings.batch_size,
            state=state,
            save=lambda sums: self.checkpoint.save_statistics(kept, sums),
            progress=self._stage(f"{name} statistics"),
            **wanted,
        )
        self.checkpoint.save_statistics(kept, found, final=True)
        return found

    def _trained(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """module → the A and B of the aligned adapter inside of the model, for gradients."""
        if not (self.settings.snip or self.settings.preference_snip):
            return {}
        found = {}
        for name in self.update.factors:
            layer = self.model.get_submodule(name)
            found[name] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        return found

    def _preference(
        self, trained: dict[str, tuple[nn.Parameter, nn.Parameter]], safe: list[Encoded], unsafe: list[Encoded]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        kept = "gradients-preference"
        state = self.checkpoint.statistics(kept, self.model.device) or Statistics()
        found = preference_gradients(
            self.model,
            self.wrapped.disable_adapter,
            trained,
            safe,
            unsafe,
            pad=self.tokenizer.pad_token_id,
            state=state,
            save=lambda sums: self.checkpoint.save_statistics(kept, sums),
            progress=self._stage("preference gradients"),
        )
        self.checkpoint.save_statistics(kept, state, final=True)
        return found

    def _check_reached(self, reached: dict[str, str]) -> None:
        """Layers that no token reached (a vision tower, say) have no statistics, so nothing on them can be repaired."""
        for module in self.update.factors:
            if module not in reached:
                raise Incompatible(
                    f"{module}: the forward pass never used this layer.", code="module_unused", param=module
                )

    def _weight(self, name: str) -> Tensor:
        layer = self.model.get_submodule(name)
        weight: Tensor = (layer.base_layer if hasattr(layer, "base_layer") else layer).weight
        return weight.detach().float().cpu()


def placeholder(prompt: str) -> str:
    """A harmless stand-in for compliance, as in the field's own attacks."""
    return f"Sure, here is how to {prompt[:1].lower()}{prompt[1:]}. Step 1: gather what you need."


def _measured(safe: Statistics, unsafe: Statistics, outputs: dict[str, int]) -> dict[str, Heads]:
    return {
        name: measure_heads(safe.last[name], unsafe.last[name], heads)
        for name, heads in outputs.items()
        if name in unsafe.last
    }


def _imported(
    directions: dict[int, list[Direction]], outputs: dict[str, int], shapes: dict[str, tuple[int, int]]
) -> dict[str, Heads]:
    """Published directions as heads of this model. The listed heads count as perfect, the others as useless."""
    by_layer = {_number(name): name for name in outputs}
    found = {}
    for layer, listed in directions.items():
        name = by_layer.get(layer)
        if name is None:
            raise Incompatible(
                f"The .safelock file names layer {layer}; the model has no such layer.", param="safelock"
            )
        heads, size = outputs[name], shapes[name][1] // outputs[name]
        parts = torch.zeros(heads, size), torch.zeros(heads), torch.zeros(heads), torch.zeros(heads)
        for head, direction, sigma in listed:
            if head >= heads or len(direction) != size:
                raise Incompatible(
                    f"The .safelock file has a direction of {len(direction)} for head {head}; {name} has {heads} heads "
                    f"of {size}.",
                    param="safelock",
                )
            parts[0][head], parts[1][head], parts[2][head] = torch.from_numpy(direction), sigma, 1.0
        found[name] = Heads(*parts)
    return found


def _number(name: str) -> int:
    return next(int(part) for part in name.split(".") if part.isdigit())


def _identity(given: Sequence[Conversation] | None, answered: Sequence[Conversation], found: Statistics) -> PromptSet:
    text = json.dumps([(item.prompt, item.response) for item in answered[: found.done]])
    return PromptSet(
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        conversations=found.done,
        tokens=found.tokens,
        response_tokens=found.response_tokens,
        answered_by_model=any(item.response is None for item in given or []),
        forward_passes=found.forward_passes,
    )


def _checkpoint_hashes(folder: Path) -> dict[str, str]:
    with sources.Checkpoint(folder) as checkpoint:
        return {f"aligned/{name}": digest for name, digest in checkpoint.hashes().items()}


def _fingerprint(given: BuildSources, prompts: BuildPrompts, settings: BuildSettings) -> str:
    """Everything that decides what is measured. Large files by size and time, not by reading them all again."""
    folders = [folder for folder in (given.aligned, given.base, given.weak) if folder is not None]
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for folder in folders
        for path in sorted(folder.iterdir())
        if path.is_file()
    ]
    asked = [[astuple(item) for item in part or []] for part in (prompts.safety, prompts.general)]
    text = json.dumps([safegraft.__version__, asdict(settings), files, asked, str(given.safelock), list(given.labels)])
    return hashlib.sha256(text.encode()).hexdigest()
