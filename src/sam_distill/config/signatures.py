"""Read signatures of this package and of Lightning's Trainer without torch and other imports that take seconds."""

import builtins
import pkgutil
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any

from pydantic_core import core_schema

PACKAGE = "sam_distill"
QUICK = (f"{PACKAGE}.", "pytorch_lightning.trainer.")  # prefixes of names that are loaded without slow imports
_modules: dict[str, ModuleType] = {}


def resolve(name: str) -> Any:
    """Return the class or function with this dotted name. If it is one of QUICK, only its signature is usable."""
    if not name.startswith(QUICK):
        return pkgutil.resolve_name(name)
    module, _, attribute = name.rpartition(".")
    return getattr(_load(module), attribute)


class _StandIn:
    """Placeholder for a library that is not imported, and for its base classes, decorators, constants and so on."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **_: Any) -> Any:
        return args[0] if args and isinstance(args[0], FunctionType) else self

    def __getitem__(self, _: Any) -> Any:
        return self

    def __iter__(self) -> Any:
        return iter(())

    def __or__(self, _: Any) -> Any:
        return self

    __ror__ = __or__

    def __repr__(self) -> str:
        return "Any"

    def __mro_entries__(self, _: Any) -> tuple[()]:
        return ()

    def __get_pydantic_core_schema__(self, *_: Any) -> Any:
        return core_schema.any_schema()


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """Return a submodule, as in `from sam_distill.models import weights`."""
        return _load(f"{self.__name__}.{name}")


def _find(name: str) -> ModuleSpec | None:
    """Return a module's spec. Unlike importlib's find_spec, this does not import the packages that contain it."""
    package = name.rpartition(".")[0]
    if not package:
        return find_spec(name)
    parent = _find(package)
    return PathFinder.find_spec(name, parent.submodule_search_locations) if parent else None


def _load(name: str) -> ModuleType:
    """Execute a second copy of a module, with stand-ins for outside libraries that are not yet imported."""
    if name not in _modules:
        spec = _find(name)
        if spec is None or spec.loader is None:
            raise AttributeError(f"module {name.rpartition('.')[0]!r} has no attribute {name.rpartition('.')[2]!r}")
        module = _modules[name] = _Module(name)
        module.__dict__.update(__file__=spec.origin, __builtins__=vars(builtins) | {"__import__": _import})
        real = sys.modules.get(name)
        sys.modules[name] = module  # dataclasses look up the names in annotations there
        try:
            exec(spec.loader.get_code(name), module.__dict__)  # type: ignore[attr-defined]
        finally:
            del sys.modules[name]
            if real is not None:
                sys.modules[name] = real
    return _modules[name]


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    root = name.partition(".")[0]
    if root == PACKAGE:
        return _load(name)
    if root in sys.stdlib_module_names or root in sys.modules:
        return builtins.__import__(name, globals, locals, fromlist, level)
    return _StandIn()
