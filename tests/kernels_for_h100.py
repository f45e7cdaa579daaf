"""Compiles the candidates' kernels for an H100, at full size, without one: python tests/kernels_for_h100.py

Prints, as JSON, for each kernel the bytes of shared memory, the registers of a thread, the bytes of spilled registers,
and whether its matrix products use the H100's own instruction (wgmma). TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import candidates  # noqa: E402

D, LOGITS = 1024, 50304
H100 = GPUTarget("cuda", 90, 32)


def figures(kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, Any]) -> dict[str, Any]:
    """Of one kernel, whose pointers are aligned to 16 bytes as PyTorch's are."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=H100, options=options)
    report = assemble(compiled.asm["ptx"])
    return dict(shared=compiled.metadata.shared, registers=int(re.search(r"Used (\d+) registers", report)[1]),
                spilled=sum(map(int, re.findall(r"(\d+) bytes spill", report))), wgmma="wgmma" in compiled.asm["ptx"])


def assemble(ptx: str) -> str:
    """The report of the assembler in Triton's package: of the first that knows this version of PTX."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        errors = []
        for assembler in sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")):
            command = [assembler, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode == 0:
                return result.stderr
            errors.append(result.stderr)
    raise RuntimeError("".join(errors))


def main() -> None:
    bf16 = dict(a="*bf16", b="*bf16", squares="*bf16", out="*bf16")
    head = dict(z="*bf16", targets="*i64", losses="*fp32", gradient_scale="fp32")
    rows = dict(rows="*bf16", ids="*i32", order="*i64", starts="*i64", count="*i64", sums="*bf16")
    forward = dict(N=4 * D, K=D, B_K_STRIDE=1, B_N_STRIDE=D, BACKWARD=False, **candidates.RELU_SQUARED_TILE)
    backward = forward | dict(B_K_STRIDE=4 * D, B_N_STRIDE=1, BACKWARD=True)
    loss = dict(LOGITS=LOGITS, CAP=candidates.train.LOGIT_CAP, WITH_GRADIENTS=True, **candidates.HEAD_TILE)
    only_loss = loss | dict(WITH_GRADIENTS=False)
    print(json.dumps({
        "relu squared": figures(candidates.relu_squared_kernel, bf16, forward),
        "relu squared, backward": figures(candidates.relu_squared_kernel, bf16, backward),
        "head": figures(candidates.capped_cross_entropy_kernel, head, loss),
        "head without gradients": figures(candidates.capped_cross_entropy_kernel, head, only_loss),
        "table gradient": figures(candidates.row_sums_kernel, rows, dict(WIDTH=D, **candidates.ROW_SUMS_TILE)),
    }))


if __name__ == "__main__":
    main()
