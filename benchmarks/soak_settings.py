"""What `deskside bench soak` can be told."""

from pathlib import Path

from pydantic import Field

from .record import Noun


class SoakSettings(Noun):
    """What a soak can be told."""

    minutes: float = Field(default=30.0, gt=0, description="How long the load lasts.")
    model: str = Field(default="email-triage", description="The model that is served.")
    slots: int = Field(default=8, ge=1, description="Answers written at the same time.")
    queue: int = Field(default=8, ge=1, description="Answers that may wait; small, so that the server must refuse.")
    overload: float = Field(default=2.0, gt=1, description="Clients as a multiple of slots and queue.")
    kills: int = Field(default=2, ge=0, description="kill -9 of the engine's process, at random times.")
    seed: int = Field(default=0, description="What is sent when, and when the engine is killed.")
    out: Path | None = Field(default=None, description="Where the JSON goes (default: results/soak-<time>.json).")
