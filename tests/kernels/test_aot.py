"""Kernels compiled without a GPU, in a process where Triton compiles instead of interpreting."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

TARGETS = ("sm_80", "sm_87", "sm_90", "sm_110", "sm_120")
OTHERS = ("temporal_int8_w16", "merge_fp16_split4", "prefill_fp16_w16", "prefill_write_fp16_w16")
OTHERS += ("decode_fp16_t1", "residual_norm_fp16", "residual_rms_norm_fp16", "rotary_fp16")
OTHERS += ("block_linear_w8_b128_fp16_t1", "block_linear_w4_b32_fp16_t64", "sum_fp16_split2", "widen_w4_b64_fp16")
STEP = ("temporal_fp16_w16", "block_linear_w4_b64_fp16_t1")  # of a frame and of a token
COMPILE = """
import sys
from framestep.kernels.aot import main
step = ["-o", sys.argv[1], "--kernel", "temporal_fp16_w16", "--kernel", "block_linear_w4_b64_fp16_t1"]
try:
    main(step)
except Exception as error:
    if "'sm_110a' is not defined" not in str(error):  # the assembler of Triton 3.6 is older than the GPU
        raise
    main([*step, "--target", "sm_120"])
main(["-o", sys.argv[1], "--target", "sm_90", *(part for name in sys.argv[2:] for part in ("--kernel", name))])
"""


def run(*words, **more):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | more
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The step's kernel for every target, and each kind of kernel for sm_90."""
    folder = tmp_path_factory.mktemp("aot")
    done = run("-c", COMPILE, folder, *OTHERS)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", STEP)
@pytest.mark.parametrize("target", TARGETS)
def test_the_step_kernels_compile_for_every_target_without_spilling(compiled, target, name):
    place = compiled / target
    if not (place / f"{name}.json").exists() and target == "sm_110":
        pytest.skip("this Triton does not know the target")
    found = json.loads((place / f"{name}.json").read_text())
    assert (place / f"{name}.cubin").read_bytes()[:4] == b"\x7fELF"
    text = (place / f"{name}.ptx").read_text()
    assert f".target {target}" in text
    assert f".entry {found['entry']}(" in text
    assert found["spill_bytes"] == 0
    assert (
        0 < found["registers"] <= (128 if name.startswith("temporal") else 168)
    )  # three or four programs side by side
    assert found["threads"] == 32 * found["warps"]
    parameters = text[: text.index(")", text.index(".entry"))].count(".param")
    assert parameters == len(found["arguments"]) + found["scratch_arguments"]


def test_the_step_kernel_loads_16_bytes_at_a_time_and_far_ahead(compiled):
    text = (compiled / "sm_90" / "temporal_fp16_w16.ptx").read_text()
    assert text.count("cp.async.cg.shared.global") >= 2 * 16  # two tiles of eight keys and eight values
    assert "ld.global.b16" not in text


def test_an_int8_ring_is_rounded_as_the_reference_rounds_it(compiled):
    text = (compiled / "sm_90" / "temporal_int8_w16.ptx").read_text()
    half = "0f3F000000"
    assert re.search(rf"\badd\S*\s[^;]*{half};", text)
    assert not re.search(rf"\bfma\S*\s[^;]*{half};", text)  # rounds once where the product and the sum round twice


def test_a_decoder_fetches_two_tiles_of_keys_and_values_ahead(compiled):
    text = (compiled / "sm_90" / "decode_fp16_t1.ptx").read_text()
    a_tile = 2 * 64 * 64 * 2 // (4 * 32 * 16)  # loads of 16 bytes by each of the threads of four warps
    assert text.count("cp.async.cg.shared.global") >= 3 * a_tile  # two before the loop, and one in it


def test_weights_come_16_bytes_at_a_time_far_ahead_and_are_not_converted_one_by_one(compiled):
    text = (compiled / "sm_90" / "block_linear_w4_b64_fp16_t1.ptx").read_text()
    a_tile = 8 * 64 * 32 // (4 * 32 * 16)  # loads of 16 bytes by each of the threads of four warps
    assert text.count("cp.async.cg.shared.global") >= 3 * a_tile
    pairs = 8 * 64 * 64 // (4 * 32 * 2)  # of a thread's weights in a tile
    assert text.count("fma.rn.f16x2") == pairs
    assert not re.search(r"cvt\S*\.f16\.[su](8|16|32)", text)


def test_a_prefill_of_16_frames_is_the_work_of_one_warp(compiled):
    assert json.loads((compiled / "sm_90" / "prefill_fp16_w16.json").read_text())["warps"] == 1


def test_every_kind_of_kernel_compiles(compiled):
    names = {file.stem for file in (compiled / "sm_90").glob("*.cubin")}
    assert names >= {"temporal_int8_w16", "merge_fp16_split4", "prefill_fp16_w16", "decode_fp16_t1"}
    for file in (compiled / "sm_90").glob("*.json"):
        assert json.loads(file.read_text())["spill_bytes"] <= 16, file


def test_interpreted_kernels_cannot_be_compiled_and_it_says_so(tmp_path):
    done = run("-m", "framestep.kernels.aot", "-o", tmp_path, "--target", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode != 0
    assert "TRITON_INTERPRET is set" in done.stderr
