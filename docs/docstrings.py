"""How do the package's docstrings reach the reference pages?

The parser knows the section "Examples:"; the package writes "Example:", since there is one. The heading is changed
while the pages are built, so that the code below it is shown as code.
"""

import griffe


class ExampleSections(griffe.Extension):
    """Turns each "Example:" section into the one that the parser knows."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Changes the docstring of one object."""
        if obj.docstring is not None:
            lines = obj.docstring.value.split("\n")
            obj.docstring.value = "\n".join("Examples:" if line == "Example:" else line for line in lines)
