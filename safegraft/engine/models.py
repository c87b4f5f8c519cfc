"""Language models from a local folder, or from a Python package that carries one as GGUF.

Nothing is ever fetched: transformers is always called with `local_files_only`, and a name that comes out of a
customer's file never reaches this module.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from safegraft.errors import InvalidParameter


def cache_folder() -> Path:
    """Where converted models lie: $SAFEGRAFT_CACHE, else the user's cache folder."""
    named = os.environ.get("SAFEGRAFT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safegraft"


def resolve_base(base: str) -> Path:
    """A folder in Hugging Face form for `base`: itself if it is one, else the installed package of that name.

    Raises InvalidParameter (`base_not_found`) with what was looked for.
    """
    path = Path(base)
    if (path / "config.json").is_file():
        return path
    if path.exists():
        raise InvalidParameter(
            f"{path} holds no config.json.", code="base_not_found", param="base", hint="Give a model folder."
        )
    try:
        distribution = importlib.metadata.distribution(base)
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise InvalidParameter(
            f"{base!r} is neither a folder nor an installed Python package.",
            code="base_not_found",
            param="base",
            hint="Models are never fetched: download it first, and name its folder.",
        ) from error
    for file in distribution.files or []:
        if file.suffix == ".gguf":
            return _convert_gguf(Path(str(distribution.locate_file(file))), f"{base}-{distribution.version}")
    raise InvalidParameter(f"Package {base!r} carries no GGUF file.", code="base_not_found", param="base")


def _convert_gguf(source: Path, name: str) -> Path:
    """Dequantises once into the cache as bf16, and returns that folder.

    transformers cannot save a model that it loaded from GGUF (its quantisation config is kept), so a new model
    is built from the configuration and takes over the state.
    """
    target = cache_folder() / "models" / name
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(source.parent), source.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16, local_files_only=True)
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        type(loaded.config)(**settings), dtype=torch.bfloat16
    )
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(dir=target.parent))
    try:
        model.save_pretrained(beside)
        AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True).save_pretrained(beside)
        try:
            beside.rename(target)
        except OSError:
            # Another process finished first; its result is the same.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def check_device(device: str) -> None:
    """Raises InvalidParameter (`device_unavailable`) where torch cannot compute there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidParameter(
            f"The device {device!r} is not available ({str(error).splitlines()[0]}).",
            code="device_unavailable",
            param="device",
        ) from error


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> Any:
    """A causal language model in evaluation mode, without gradients."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False
    )
    model.requires_grad_(False)
    model.eval()
    return model.to(device)


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer, with a padding token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def linear_modules(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Name → (outputs d, inputs k) of every linear layer that a LoRA adapter may target.

    Output embeddings are left out: adapters on them change the vocabulary, not the layers.
    """
    output_embeddings: Any = getattr(model, "get_output_embeddings", None)
    head = output_embeddings() if output_embeddings else None
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            found[name] = (module.out_features, module.in_features)
    return found


def config_hash(folder: Path) -> str:
    """SHA-256 of the model's configuration, its keys sorted and those that only record a version left out."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for volatile in ("transformers_version", "_name_or_path", "torch_dtype", "dtype"):
        config.pop(volatile, None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def quiet_libraries() -> None:
    """Keeps transformers' bars and its notices about its own future out of a program's output."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Adapters name their base by its public label; that label is never looked up.
    warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning, module="peft")
