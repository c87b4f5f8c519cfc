"""What all contracts have in common."""

from pydantic import BaseModel, ConfigDict


class Shown(BaseModel):
    """What we answer and what we keep."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Asked(Shown):
    """What clients send. Strict: `false` is no number and `"3"` neither; a mistake is named rather than guessed at."""

    model_config = ConfigDict(strict=True)
