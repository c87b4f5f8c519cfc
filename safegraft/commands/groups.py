"""Command groups whose modules are imported once they are asked for: the database's libraries alone take as long as
everything else that `safegraft inspect` needs."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

MODULES = {name: f"safegraft.commands.{name}" for name in ("keys", "provenance", "admin")}


class Groups(TyperGroup):
    """The root, of which the groups of MODULES are a part; each module has its group as `app`."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._import(*MODULES)
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.commands:
            # All of them for a name that nobody has: what resembles it is suggested.
            self._import(*([cmd_name] if cmd_name in MODULES else MODULES))
        return super().get_command(ctx, cmd_name)

    def _import(self, *names: str) -> None:
        for name in names:
            if name not in self.commands:
                self.commands[name] = typer.main.get_group(import_module(MODULES[name]).app)
                self.commands[name].name = name
