"""The installed TensorRT: the full package, or TensorRT for RTX. Both have the same names for what is used here."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..errors import EngineError
from .engine_files import FLAVOURS

OLDEST = (10, 15)  # of the full package; earlier ones have no layer that updates a KV cache
INSTALL = (
    "pip install tensorrt-rtx (GeForce and RTX GPUs, and building without a GPU), pip install 'framestep[tensorrt]'"
    " (data centre GPUs), or use the one of JetPack (docs/jetson.md)"
)


def installed_flavours() -> list[str]:
    """Flavours whose package is there, whether or not it works."""
    return [flavour for flavour in FLAVOURS if importlib.util.find_spec(flavour) is not None]


def import_flavour(flavour: str) -> Any:
    """The package itself.

    Raises:
        EngineError: it is missing, too old, or its libraries cannot be loaded.
    """
    try:
        package = importlib.import_module(flavour)
        version = str(package.__version__)
    except ModuleNotFoundError:
        raise EngineError(f"TensorRT is not installed (no package {flavour}): {INSTALL}") from None
    except (ImportError, OSError, AttributeError) as error:
        text = " ".join(str(error).split())[:200]
        raise EngineError(
            f"the package {flavour} cannot be loaded ({text}); install it again, or see docs/troubleshooting.md"
        ) from None
    if flavour == "tensorrt" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise EngineError(f"TensorRT {version} is too old: 10.15 is the first that updates a KV cache in place")
    return package


def choose_flavour(asked: str = "auto") -> str:
    """The flavour asked for, or the first one that is installed.

    Raises:
        EngineError: unknown, or none is installed.
    """
    if asked != "auto":
        if asked not in FLAVOURS:
            raise EngineError(f"TensorRT flavour '{asked}' is unknown; expected auto, {', '.join(FLAVOURS)}")
        return asked
    found = installed_flavours()
    if not found:
        raise EngineError(f"TensorRT is not installed: {INSTALL}")
    return found[0]


class Messages:
    """What TensorRT said: a logger that keeps warnings and errors instead of printing them.

    Attributes:
        logger: to hand to TensorRT; keep this object as long as TensorRT has it.
    """

    def __init__(self, package: Any) -> None:
        self.warnings: list[str] = []
        self.errors: list[str] = []
        kept = self

        class Logger(package.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if severity in (package.ILogger.ERROR, package.ILogger.INTERNAL_ERROR):
                    kept.errors.append(" ".join(message.split()))
                elif severity == package.ILogger.WARNING:
                    kept.warnings.append(" ".join(message.split()))

        self.logger = Logger()

    def last_error(self) -> str:
        return (self.errors[-1] if self.errors else "it gave no reason")[:400]
