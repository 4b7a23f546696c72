"""Every triton kernel compiles ahead of time for sm_80, sm_90 and sm_100, without a GPU; in bf16 nothing spills.

Signature and constants are those of a launch: pointers and sizes that are multiples of 16 are declared so, as Triton
finds them to be. `pytest -s` prints registers, spills and shared memory.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from models.attention.kernels import decode, dense, step  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Shared memory of a thread block at most, in bytes (CUDA programming guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
FP32 = {"lse_ptr", "delta_ptr", "lse_text_ptr"}
INTEGERS = {"start_ptr": "*i32", "end_ptr": "*i32", "document_end_ptr": "*i32"}
FLOATS = {"scale", "unscaled", "log2_e"}


def kernels(S: int, R: int, D: int) -> dict[str, tuple]:
    """Name → (kernel, constants, further fp32 pointers) for thoughts of S tokens, R query heads a group, head size D."""
    rows = dense.row_constants(S, R, D)
    return {
        "dense forward": (dense._forward, rows, set()),
        "dense backward, rows": (dense._backward_rows, rows, set()),
        "dense backward, text": (dense._backward_text, dense.text_constants(S, R, D), set()),
        "step": (step._private_keys, step.constants(R, D), set()),
        "decode, prefix": (decode._prefix, decode.constants(16 * R, R, D), {"out_ptr"}),
        "decode, suffix": (decode._suffix, decode.constants(R, R, D), {"out_text_ptr"}),
    }


def compiled(kernel, constants: dict[str, int], fp32: set[str], target: int, pointer: str = "*bf16"):
    options = {name: value for name, value in constants.items() if name.startswith("num_")}
    constexprs = {name: value for name, value in constants.items() if name not in options}

    def type_of(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name.endswith("_ptr"):
            return INTEGERS.get(name, "*fp32" if name in FP32 | fp32 else pointer)
        return "fp32" if name in FLOATS else "i32"

    signature = {name: type_of(name) for name in kernel.arg_names}
    aligned = [
        i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name in ("N", "thought_stride")
    ]
    source = ASTSource(kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(cubin: bytes, directory: Path) -> dict[str, int]:
    """Registers a thread, bytes of stack and local memory a thread: what is spilled lies there."""
    file = directory / "kernel.cubin"
    file.write_bytes(cubin)
    dump = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("name", kernels(12, 4, 64))
def test_compiles_without_spills(name, D, target, tmp_path):
    built = compiled(*kernels(S=12, R=4, D=D)[name], target)
    used, shared = resources(built.asm["cubin"], tmp_path), built.metadata.shared
    print(f"{name:22} D={D:3} sm_{target:<3} warps {built.metadata.num_warps} {used} shared {shared}")
    assert used["STACK"] == used["LOCAL"] == 0
    assert shared <= SHARED[target]
    if target == 90 and name.startswith("dense"):
        assert "wgmma" in built.asm["ptx"]
