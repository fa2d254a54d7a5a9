"""Read `adapter_config.json` of a PEFT adapter: the settings that define the merge; unsupported ones are refused.

Fields and pattern rule as in https://github.com/huggingface/peft (LoraConfig, get_pattern_key).
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convert.errors import AdapterInvalid, inner_folder, json_fault

ADAPTER_CONFIG_FILE = "adapter_config.json"
MAX_PATTERN_LENGTH = 256

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]

_REFUSED: Mapping[str, str] = {
    "fan_in_fan_out": "only GPT-2's Conv1D layers store their weights transposed, and no known family has them",
    "layer_replication": "layers were replicated",
    "target_parameters": "parameters outside linear layers were trained",
    "alora_invocation_tokens": "an activated LoRA acts only after its invocation tokens",
    "use_qalora": "QA-LoRA pools its input and cannot be merged as W + B·A",
    "arrow_config": "Arrow routes between adapters and cannot be merged",
    "megatron_config": "Megatron's parallel layers are split",
}
# Settings that do not change the merge, or that LoraConfig reads. Any other setting with a value is refused.
_HARMLESS = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "task_type",
    "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "ensure_weight_tying", "modules_to_save", "use_dora", "lora_bias", "trainable_token_indices",
}  # fmt: skip
# These initialisations change the base's weights, and the adapter fits the changed base only.
_BASE_CHANGING_INIT = ("pissa", "olora", "loftq", "corda", "lora_ga")


_MLX_KEYS = ("lora_parameters", "fine_tune_type", "adapter_path")
_MLX_WEIGHTS = "adapters.safetensors"
_PROMPTS = {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT"}


class LoraConfig(BaseModel):
    """The settings of a merge: ranks and scales, per module where patterns match, and what was trained beside the LoRA.

    `base` is the base's name as given to PEFT: an id of the Hub, a path, or empty.
    """

    model_config = ConfigDict(frozen=True)

    peft_type: str
    rank: Annotated[int, Field(alias="r", ge=1, le=4096)]
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=4096)]] = {}
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[TokenId, ...] | dict[str, tuple[TokenId, ...]] = ()
    base: Annotated[str, Field(alias="base_model_name_or_path")] = ""

    @property
    def tokens(self) -> Mapping[str, tuple[int, ...]]:
        """Ending of a module's name -> the ids of its trained rows."""
        given = self.trainable_token_indices
        return given if isinstance(given, dict) else {"embed_tokens": given} if given else {}

    def rank_of(self, module: str) -> int:
        """The rank of one module."""
        return int(_match(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """Scale: alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (https://arxiv.org/abs/2312.03732)."""
        rank = self.rank_of(module)
        return float(_match(self.alpha_pattern, module, self.lora_alpha)) / (
            math.sqrt(rank) if self.use_rslora else rank
        )


def read_config(folder: Path) -> LoraConfig:
    """Read and check `adapter_config.json`. Raises AdapterInvalid naming the setting."""
    file = folder / ADAPTER_CONFIG_FILE
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = inner_folder(folder, ADAPTER_CONFIG_FILE)
        if not hint and (folder / "config.json").is_file():
            hint = ": it is a whole model, give it as SOURCE"
        message = f"{str(folder)!r} is not a PEFT adapter folder: it has no {ADAPTER_CONFIG_FILE!r}{hint}"
        raise AdapterInvalid(message) from None
    except OSError as error:
        raise AdapterInvalid(f"{str(file)!r} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(json_fault(file, error)) from error
    if not isinstance(raw, dict):
        raise AdapterInvalid(f"{str(file)!r} must hold a JSON object, got {type(raw).__name__}")
    _refuse_variants(file, raw)
    try:
        config = LoraConfig.model_validate({key: value for key, value in raw.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise AdapterInvalid(f"{str(file)!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    _check_patterns(file, config)
    return config


def _refuse_variants(file: Path, raw: Mapping[str, Any]) -> None:
    if (kind := raw.get("peft_type")) != "LORA":
        raise AdapterInvalid(f"{str(file)!r}: {_other_kind(file.parent, kind, raw)}")
    for setting, reason in _REFUSED.items():
        if raw.get(setting):
            raise AdapterInvalid(f"{str(file)!r}: {setting} = {raw[setting]!r} is not supported: {reason}")
    for setting in sorted(raw.keys() - _HARMLESS - _REFUSED.keys()):
        if raw[setting]:
            raise AdapterInvalid(
                f"{str(file)!r}: {setting} = {raw[setting]!r} is unknown and may change what the adapter means"
            )
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INIT):
        raise AdapterInvalid(
            f"{str(file)!r}: init_lora_weights = {init!r} changes the base's weights; convert the adapter to a plain "
            "LoRA with PEFT first (path_initial_model_for_weight_conversion)"
        )


def _other_kind(folder: Path, kind: object, raw: Mapping[str, Any]) -> str:
    """Describe an adapter that is not a LoRA of PEFT, and the way out."""
    if kind is None and (any(key in raw for key in _MLX_KEYS) or (folder / _MLX_WEIGHTS).is_file()):
        return (
            "this is an adapter of MLX, not of PEFT: fuse it (mlx_lm.fuse --model BASE --adapter-path DIR --save-path "
            "OUT, with --dequantize for a quantized base) and convert OUT"
        )
    if kind in _PROMPTS:
        return (
            f"peft_type is {kind!r}, which puts trained vectors before the prompt instead of changing weights, and "
            "llama.cpp has no place for them: train a LoRA"
        )
    return (
        f"peft_type is {kind!r}, only 'LORA' can be merged here: merge it with PEFT (merge_and_unload, then "
        "save_pretrained of model and tokenizer) and convert the merged folder"
    )


def _check_patterns(file: Path, config: LoraConfig) -> None:
    for pattern in (*config.rank_pattern, *config.alpha_pattern):
        try:
            if len(pattern) > MAX_PATTERN_LENGTH:
                raise AdapterInvalid(
                    f"{str(file)!r}: a pattern of {len(pattern)} characters; limit {MAX_PATTERN_LENGTH}"
                )
            re.compile(_anchored(pattern))
        except re.error as error:
            raise AdapterInvalid(f"{str(file)!r}: pattern {pattern!r} is not a regular expression: {error}") from error


def _anchored(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _match(patterns: Mapping[str, float], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(_anchored(pattern), module):
            return value
    return default
