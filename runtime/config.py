"""The settings of the runtime, as frozen values; `with_options` generates flags and DESKSIDE_* variables from them.

A new setting is one new field here, and nothing else.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from models.common.options import AutoFloat, AutoInt, AutoOffInt, Flag
from models.common.record import Record

LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    BeforeValidator(lambda text: text.lower() if isinstance(text, str) else text),
    Flag(metavar="LEVEL"),
]
GibiBytes = Annotated[AutoFloat, Flag(metavar="auto|GIB", shown="auto")]


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser()


class EngineConfig(Record):
    """Settings of a model's engine; chat takes these alone. None is "auto"."""

    env_prefix: ClassVar[str] = "DESKSIDE_"

    slots: int = Field(default=16, ge=1, le=128, description="Answers written at the same time.")
    context: int = Field(default=8192, ge=64, le=1 << 22, description="Tokens in the KV cache, shared by all slots.")
    step_tokens: int = Field(default=512, ge=32, le=1 << 15, description="Most tokens computed in one step.")
    threads: AutoInt = Field(default=None, ge=1, le=1024, description="CPU threads; auto: physical cores.")
    gpu_layers: AutoInt = Field(
        default=None, ge=0, le=10000, description="Layers on the GPU; auto: all, if llama.cpp supports it."
    )
    long_prompts: bool = Field(
        default=False,
        description="Phi-3 and Phi-4-mini: serve prompts beyond the length before scaling (4,096 tokens), with the "
        "rotations for those in every prompt.",
    )
    speculate: AutoOffInt = Field(
        default=None,
        ge=0,
        le=64,
        description="Most speculative tokens per step where an answer copies; auto: as many as pay. Without --fast "
        "none where they would change bits.",
    )
    prefill: Annotated[Literal["auto", "stock", "own"], Flag(metavar="auto|stock|own")] = Field(
        default="auto",
        description="Prompts and attention by llama.cpp (stock) or by Deskside (own); auto: by what wins a race "
        "at the first load.",
    )
    fast: bool = Field(
        default=False,
        description="Faster, but an answer may differ in its last bits from time to time; for conversations, "
        "embeddings and, with K-quants, answers that copy.",
    )

    prefix_memory: GibiBytes = Field(
        default=None,
        ge=0,
        le=1 << 20,
        description="Memory for prefixes that left the KV cache, in GiB; auto: 1, or a tenth of what is free; 0: none.",
    )
    prefix_disk: Annotated[Path | None, AfterValidator(_expanded), Flag(metavar="DIR")] = Field(
        default=None,
        description="Folder for prefixes that outlive a restart; it may serve several servers. None by default.",
    )
    prefix_disk_size: Annotated[float, Flag(metavar="GIB")] = Field(
        default=4.0, ge=0.001, le=1 << 20, description="Size of that folder, in GiB; least recently used prefixes go."
    )


class BatchConfig(EngineConfig):
    """Settings of the engine, and the promise of automatic answers, which batch and server keep."""

    target: Annotated[float | None, Flag(metavar="SHARE", shown="the model's own")] = Field(
        default=None,
        ge=0.5,
        lt=1,
        description="Share of automatic answers that must be right, one that the model has; told in chats, too.",
    )


class RuntimeConfig(BatchConfig):
    """All settings: those of the engine, and those of the server."""

    bind: Annotated[str, Flag("host")] = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8080, ge=0, le=65535, description="Port to listen on; 0: any free one.")
    queue: int = Field(default=256, ge=0, le=1 << 20, description="Answers that may wait for a slot.")
    max_body_bytes: Annotated[int, Flag(metavar="BYTES")] = Field(
        default=4 << 20, ge=1024, le=1 << 30, description="Largest request body, in bytes."
    )
    drain_seconds: Annotated[float, Flag(metavar="SECONDS")] = Field(
        default=30.0, ge=0, le=86400, description="Time for running answers to finish at SIGTERM."
    )
    idle_minutes: Annotated[float, Flag(metavar="MINUTES")] = Field(
        default=0.0, ge=0, le=1 << 20, description="Unload a model unused for this long; 0: never."
    )
    memory_budget: GibiBytes = Field(
        default=None, ge=0, le=1 << 20, description="Memory for models, in GiB; auto: 9/10 of what is free."
    )
    api_key: Annotated[str, Flag(metavar="KEY")] = Field(
        default="", description="Key that clients must send as bearer token; empty: none."
    )
    cors_origins: Annotated[tuple[str, ...], Flag(metavar="ORIGINS")] = Field(
        default=(), description="Web origins allowed to call, comma-separated; empty: none."
    )
    allowed_hosts: Annotated[tuple[str, ...], Flag(metavar="NAMES")] = Field(
        default=(),
        description="Names of this server beside localhost and addresses, comma-separated; *: any.",
    )
    log_level: LogLevel = Field(default="info", description="One of debug, info, warning, error.")
