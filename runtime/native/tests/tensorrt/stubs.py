"""Classes of TensorRT whose every function ends the program, for stand-ins that have a few: `stubs.py NvInferImpl.h`"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CLASSES = ("VRuntime", "VCudaEngine", "VExecutionContext")


def stubs(header: str) -> str:
    text = "#pragma once\n#include <NvInferRuntime.h>\n#include <cstdlib>\n\n"
    text += "namespace stubs {\nusing namespace nvinfer1;\n"
    for name in CLASSES:
        body = re.search(rf"class {name} [^{{]*{{(.*?)\n}};", header, re.DOTALL)
        if body is None:
            raise SystemExit(f"{name} is not in this header")
        text += f"class {name} : public apiv::{name} {{\npublic:\n"
        for function in re.findall(r"virtual ([^;]*?) noexcept = 0;", body[1], re.DOTALL):
            text += f"    {' '.join(function.split())} noexcept override {{ std::abort(); }}\n"
        text += "};\n"
    return text + "}  // namespace stubs\n"


if __name__ == "__main__":
    print(stubs(Path(sys.argv[1]).read_text()), end="")
