"""What a PEFT LoRA folder says about itself, without reading a single weight.

Knows `adapter_config.json` of any PEFT version and the names and shapes in the safetensors header; decides what each
module's rank and scaling are, and refuses by name what no repair on the factors can treat soundly. Does not know the
base model: whether a module exists there is `compatibility.py`'s question. No torch: the gateway reads uploads with it.
"""

import functools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, NoReturn

import re2
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safegraft.errors import InvalidAdapter, UnsupportedAdapter
from safegraft.header import Header, TensorEntry, read_header, shown

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What travels with a patched adapter unchanged; everything else that is no adapter file is dropped and listed. Each
# pattern ends in how the file does: code, pickles and a second .safetensors must not travel under a companion's name.
COMPANIONS = (
    "tokenizer*.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json",
    "chat_template*.jinja", "special_tokens_map.json", "added_tokens.json", "generation_config.json", "README.md",
)  # fmt: skip
# fnmatch's `*` matches anything, also slashes.
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
# What pydantic calls the kinds of values that a field may have, where it tells the place of a fault.
BRANCH = re.compile(r"(literal|list|dict|set|tuple|union|nullable|function-\w+)\[|(bool|int|str|float)$")
MAX_CONFIG_BYTES = 2**20
MAX_RANK = 4096
MIN_SCALING, MAX_SCALING = 1e-6, 1e6
# RE2 takes time in proportion to a program's instructions times the characters it reads. 3·10⁹ are some three seconds
# at the very worst; a rank_pattern and an alpha_pattern that name each of 882 modules (Llama 405B) need 2.5·10⁹.
MAX_PATTERN_WORK = 3 * 10**9
MAX_INSTRUCTIONS = 10**6
DTYPES = {"F32", "F16", "BF16"}
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[A-Za-z0-9_-]+))?\.weight")
BIAS = re.compile(r"\.lora_B(?:\.[A-Za-z0-9_-]+)?\.bias$")
# Initialisations that leave the base weights alone. The others (PiSSA, OLoRA, LoftQ, CorDA, …) subtract from them, so
# that B·A is not the difference to the base model.
SOUND_INITS = {"true", "false", "none", "gaussian", "eva", "orthogonal"}
# Set by DoRA, aLoRA, QALoRA and so on: an adapter whose output is not W·x + s·B·A·x.
UNSOUND_KEYS = {
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "lora_ga_config": "LoRA-GA",
    "corda_config": "CorDA",
    "target_parameters": "LoRA on parameters (mixture-of-experts layers)",
    "trainable_token_indices": "trainable tokens",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron's parallel layers",
    "modules_to_save": "whole modules saved beside the factors",
}


class PeftConfig(BaseModel):
    """The keys of adapter_config.json that decide what the factors mean. Others are kept but not acted on."""

    model_config = ConfigDict(extra="allow", strict=True)

    peft_type: str
    r: int
    lora_alpha: float
    base_model_name_or_path: Annotated[str, Field(max_length=4096)] | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    init_lora_weights: bool | str | None = True


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear layer: ΔW = scaling · B·A with A (rank, inputs) and B (outputs, rank)."""

    name: str
    rank: int
    inputs: int
    outputs: int
    scaling: float
    a: TensorEntry
    b: TensorEntry


@dataclass(frozen=True)
class AdapterDescription:
    """A sound adapter's configuration, header and modules (in the order of layers)."""

    config: PeftConfig
    header: Header
    modules: tuple[LoraModule, ...]

    @property
    def parameters(self) -> int:
        return sum(entry.elements for entry in self.header.tensors.values())

    @property
    def dtype(self) -> str:
        return "/".join(sorted({module.a.dtype for module in self.modules}))

    @property
    def kinds(self) -> list[str]:
        """The last part of the modules' names: q_proj, up_proj, …"""
        return sorted({module.name.rpartition(".")[2] for module in self.modules})


def is_companion(name: str) -> bool:
    """True for files that a patched adapter keeps byte for byte."""
    return bool(FILE_NAME.fullmatch(name)) and any(fnmatchcase(name, pattern) for pattern in COMPANIONS)


def is_adapter(folder: Path) -> bool:
    """Whether a folder is a PEFT adapter; otherwise it may be a full model."""
    return (folder / CONFIG).is_file()


def describe(folder: Path, *, own: bool = False) -> AdapterDescription:
    """Reads config and header of a PEFT folder. Raises InvalidAdapter or UnsupportedAdapter.

    own: a result of this product, which may carry the biases that a customer's adapter may not.
    """
    refuse_missing(folder)
    config = read_config(folder / CONFIG, own=own)
    return pair_modules(config, read_header(folder / WEIGHTS), own=own)


def refuse_missing(folder: Path) -> None:
    """Raises InvalidAdapter where configuration or weights are not there, or no files that could be read to an end."""
    if not (folder / CONFIG).is_file():
        raise InvalidAdapter(
            f"{CONFIG} {_why_not(folder / CONFIG)}.",
            code="missing_config",
            param=CONFIG,
            hint="Send the whole folder that PEFT saved.",
        )
    if not (folder / WEIGHTS).is_file():
        raise InvalidAdapter(
            f"{WEIGHTS} {_why_not(folder / WEIGHTS)}.",
            code="missing_weights",
            param=WEIGHTS,
            hint="Save with `safe_serialization=True`; pickles (.bin, .pt) are never opened.",
        )


def _why_not(path: Path) -> str:
    return "is no regular file" if os.path.lexists(path) else "is missing"


def read_config(path: Path, *, own: bool = False) -> PeftConfig:
    """Reads adapter_config.json, but not more of it than is accepted. Raises like `parse_config`."""
    with path.open("rb") as file:
        return parse_config(file.read(MAX_CONFIG_BYTES + 1), own=own)


def parse_config(raw: bytes, *, own: bool = False) -> PeftConfig:
    """Checks adapter_config.json. Raises InvalidAdapter (not readable) or UnsupportedAdapter (not treatable)."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise InvalidAdapter(f"{CONFIG} has more than {MAX_CONFIG_BYTES} bytes.", code="config_too_large", param=CONFIG)
    try:
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique)
        # Half a surrogate pair is a string to Python, but no database, log or answer can hold it.
        if "\\u0000" in json.dumps(data, ensure_ascii=False):
            raise ValueError("it holds a NUL character")
        json.dumps(data, ensure_ascii=False).encode()
    except (UnicodeError, RecursionError, ValueError) as error:
        # Of a number of thousands of digits Python goes on about its own settings.
        why = str(error).partition("; use ")[0]
        raise InvalidAdapter(f"{CONFIG} is not JSON ({why})."[:300], code="config_not_json", param=CONFIG) from error
    if not isinstance(data, dict):
        raise InvalidAdapter(f"{CONFIG} is not a JSON object.", code="config_not_json", param=CONFIG)
    if isinstance(kind := data.get("peft_type"), str) and kind != "LORA":
        _unsupported("peft_type_unsupported", f"peft_type '{shown(kind)}' is not LoRA.", "peft_type")
    try:
        config = PeftConfig.model_validate(data)
    except ValidationError as error:
        where, why = _fault(error)
        raise InvalidAdapter(f"{CONFIG}: {where}: {why}.", code="config_invalid", param=where) from error
    _refuse_unsound(config.model_copy(update={"lora_bias": False}) if own else config, data)
    _refuse_numbers(config)
    return config


def _fault(error: ValidationError) -> tuple[str, str]:
    """The first field that is wrong, and what may stand there; of several kinds pydantic says each by itself."""

    def place(found: Any) -> str:
        field, *inner = map(str, found["loc"])
        return shown(".".join([field, *(part for part in inner if not BRANCH.match(part))]))

    faults = error.errors()
    where = place(faults[0])
    return where, ", or: ".join(dict.fromkeys(fault["msg"] for fault in faults if place(fault) == where))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """One JSON object. Readers differ on which of two equal keys counts, so that the scaling that is measured here
    need not be the one that is served."""
    found = dict(pairs)
    if len(found) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise InvalidAdapter(f"{CONFIG}: '{shown(twice)}' stands twice.", code="config_invalid", param=shown(twice))
    return found


def _refuse_unsound(config: PeftConfig, data: dict[str, Any]) -> None:
    if config.use_dora:
        _unsupported(
            "dora_unsupported",
            "DoRA normalises the merged weights, so its factors are no difference that could be repaired: train with "
            "use_dora=False.",
            "use_dora",
        )
    if config.bias != "none":
        _unsupported("bias_unsupported", f"bias='{shown(config.bias)}' trains biases of the base model.", "bias")
    if config.lora_bias:
        _unsupported("bias_unsupported", "lora_bias adds a bias to the factors.", "lora_bias")
    init = str(config.init_lora_weights).lower()
    if init not in SOUND_INITS:
        _unsupported(
            "init_unsupported",
            f"init_lora_weights='{shown(init)}' changes the base weights; B·A is no difference to them.",
            "init_lora_weights",
            "Convert it on your side with `save_pretrained(..., path_initial_model_for_weight_conversion=...)`.",
        )
    for key, what in UNSOUND_KEYS.items():
        if data.get(key):
            code = "modules_to_save_unsupported" if key == "modules_to_save" else "variant_unsupported"
            _unsupported(code, f"{key} is set: {what} cannot be repaired soundly.", key)
    for key, value in data.items():
        # A variant that did not exist when this was written must not pass for plain LoRA.
        if key.startswith("use_") and value and key not in ("use_rslora", "use_dora"):
            _unsupported(
                "variant_unsupported", f"{shown(key)} is set, a variant of LoRA that is not known here.", shown(key)
            )


def _refuse_numbers(config: PeftConfig) -> None:
    for name, rank in [("r", config.r), *(config.rank_pattern or {}).items()]:
        if not 1 <= rank <= MAX_RANK:
            raise InvalidAdapter(
                f"{CONFIG}: rank {shown(str(rank))} of '{shown(name)}' is outside 1 to {MAX_RANK}.",
                code="bad_rank",
                param=shown(name),
            )
    for name, alpha in [("lora_alpha", config.lora_alpha), *(config.alpha_pattern or {}).items()]:
        if not math.isfinite(alpha) or not MIN_SCALING <= alpha <= MAX_SCALING:
            raise InvalidAdapter(
                f"{CONFIG}: alpha {alpha} of '{shown(name)}' is outside {MIN_SCALING:g} to {MAX_SCALING:g}.",
                code="bad_alpha",
                param=shown(name),
            )


def pair_modules(config: PeftConfig, header: Header, *, own: bool = False) -> AdapterDescription:
    """Pairs lora_A with lora_B and gives each pair its rank and scaling. Raises InvalidAdapter."""
    sides: dict[str, dict[str, TensorEntry]] = {}
    adapter_names: dict[str, str | None] = {}
    for name, entry in header.tensors.items():
        match = KEY.fullmatch(name)
        if own and config.lora_bias and BIAS.search(name):
            continue
        if match is None:
            _refuse_key(name)
        pair = sides.setdefault(match["module"], {})
        if match["side"] in pair:
            raise InvalidAdapter(
                f"{name!r} and {pair[match['side']].name!r} are the same factor.", code="duplicate_factor", param=name
            )
        if match["adapter"] != adapter_names.setdefault(match["module"], match["adapter"]):
            raise InvalidAdapter(
                f"{shown(name)}: its other factor belongs to another adapter.",
                code="adapter_names_disagree",
                param=name,
            )
        pair[match["side"]] = entry
    if not sides:
        raise InvalidAdapter("The file holds no LoRA factors.", code="no_factors", param=WEIGHTS)
    targets = Targets(config)
    if targets.instructions * sum(map(len, sides)) > MAX_PATTERN_WORK:
        raise InvalidAdapter(
            f"{CONFIG}: matching its patterns against {len(sides)} modules takes too long.",
            code="pattern_unsupported",
            hint="Use fewer or simpler patterns.",
        )
    modules = []
    for module in sorted(sides, key=natural_order):
        if len(sides[module]) != 2:
            lacking = "B" if "A" in sides[module] else "A"
            raise InvalidAdapter(f"{module}: lora_{lacking} is missing.", code="missing_factor", param=module)
        modules.append(_module(module, sides[module]["A"], sides[module]["B"], config, targets))
    return AdapterDescription(config, header, tuple(modules))


def _module(name: str, a: TensorEntry, b: TensorEntry, config: PeftConfig, targets: "Targets") -> LoraModule:
    for entry in (a, b):
        if entry.dtype not in DTYPES:
            _unsupported(
                "dtype_unsupported", f"{entry.name}: dtype {entry.dtype}; accepted are F32, F16 and BF16.", entry.name
            )
        if entry.elements == 0:
            raise InvalidAdapter(
                f"{entry.name}: the tensor is empty (shape {list(entry.shape)}).",
                code="empty_tensor",
                param=entry.name,
                hint="Gather the parameters before saving (DeepSpeed ZeRO-3 leaves empty shards).",
            )
        if len(entry.shape) != 2:
            _unsupported(
                "shape_unsupported",
                f"{entry.name}: shape {list(entry.shape)}; only linear layers are treated.",
                entry.name,
            )
    if not targets.include(name):
        raise InvalidAdapter(
            f"{name}: has factors, but the configuration does not target it; PEFT would ignore them silently.",
            code="untargeted_module",
            param=name,
        )
    rank = targets.rank(name)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise InvalidAdapter(
            f"{name}: the configuration says rank {rank}, A has {a.shape[0]} rows and B {b.shape[1]} columns.",
            code="rank_disagrees",
            param=name,
        )
    if a.dtype != b.dtype:
        raise InvalidAdapter(f"{name}: A is {a.dtype}, B is {b.dtype}.", code="dtype_disagrees", param=name)
    alpha = targets.alpha(name)
    scaling = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
    return LoraModule(name, rank, a.shape[1], b.shape[0], scaling, a, b)


class Targets:
    """Which modules a configuration adapts, and with what rank and alpha; PEFT's own matching rules.

    Patterns are regular expressions from a customer's file, so they run in RE2, whose time is linear.
    """

    def __init__(self, config: PeftConfig) -> None:
        self.instructions = 0
        self._config = config
        self._excluded = self._wanted(config.exclude_modules or [])
        everything = config.target_modules is None or str(config.target_modules).lower() == "all-linear"
        self._targeted = self._wanted(".*" if everything else config.target_modules or [])
        layers = config.layers_to_transform
        self._layers = frozenset([layers] if isinstance(layers, int) else layers or [])
        self._layer_patterns = self._of_layers(config)
        self._ranks = self._by_name(config.rank_pattern)
        self._alphas = self._by_name(config.alpha_pattern)

    def include(self, module: str) -> bool:
        if self._excluded(module) or not self._targeted(module):
            return False
        names = self._config.target_modules
        # PEFT asks for the layer only where a list's entry is the end of a module's name, not the whole.
        return not self._layers or not isinstance(names, list) or module in names or self._layer(module) in self._layers

    def rank(self, module: str) -> int:
        return int(_first(self._ranks, module, self._config.r))

    def alpha(self, module: str) -> float:
        return float(_first(self._alphas, module, self._config.lora_alpha))

    def _layer(self, module: str) -> int | None:
        for pattern in self._layer_patterns:
            match = pattern.match(module.encode())
            if match is not None:
                # PEFT's own form, in which a pattern like `a|b` may match without naming a layer.
                layer = match.groupdict()[b"idx"]
                return int(layer) if layer is not None else None
        return None

    def _of_layers(self, config: PeftConfig) -> list[Any]:
        if not self._layers:
            return []
        if not config.layers_pattern:
            return [self._compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
        patterns = config.layers_pattern
        names = [patterns] if isinstance(patterns, str) else patterns
        return [self._compile(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", name) for name in names]

    def _wanted(self, wanted: list[str] | str) -> Callable[[str], bool]:
        if isinstance(wanted, str):
            pattern = self._compile(wanted)
            return lambda module: pattern.fullmatch(module.encode()) is not None
        names = frozenset(wanted)
        return lambda module: any(end in names for end in _ends(module))

    def _by_name(self, patterns: dict[str, Any] | None) -> list[tuple[Any, Any]]:
        return [(self._compile(rf"(?:.*\.)?(?:{name})$", name), value) for name, value in (patterns or {}).items()]

    def _compile(self, pattern: str, given: str | None = None) -> Any:
        program = compiled(pattern, given)
        self.instructions += program.programsize
        if self.instructions > MAX_INSTRUCTIONS:
            _bad_pattern(given or pattern, "the patterns together are too large")
        return program


def _ends(module: str) -> Iterable[str]:
    """`a.b.c` → `a.b.c`, `b.c`, `c`."""
    yield module
    at = module.find(".")
    while at >= 0:
        yield module[at + 1 :]
        at = module.find(".", at + 1)


def _first(patterns: list[tuple[Any, Any]], module: str, default: Any) -> Any:
    name = module.encode()
    return next((value for pattern, value in patterns if pattern.match(name)), default)


@functools.lru_cache(maxsize=64)
def compiled(pattern: str, given: str | None = None) -> Any:
    """`pattern` compiled by RE2, to be matched against bytes. Raises InvalidAdapter, which names what was `given`."""
    if "{," in pattern or "[:" in pattern:
        _bad_pattern(given or pattern, "RE2 reads {,n} and [:class:] otherwise than PEFT does")
    options = re2.Options()
    options.log_errors = False
    options.max_mem = 2**20
    # Names are ASCII: one instruction a character instead of a tree of UTF-8 sequences.
    options.encoding = re2.Options.Encoding.LATIN1
    # Groups cost memory and time in every step; only whether it matches is asked.
    options.never_capture = True
    try:
        return re2.compile(pattern.encode(), options=options)
    except re2.error as error:
        why = error.args[0] if error.args else ""
        text = why.decode("latin-1") if isinstance(why, bytes) else str(why)
        # RE2 goes on with the part of the pattern that it stopped at.
        _bad_pattern(given or pattern, shown(text.partition(": ")[0]), error)


def _bad_pattern(pattern: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise InvalidAdapter(
        f"The pattern '{shown(pattern)}' cannot be used ({why}).",
        code="pattern_unsupported",
        param=shown(pattern),
        hint="List the module names instead of a regular expression with look-around or back-references.",
    ) from cause


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which layer 9 comes before layer 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def layer_of(module: str) -> int | None:
    """The number of the layer that a module belongs to: the first number in its dotted name."""
    return next((int(part) for part in module.split(".") if part.isdigit()), None)


def kind_of(module: str) -> str:
    """The kind of projection: the last part of the dotted name."""
    return module.rpartition(".")[2]


def _refuse_key(name: str) -> NoReturn:
    if "lora_magnitude_vector" in name:
        _unsupported("dora_unsupported", f"{name}: a DoRA magnitude.", name)
    # PEFT saves an adapted embedding's own weights beside its factors.
    if "lora_embedding" in name or name.endswith(".base_layer.weight"):
        _unsupported("embedding_unsupported", f"{name}: LoRA on an embedding.", name)
    if "modules_to_save" in name:
        _unsupported("modules_to_save_unsupported", f"{name}: a whole module saved beside the factors.", name)
    if name.endswith(".lora_B.bias") or ".bias" in name:
        _unsupported("bias_unsupported", f"{name}: a bias beside the factors.", name)
    raise InvalidAdapter(
        f"{name!r} is no LoRA factor that PEFT would load; PEFT would ignore it silently.",
        code="unexpected_key",
        param=name,
        hint="Keys look like base_model.model.<module>.lora_A.weight.",
    )


def _unsupported(code: str, message: str, param: str, hint: str = "") -> NoReturn:
    raise UnsupportedAdapter(message, code=code, param=param, hint=hint)
