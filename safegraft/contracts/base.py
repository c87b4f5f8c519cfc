"""What all contracts have in common."""

from pydantic import BaseModel, ConfigDict

# Postgres holds no NUL, and refuses it as late as when a value is taken out of a JSON column.
NO_NUL = r"^[^\x00]*$"


class Shown(BaseModel):
    """What we answer and what we keep."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Asked(Shown):
    """What clients send. Strict: `false` is no number and `"3"` neither; a mistake is named rather than guessed at."""

    model_config = ConfigDict(strict=True)
