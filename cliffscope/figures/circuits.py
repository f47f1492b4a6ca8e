"""What draws CircuitsVis' components without a network?

CircuitsVis' own HTML loads its script from a server wherever there is one. Its package holds the script too; a page
inlines that once. Text from models must be made harmless first: CircuitsVis writes tokens as HTML.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from uuid import uuid4

from cliffscope.figures.theme import embed, printable

SIGNS = {"positiveColor": "#F08A3C", "negativeColor": "#5AA9DD"}
"""Lighter kin of the theme's vermillion and blue, on whose deepest shade dark text still reads."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CircuitsView:
    """A component that shows itself in a notebook, with its script (1.3 MB) beside it."""

    component: str
    """Name of the component, such as `ColoredTokens`."""
    props: Mapping[str, object]
    """Its properties, JSON-ready."""

    def __str__(self) -> str:
        """The HTML, which loads nothing."""
        data = embed(dict(self.props))
        # One that is shown twice is two elements.
        name = f"circuits-{uuid4().hex[:12]}"
        call = f"CircuitsVis.render({embed(name)}, CircuitsVis.{self.component}, {data});"
        return f'<div id="{name}" style="margin:15px 0"></div><script>{circuits_script()}\n{call}</script>'

    def _repr_html_(self) -> str:
        """The same, for notebooks."""
        return str(self)


def harmless(token: str, *, limit: int = 60) -> str:
    """A token as CircuitsVis may write it: printable, and with nothing that begins an element or an entity."""
    return printable(token, limit=limit).replace("<", "‹").replace("&", "＆")


def coloured_tokens(tokens: Sequence[str], values: Sequence[float]) -> dict[str, object]:
    """Properties of `ColoredTokens`: harmless texts, and one scale for both signs, so that equal shades are equal."""
    most = max((abs(value) for value in values), default=0.0) or 1.0
    return {
        "tokens": [harmless(token) for token in tokens],
        "values": [round(float(value), 4) for value in values],
        "minValue": -most,
        "maxValue": most,
        **SIGNS,
    }


@cache
def circuits_script() -> str:
    """CircuitsVis' script, which may stand inside a script element and defines `CircuitsVis`."""
    text = files("circuitsvis").joinpath("dist", "cdn", "iife.js").read_text(encoding="utf-8")
    # The sequence occurs in a string that React compares with.
    return text.replace("</script", "<\\/script")
