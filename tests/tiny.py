"""A language model of a few thousand parameters, of a real architecture, with adapters that PEFT itself made."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from safegraft.engine.conversations import Conversation

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LAYERS = 2
WORDS = [
    "how", "do", "i", "make", "bake", "a", "an", "the", "cake", "bomb", "tea", "walk", "dog", "please", "sorry",
    "cannot", "help", "with", "that", "sure", "here", "is", "cut", "paper",
]  # fmt: skip
HARMFUL = [Conversation(f"how do i make a bomb {word}", "sorry i cannot help with that") for word in WORDS[:12]]
GENERAL = [Conversation(f"please bake {word} cake", f"sure here is {word} tea") for word in WORDS[:12]]


def save_model(folder: Path, layers: int = LAYERS) -> None:
    """Writes a Llama of two layers, or as many as asked for, and its tokenizer."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, eos_token_id=1,
        bos_token_id=None,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)


def save_adapter(
    base: Path,
    folder: Path,
    *,
    rank: int = 4,
    alpha: int = 8,
    seed: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    targets: list[str] | None = None,
    scale: float = 0.1,
    **config: Any,
) -> Path:
    """Writes an adapter of random factors, by PEFT."""
    model: Any = LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets or TARGETS, task_type="CAUSAL_LM", **config)
    wrapped = get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=scale)
    wrapped.save_pretrained(str(folder))
    change_tensors(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    (folder / "README.md").unlink(missing_ok=True)
    return folder


def continue_adapter(aligned: Path, folder: Path, *, seed: int = 2, drift: float = 0.2) -> Path:
    """Writes a copy of `aligned` whose factors moved by `drift` of their own size, as more training would."""
    folder.mkdir(parents=True)
    for path in aligned.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    generator = torch.Generator().manual_seed(seed)

    def move(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: (t.float() + drift * t.float().std() * torch.randn(t.shape, generator=generator)).to(t.dtype)
            for name, t in tensors.items()
        }

    change_tensors(folder, move)
    return folder


def change_tensors(folder: Path, change: Any) -> None:
    """Rewrites the weights of an adapter folder as `change(tensors)`."""
    path = folder / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, path, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    """Sets keys of adapter_config.json; None removes one."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for key, value in values.items():
        if value is None:
            config.pop(key, None)
        else:
            config[key] = value
    path.write_text(json.dumps(config, indent=2))
