"""The native library, `libframestep.so`, through the declarations in its own header; see include/framestep.h."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from .errors import BundleError, EngineError, FrameError, FramestepError, OutputError, StateError

PACKAGE = Path(__file__).parents[1]
HEADER = PACKAGE / "include" / "framestep.h"
LIBRARY = PACKAGE / "runtime" / "native" / "libframestep.so"
BEGIN, END = "/* framestep: declarations begin */", "/* framestep: declarations end */"
API_VERSION = 1
ERRORS: dict[str, type[FramestepError]] = {
    "FS_ERROR_BUNDLE": BundleError,
    "FS_ERROR_FRAME": FrameError,
    "FS_ERROR_STATE": StateError,
    "FS_ERROR_OUTPUT": OutputError,
}


class Library:
    """The functions of the header, and what cffi needs to call them.

    Attributes:
        ffi: makes the header's types.
        functions: the header's functions; they let other Python threads run meanwhile.
    """

    def __init__(self, header: Path, path: Path) -> None:
        try:
            from cffi import FFI
        except ImportError:
            raise EngineError("the onnxruntime engine needs cffi: pip install cffi") from None
        text = header.read_text("utf-8")
        self.ffi: Any = FFI()
        self.ffi.cdef(text[text.index(BEGIN) : text.index(END)])
        if not path.is_file():
            raise EngineError(
                f"{path}: the native library is missing; build it with 'pip install -e {PACKAGE}', or, where framestep"
                " is installed, run Python in another folder: in this one it finds the checkout first"
            )
        try:
            self.functions: Any = self.ffi.dlopen(str(path))
            version = self.functions.fs_api_version()
        except (OSError, AttributeError) as error:
            raise EngineError(f"{path}: cannot be used: {error}") from None
        if version != API_VERSION:
            raise EngineError(
                f"{path}: has version {version} of the C API, this framestep needs {API_VERSION}; install it again"
            )

    def new(self, struct: str) -> Any:
        """A zeroed struct that knows its size."""
        made = self.ffi.new(f"{struct} *")
        made.struct_size = self.ffi.sizeof(struct)
        return made

    def check(self, status: int) -> None:
        """Raise what a status stands for.

        Raises:
            FramestepError: the library's message, as the error of its kind.
        """
        if status != self.functions.FS_OK:
            name = self.text(self.functions.fs_status_name(status))
            raise ERRORS.get(name, EngineError)(self.text(self.functions.fs_last_error()))

    def text(self, pointer: Any) -> str:
        """A copy of a text of the library's."""
        copy: str = self.ffi.string(pointer).decode("utf-8", "replace")
        return copy


@cache
def library() -> Library:
    """The library that was built with this package, loaded once.

    Raises:
        EngineError: it was not built, or is of another version.
    """
    return Library(HEADER, LIBRARY)
