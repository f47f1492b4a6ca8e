"""CliffScope: where, and by which attention heads, a reasoning model loses its intention to refuse; how to restore it.

The public names stand in `__init__.pyi` and are loaded when they are first used, so that the import is quick.
"""

import lazy_loader

__version__ = "0.2.0.dev0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
