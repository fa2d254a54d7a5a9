"""What `deskside bench peers` can be told."""

from pathlib import Path

from pydantic import Field

from .record import Noun

QUICK = {"repetitions": 2, "requests": 16, "reply_requests": 8, "burst": 24, "alone": 4, "offline": 32}
STAGES = ("fine-tune", "base", "cold", "offline", "bare")


class PeerSettings(Noun):
    """What a comparison can be told. `quick` changes the defaults that make it long."""

    repetitions: int = Field(
        default=3, ge=2, description="Times each pass is repeated, in alternating order (a burst: at most 2)."
    )
    requests: int = Field(default=48, ge=2, description="Mails labelled in one pass by 16 clients.")
    reply_requests: int = Field(default=24, ge=2, description="64-token replies in one pass by 16 clients.")
    burst: int = Field(default=200, ge=2, description="Mails sent at once to a cold server.")
    alone: int = Field(default=12, ge=2, description="Requests in one pass by one client.")
    warmup: int = Field(default=16, ge=1, description="Requests that warm a server up, for each way of asking.")
    offline: int = Field(default=128, ge=2, description="Mails in a file labelled offline.")
    stages: str = Field(default=",".join(STAGES), description="Which parts to run.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads of every server (default: all cores).")
    quick: bool = Field(default=False, description="Few requests: shows that everything works, measures nothing well.")
    seed: int = Field(default=0, description="Which mails go where.")
    folder: Path = Field(default=Path(".bench-peers"), description="The peers' venv and the converted models.")
    out: Path | None = Field(default=None, description="Where the JSON goes (default: results/peers-<time>.json).")

    def effective(self) -> "PeerSettings":
        """These settings, with `quick`'s numbers where none was given."""
        if not self.quick:
            return self
        given = self.model_fields_set
        return self.model_copy(update={name: value for name, value in QUICK.items() if name not in given})
