"""The base of everything that is read from a file or a command line into fields."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """An immutable value of checked fields; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
