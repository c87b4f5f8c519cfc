"""Tiny models of the architectures that platforms serve, their adapters and references, and what realigning gives.

Everything is made when it is first asked for and kept for the process, so that the table of methods and the tests of
its cells share one set of runs.
"""

import functools
import shutil
import string
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2Tokenizer,
)

from safegraft.contracts.methods import (
    AntidoteParameters,
    GramParameters,
    Method,
    NlsrParameters,
    NoneParameters,
    SafeLoraParameters,
    SafetyLockParameters,
)
from safegraft.contracts.report import Report
from safegraft.engine import models
from safegraft.engine.build import BuildPrompts, BuildSources, build_reference
from safegraft.engine.bundle import BuildSettings
from safegraft.engine.pipeline import realign
from safegraft.engine.reference import LoadedReference
from safegraft.errors import Incompatible
from tests import tiny

HEADS = 4
SETTINGS: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": tiny.LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": None,
}  # fmt: skip
RANK, OTHER_RANK = 4, 3
Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Family:
    """A real architecture at toy size. sites: the linear layers of one block, those in one tuple read the same tensor;
    outputs: its attention's output projection; size: of one head."""

    name: str
    config: Any
    settings: dict[str, Any]
    sites: tuple[tuple[str, ...], ...]
    block: str = "model.layers"
    outputs: str = "self_attn.o_proj"
    size: int = 8

    @property
    def targets(self) -> list[str]:
        return [name.rpartition(".")[2] for site in self.sites for name in site]

    @property
    def modules(self) -> dict[str, str]:
        """Linear layer → the first of those that read the same tensor."""
        return {
            f"{self.block}.{layer}.{name}": f"{self.block}.{layer}.{site[0]}"
            for layer in range(tiny.LAYERS)
            for site in self.sites
            for name in site
        }


SPLIT = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
FUSED = (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",))
# Attention and MLP side by side, both behind the one norm.
PARALLEL = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
    ("self_attn.dense",),
    ("mlp.fc2",),
)
# Side by side as well, but each behind a norm of its own.
NEOX = (("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",))
GROUPED = {"num_key_value_heads": 2}
# Heads that together are wider than the hidden state, and embeddings that are also the output's.
WIDE = GROUPED | {"head_dim": 16, "tie_word_embeddings": True}
FAMILIES = {
    family.name: family
    for family in (
        Family("Llama", LlamaConfig, GROUPED, SPLIT),
        Family("Mistral", MistralConfig, GROUPED, SPLIT),
        Family("Qwen2", Qwen2Config, GROUPED, SPLIT),
        Family("Gemma", GemmaConfig, WIDE, SPLIT, size=16),
        Family("Gemma2", Gemma2Config, WIDE, SPLIT, size=16),
        Family("Phi", PhiConfig, {}, PARALLEL, outputs="self_attn.dense"),
        Family("Phi-3", Phi3Config, GROUPED, FUSED),
        Family("GPT-NeoX", GPTNeoXConfig, {}, NEOX, block="gpt_neox.layers", outputs="attention.dense"),
    )
}
# What a row of the table runs. The threshold of 1 makes SafeLoRA project every module.
ROWS: dict[tuple[str, str], Method] = {
    ("nlsr", "factor"): NlsrParameters(form="factor"),
    ("nlsr", "paper"): NlsrParameters(form="paper"),
    ("nlsr", "neuron"): NlsrParameters(form="neuron"),
    ("gram", ""): GramParameters(),
    ("safelora", ""): SafeLoraParameters(threshold=1.0),
    ("antidote", ""): AntidoteParameters(),
    ("safetylock", "rank_one"): SafetyLockParameters(output="rank_one"),
    ("safetylock", "lora_bias"): SafetyLockParameters(output="lora_bias"),
    ("safetylock", "side_car"): SafetyLockParameters(output="side_car"),
    ("none", ""): NoneParameters(),
}
# Column → (which adapter, whether the reference has an aligned update).
COLUMNS = {
    "continued": ("continued", True),
    "fresh": ("fresh", True),
    "fresh, another rank": ("fresh, another rank", True),
    "foreign": ("foreign", True),
    "aligned model alone: fresh": ("fresh", False),
    "aligned model alone: foreign": ("foreign", False),
}


@dataclass(frozen=True)
class Outcome:
    """What realigning gave: a folder and its report, or the code and the hint of the refusal."""

    source: Path
    out: Path
    report: Report | None
    refused: str = ""
    hint: str = ""

    @property
    def text(self) -> str:
        return "works" if self.report else f"refused: `{self.refused}`"


class Stand:
    """One family: its model, the aligned adapter, customers' adapters, both references, and the runs."""

    def __init__(
        self,
        folder: Path,
        family: Family,
        dtype: Dtype = "bfloat16",
        *,
        gradients: bool = False,
        aligned_on: list[str] | None = None,
    ) -> None:
        self.family, self.folder, self._aligned_on = family, folder, aligned_on
        self.settings = BuildSettings(sparsity=0.5, dtype=dtype, snip=gradients, preference_snip=gradients)
        self.read: dict[str, Counter[tuple[int, ...]]] = {}
        self._outcomes: dict[tuple[str, Method], Outcome] = {}
        self._seen: dict[tuple[Path, bool], tuple[dict[str, Tensor], Tensor]] = {}

    @cached_property
    def base(self) -> Path:
        folder = self.folder / "model"
        tiny.save_model(folder)  # for its tokenizer; the model gives way
        if self.family.config is Qwen2Config:
            _save_letters(folder)
        torch.manual_seed(0)
        config = self.family.config(**SETTINGS | self.family.settings)
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.to(getattr(torch, self.settings.dtype)).save_pretrained(folder)
        return folder

    @cached_property
    def aligned(self) -> Path:
        return self.adapter("aligned", seed=1, targets=self._aligned_on)

    def adapter(
        self,
        name: str,
        *,
        seed: int,
        rank: int = RANK,
        dtype: torch.dtype = torch.bfloat16,
        targets: list[str] | None = None,
        **config: Any,
    ) -> Path:
        """Writes an adapter of random factors, by PEFT; on all linear layers unless told otherwise."""
        folder = self.folder / "adapters" / name
        model: Any = models.load_model(self.base, dtype=torch.float32)
        torch.manual_seed(seed)
        lora = LoraConfig(
            r=rank, lora_alpha=8, target_modules=targets or self.family.targets, task_type="CAUSAL_LM", **config
        )
        wrapped = get_peft_model(model, lora)
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        wrapped.save_pretrained(str(folder))
        tiny.change_tensors(folder, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
        (folder / "README.md").unlink(missing_ok=True)
        return folder

    def continued(self, name: str, dtype: torch.dtype) -> Path:
        folder = tiny.continue_adapter(self.aligned, self.folder / "adapters" / name)
        tiny.change_tensors(folder, lambda tensors: {key: tensor.to(dtype) for key, tensor in tensors.items()})
        return folder

    @cached_property
    def customers(self) -> dict[str, Path]:
        foreign = self.adapter("foreign", seed=4)
        tiny.change_config(foreign, base_model_name_or_path="somebody/elses-model")
        return {
            "continued": self.continued("continued", torch.bfloat16),
            "fresh": self.adapter("fresh", seed=3),
            "fresh, another rank": self.adapter("fresh-rank", seed=5, rank=OTHER_RANK),
            "foreign": foreign,
        }

    @cached_property
    def reference(self) -> LoadedReference:
        """Built from the unaligned base and the aligned adapter on it."""
        return self._built("reference", BuildSources(base=self.base, aligned=self.aligned))

    @cached_property
    def alone(self) -> LoadedReference:
        """Built from an aligned model without an adapter: there is no update to transplant."""
        return self._built("alone", BuildSources(aligned=self.base, labels=[str(self.base)]))

    def _built(self, name: str, sources: BuildSources) -> LoadedReference:
        out = self.folder / name
        settings = self.settings
        if sources.base is None:
            settings = replace(settings, snip=False, preference_snip=False)
        prompts = BuildPrompts(safety=tiny.HARMFUL, general=tiny.GENERAL)
        with _watched(self.read.setdefault(name, Counter())):
            build_reference(out, sources=sources, prompts=prompts, settings=settings)
        return LoadedReference(out)

    @cached_property
    def precise(self) -> dict[str, Path]:
        """Customers' adapters in float32. The continued one has another scaling than the aligned adapter, and a B that
        makes up for it; the fresh ones are rsLoRA. `patterns` has ranks and scalings of its own in some modules, and
        elsewhere a rank that together with the aligned one's is more than a narrow layer can have."""
        first, last = self.family.targets[0], self.family.targets[-1]
        continued = self.continued("precise-continued", torch.float32)
        tiny.change_config(continued, lora_alpha=16)
        tiny.change_tensors(continued, lambda tensors: {k: t / 2 if "lora_B" in k else t for k, t in tensors.items()})
        return {
            "continued": continued,
            "fresh": self.adapter("precise-fresh", seed=3, dtype=torch.float32, use_rslora=True),
            "patterns": self.adapter(
                "precise-patterns", seed=6, rank=14, dtype=torch.float32, use_rslora=True,
                rank_pattern={first: 2, last: 5}, alpha_pattern={last: 3},
            ),
        }  # fmt: skip

    @cached_property
    def served(self) -> "Served":
        return Served(self)

    def seen(self, folder: Path, *, on_aligned: bool) -> tuple[dict[str, Tensor], Tensor]:
        """What an adapter is in PEFT: ΔW by module, and the logits."""
        if (folder, on_aligned) not in self._seen:
            with self.served.loaded(folder, on_aligned=on_aligned) as served:
                self._seen[folder, on_aligned] = served.updates(), served.logits()
        return self._seen[folder, on_aligned]

    def outcome(self, column: str, parameters: Method) -> Outcome:
        """What becomes of a cell of the table."""
        if (column, parameters) not in self._outcomes:
            customer, on_update = COLUMNS[column]
            out = self.folder / "out" / str(len(self._outcomes))
            reference = self.reference if on_update else self.alone
            self._outcomes[column, parameters] = self.attempt(self.customers[customer], reference, parameters, out)
        return self._outcomes[column, parameters]

    def attempt(self, source: Path, reference: LoadedReference, parameters: Method, out: Path) -> Outcome:
        """Realigns, or notes why not. Other errors than refusals pass."""
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            return Outcome(source, out, realign(source, reference, parameters, out))
        except Incompatible as error:
            return Outcome(source, out, None, error.code, error.hint)


class Served:
    """The base model in float32 with the aligned adapter in PEFT; takes other adapters in and out."""

    def __init__(self, stand: Stand) -> None:
        self._model: Any = PeftModel.from_pretrained(
            models.load_model(stand.base, dtype=torch.float32), str(stand.aligned), adapter_name="aligned"
        ).eval()
        tokenizer = models.load_tokenizer(stand.base)
        self._ids = torch.tensor([tokenizer(tiny.HARMFUL[0].prompt)["input_ids"]])

    @contextmanager
    def loaded(self, folder: Path, *, on_aligned: bool) -> Iterator["Served"]:
        """With an adapter active, beside the aligned one or on the bare base. Raises where a key finds no place."""
        with warnings.catch_warnings():
            # That the base has no bias only matters to those who merge.
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed", category=UserWarning)
            found = self._model.load_adapter(str(folder), adapter_name="customer")
        try:
            if found.missing_keys or found.unexpected_keys:
                raise AssertionError(f"missing {found.missing_keys}, unexpected {found.unexpected_keys}")
            self._model.base_model.set_adapter(["aligned", "customer"] if on_aligned else ["customer"])
            yield self
        finally:
            self._model.base_model.set_adapter(["aligned"])
            self._model.delete_adapter("customer")

    def layer(self, module: str) -> Any:
        return self._model.get_base_model().get_submodule(module)

    def updates(self, adapter: str = "customer") -> dict[str, Tensor]:
        """ΔW of every module that an adapter reaches, as PEFT would merge it."""
        with torch.inference_mode():
            return {
                name: layer.get_delta_weight(adapter)
                for name, layer in self._model.get_base_model().named_modules()
                if adapter in getattr(layer, "lora_A", {})
            }

    @cached_property
    def aligned(self) -> dict[str, Tensor]:
        return self.updates("aligned")

    def biases(self) -> dict[str, Tensor]:
        """What the customer's adapter adds to layers' outputs besides ΔW·x; empty where it has no biases."""
        layers = {name: self.layer(name) for name in self.updates()}
        return {
            name: layer.lora_B["customer"].bias.detach() * layer.scaling["customer"]
            for name, layer in layers.items()
            if layer.lora_bias["customer"]
        }

    def logits(self) -> Tensor:
        with torch.inference_mode():
            found: Tensor = self._model(input_ids=self._ids).logits
        return found


def _save_letters(folder: Path) -> None:
    """A tokenizer of single letters: transformers loads every Qwen2 folder with Qwen2's own class, which knows bytes
    and merges, but no words."""
    letters = ["<pad>", "</s>", "<unk>", *string.ascii_lowercase, "Ġ", "Ċ"]
    tokenizer: Any = Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)


@contextmanager
def _watched(read: Counter[tuple[int, ...]]) -> Iterator[None]:
    """Counts every sequence of tokens that a model which is loaded meanwhile reads, without its padding."""
    load = models.load_model

    def count(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        ids = args[0] if args else given["input_ids"]
        for row, attention in zip(ids, given["attention_mask"], strict=True):
            read[tuple(row[attention.bool()].tolist())] += 1

    def loaded(*args: Any, **options: Any) -> Any:
        model = load(*args, **options)
        model.base_model.register_forward_pre_hook(count, with_kwargs=True)
        return model

    with mock.patch.object(models, "load_model", loaded):
        yield


class Workshop:
    """All families, in one folder."""

    def __init__(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.stands = {name: Stand(folder / name, family) for name, family in FAMILIES.items()}


@functools.cache
def shared(folder: Path) -> Workshop:
    """The workshop in `folder`, the same one for every test file of a process."""
    return Workshop(folder)
