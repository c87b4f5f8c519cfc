"""Writes the OpenAPI document that the application generates: `python -m service.export FILE`."""

import json
import sys
from pathlib import Path

from service.app import create_app
from service.settings import GatewaySettings


def document() -> str:
    """The document as it is committed: sorted nowhere, so that its order is the code's."""
    return json.dumps(create_app(GatewaySettings(dev=True)).openapi(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(document(), encoding="utf-8")
