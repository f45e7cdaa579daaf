"""Compiles the kernels of the fast paths for an H100, at full size, without one: python tests/kernels_for_h100.py

Prints, as JSON, for each kernel the bytes of shared memory it needs, the registers of a thread, the bytes of those that are spilled, and
whether its matrix products are by Hopper's instruction for them. TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

import train_gpt_medium as train  # noqa: E402

D, LOGITS = 1024, 50304
H100 = GPUTarget("cuda", 90, 32)


def figures(kernel, types, constants):
    """Of one kernel, whose pointers are aligned to 16 bytes as PyTorch's are."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=H100, options=options)
    said = assemble(compiled.asm["ptx"])
    return dict(shared=compiled.metadata.shared, registers=int(re.search(r"Used (\d+) registers", said)[1]),
                spilled=sum(map(int, re.findall(r"(\d+) bytes spill", said))), wgmma="wgmma" in compiled.asm["ptx"])


def assemble(ptx):
    """What the assembler in Triton's package says of a program: of the assemblers, whichever knows this version of PTX."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        errors = []
        for assembler in sorted((Path(triton.__file__).parent / "backends/nvidia/bin").glob("ptxas*")):
            result = subprocess.run([assembler, "-v", "--gpu-name=sm_90a", file.name, "-o", "/dev/null"], capture_output=True, text=True)
            if result.returncode == 0:
                return result.stderr
            errors.append(result.stderr)
    raise RuntimeError("".join(errors))


def main():
    bf16 = dict(a="*bf16", b="*bf16", squares="*bf16", out="*bf16")
    head = dict(z="*bf16", targets="*i64", losses="*fp32", gradient_scale="fp32")
    rows = dict(rows="*bf16", ids="*i32", order="*i64", starts="*i64", count="*i64", sums="*bf16")
    product = dict(N=4 * D, K=D, **train.RELU_SQUARED_TILE)
    loss = dict(LOGITS=LOGITS, CAP=train.LOGIT_CAP, **train.HEAD_TILE)
    print(json.dumps({
        "relu squared": figures(train.relu_squared_kernel, bf16, product | dict(B_K_STRIDE=1, B_N_STRIDE=D, BACKWARD=False)),
        "relu squared, backward": figures(train.relu_squared_kernel, bf16, product | dict(B_K_STRIDE=4 * D, B_N_STRIDE=1, BACKWARD=True)),
        "head": figures(train.capped_cross_entropy_kernel, head, loss | dict(WITH_GRADIENTS=True)),
        "head without gradients": figures(train.capped_cross_entropy_kernel, head, loss | dict(WITH_GRADIENTS=False)),
        "table gradient": figures(train.row_sums_kernel, rows, dict(WIDTH=D, **train.ROW_SUMS_TILE)),
    }))


if __name__ == "__main__":
    main()
