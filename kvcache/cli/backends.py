"""``kvcache backends``: the backends on this machine."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

import kvcache
from kvcache.backends import HOST_DTYPES

from .console import notes


def backends() -> None:
    """Show the backends of this machine, their devices, and how to install the others."""
    with notes.status("Importing what is installed"):
        infos = kvcache.available_backends()
    table = Table("backend", "version", "devices, default first", "dtypes it lacks", "to install")
    for name, info in infos.items():
        if info.installed:
            devices = ", ".join(info.devices)
            table.add_row(name, info.version, devices, _missing_dtypes(name), "", style="green")
        else:
            table.add_row(name, "-", "", "", escape(info.remedy), style="dim")
    # The table is the result of this command, so it goes to standard output.
    Console().print(table)
    best = kvcache.get_backend("auto")
    Console().print(f"[bold]auto[/] chooses {best.spec}. KVCACHE_BACKEND overrides it.")


def _missing_dtypes(name: str) -> str:
    if name == "array_api":  # the name of a protocol, which has no dtypes without a library
        return "depends on the library"
    dtypes = kvcache.get_backend(name).dtypes
    return ", ".join(dtype for dtype in HOST_DTYPES if dtype not in dtypes) or "none"
