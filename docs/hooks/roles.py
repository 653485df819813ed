"""Docstrings have Sphinx's roles (``:class:`~recbole_holo.data.Catalogue```); on the site they are links and code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|meth|func|mod|data|attr):`(~?)([\w.]+)`")


def as_markdown(text: str) -> str:
    """A docstring with its roles as code, linked where the site has what they name, and ``::`` as a colon."""
    return re.sub(r"::(?=\n\s*\n?\s)", ":", ROLE.sub(_link, text))


def _link(found: re.Match[str]) -> str:
    short, name = found[1], found[2]
    shown = f"<code>{name.rpartition('.')[2] if short else name}</code>"
    return f'<autoref identifier="{name}" optional>{shown}</autoref>' if "." in name else shown


class Roles(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
