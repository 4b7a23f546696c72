"""Every triton kernel compiles ahead of time for sm_80, sm_90 and sm_100, without a GPU; in bf16 nothing spills.

Signature and constants are those of a launch: pointers and sizes that are multiples of 16 are declared so, as Triton
finds them to be. `pytest -s` prints registers, spills and shared memory. Against another release of Triton than the
one installed:

    pip install --no-deps --target DIR 'triton==3.6.*' && PYTHONPATH=DIR pytest tests/models/test_triton_compiled.py
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from models import pointwise_kernels as pointwise  # noqa: E402
from models.attention.kernels import decode, dense, step  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Shared memory of a thread block at most, in bytes (CUDA programming guide, compute capabilities).
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes a thread, by release of Triton, kernel, S, R, D and target: here once a program, for its diagonal tile.
KNOWN_SPILLS = {(release, "dense backward, rows", 16, 1, 128, 80): n for release, n in (("3.6", 184), ("3.9", 688))}
FP32 = {"lse_ptr", "delta_ptr", "lse_text_ptr"}
INTEGERS = {"start_ptr": "*i32", "end_ptr": "*i32", "document_end_ptr": "*i32", "filled_ptr": "*i32"}
FLOATS = {"scale", "unscaled", "log2_e", "eps"}
# Kernel of a pointwise chain, constants, fp32 pointers.
CHAINS = {
    f"norm{what}, W={W}": (kernel, pointwise.norm_constants(W) | more, {"weight_ptr", "inverse_ptr", "partial_ptr"})
    for W in (16, 128, 576, 2048, pointwise.MAX_WIDTH)
    for what, kernel, more in (
        ("", pointwise._norm, {}),
        (" without gradient", pointwise._norm, {"inverse_ptr": None}),
        (" backward", pointwise._norm_backward, {}),
    )
} | {
    "rotate": (pointwise._rotate, pointwise.rotate_constants(14, 64) | {"BACK": False}, set()),
    "rotate backward": (pointwise._rotate, pointwise.rotate_constants(8, 128) | {"BACK": True}, set()),
    "gate": (pointwise._gate, pointwise.GATE_CONSTANTS, set()),
    "gate backward": (pointwise._gate_backward, pointwise.GATE_CONSTANTS, set()),
    "merge": (pointwise._merge, pointwise.merge_constants(128), {"lse_a_ptr", "lse_b_ptr"}),
}


def kernels(S: int, R: int, D: int) -> dict[str, tuple]:
    """Name → (kernel, constants, further fp32 pointers) for thoughts of S tokens, R queries a group, head size D."""
    return {
        "dense forward": (dense._forward, dense.row_constants(S, R, D), set()),
        "dense backward, rows": (dense._backward_rows, dense.row_constants(S, R, D), set()),
        "dense backward, text": (dense._backward_text, dense.text_constants(S, R, D), {"dk_text_ptr", "dv_text_ptr"}),
        "step": (step._private_keys, step.constants(R, D), set()),
        "decode, prefix": (decode._prefix, decode.constants(16 * R, R, D), {"out_ptr"}),
        "decode, suffix": (decode._suffix, decode.constants(S * R, R, D) | {"filled_ptr": None}, {"out_text_ptr"}),
        "decode, suffix, recorded": (decode._suffix, decode.constants(S * R, R, D), {"out_text_ptr"}),
    }


def compiled(kernel, constants: dict[str, int | None], fp32: set[str], target: int, pointer: str = "*bf16"):
    options = {name: value for name, value in constants.items() if name.startswith("num_")}
    constexprs = {name: value for name, value in constants.items() if name not in options}

    def type_of(name: str) -> str:
        if name in constexprs:
            return "constexpr"
        if name.endswith("_ptr"):
            return INTEGERS.get(name, "*fp32" if name in FP32 | fp32 else pointer)
        return "fp32" if name in FLOATS else "i32"

    signature = {name: type_of(name) for name in kernel.arg_names}
    sizes = ("N", "thought_stride", "numbers")
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name in sizes]
    source = ASTSource(kernel, signature, constexprs, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(cubin: bytes, directory: Path) -> dict[str, int]:
    """Registers a thread, bytes of stack and local memory a thread: what is spilled lies there."""
    file = directory / "kernel.cubin"
    file.write_bytes(cubin)
    dump = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump)}


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize(("S", "R", "D"), [(12, 4, 64), (12, 4, 128), (16, 1, 128)])
@pytest.mark.parametrize("name", kernels(12, 4, 64))
def test_compiles_without_spills(name, S, R, D, target, tmp_path):
    kernel, constants, fp32 = kernels(S, R, D)[name]
    built = compiled(kernel, constants, fp32, target)
    used, shared = resources(built.asm["cubin"], tmp_path), built.metadata.shared
    print(f"\n{name}, S={S} R={R} D={D}, sm_{target}, {constants['num_warps']} warps: {used} shared {shared}")
    assert used["STACK"] == KNOWN_SPILLS.get((triton.__version__[:3], name, S, R, D, target), 0)
    assert used["LOCAL"] == 0
    assert shared <= SHARED[target]
    if name.startswith("dense"):
        # The products are on the tensor cores, by each generation's own instruction.
        instruction = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[target]
        assert instruction in built.asm["ptx"]


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_compile_without_spills(name, target, tmp_path):
    kernel, constants, fp32 = CHAINS[name]
    built = compiled(kernel, constants, fp32, target)
    used = resources(built.asm["cubin"], tmp_path)
    print(f"\n{name}, sm_{target}, {constants['num_warps']} warps: {used} shared {built.metadata.shared}")
    assert used["STACK"] == used["LOCAL"] == 0
    # Rows of a whole number of 16 bytes are read and written 16 bytes at a time.
    assert "ld.global.v4.b32" in built.asm["ptx"] and "st.global.v4.b32" in built.asm["ptx"]


def test_a_spill_is_noticed(tmp_path):
    """The negative control: half the warps for twice the rows."""
    kernel, constants, fp32 = kernels(12, 4, 128)["dense backward, text"]
    built = compiled(kernel, constants | {"num_warps": 4, "ROWS": 64}, fp32, 90)
    assert resources(built.asm["cubin"], tmp_path)["STACK"] > 0


@pytest.mark.parametrize("name", kernels(12, 4, 64))
def test_compiles_in_fp32(name, tmp_path):
    kernel, constants, fp32 = kernels(5, 3, 64)[name]
    built = compiled(kernel, constants, fp32, 90, pointer="*fp32")
    assert built.metadata.shared <= SHARED[90]
    assert "tf32" not in built.asm["ptx"]
