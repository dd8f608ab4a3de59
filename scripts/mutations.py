"""Breaks each kernel and each operator in one line, in turn, and lists which test goes red.

    python scripts/mutations.py [WORDS]

Works on a copy of the tree, built for two instruction sets without much optimisation, for a quarter of an hour or so.
Prints one line a mutation and exits with 1 where one survives. WORDS: only those with such a word in their name.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lookupffn import native

ROOT = Path(__file__).parents[1]


class Mutation(NamedTuple):
    name: str  # of the kernel or operator
    file: str
    old: str  # must stand there once
    new: str
    tests: str  # program of the C++ tests, or arguments of pytest


KERNELS, PROBE = "kernel_tests", "probe_tests"
TRAINING, OPS = "tests/test_ops_native.py", "tests/test_ops.py"
CALLS = "tests/runtime/test_calls.py"
FORMAT, PORTABLE = "tests/runtime/test_format.py", "tests/runtime/test_format.py"
PROJECT, HASH, GATHER = (f"csrc/kernels/{name}-inl.h" for name in ("project", "hash", "gather"))
TRAIN, RUN = "csrc/kernels/training-inl.h", "csrc/model/lookup.cpp"

MUTATIONS = [
    # ---- kernels of inference
    Mutation("multiply_i8", PROJECT, "kActivationOffset ? load(offsets)", "kActivationOffset ? zero_i32()", KERNELS),
    Mutation("multiply_i8, panels", PROJECT, "(panel - p % group) * words + p % group)", "panel * words)", KERNELS),
    Mutation("multiply_i8 on tiles", PROJECT, "Tiles::load<1>(w + 64, kWord)", "Tiles::load<1>(w, kWord)", KERNELS),
    Mutation("project, float32", PROJECT, "product.x_bytes = 4 * (stage ?", "product.x_bytes = 4 * (!stage ?", KERNELS),
    Mutation("project, scales", PROJECT, "before ? before[t] * of_token.unit", "before ? of_token.unit", KERNELS),
    Mutation("project, x in bfloat16", PROJECT, "(uint32_t)row[i] << 16", "(uint32_t)row[i] << 15", KERNELS),
    Mutation("project, residual", PROJECT, "mul(load(x + i), scale_x)", "load(x + i)", KERNELS),
    Mutation("project, butterflies", PROJECT, "v[j + h] = sub(a, b);", "v[j + h] = sub(b, a);", KERNELS),
    Mutation(
        "project, int16", PROJECT, "store_16(out + 2 * i, integers(i))", "store_16(out + 2 * i, integers(0))", KERNELS
    ),
    Mutation("hash, codes", HASH, "select(less(zero, v[j]), bit", "select(less(v[j], zero), bit", KERNELS),
    Mutation("hash, scores", HASH, "product = mul(product, add(one,", "product = mul(product, add(zero,", KERNELS),
    Mutation("hash, second bucket", HASH, "sub(total, add(cost, cost))", "sub(total, cost)", KERNELS),
    Mutation(
        "hash, order of flips", HASH, "smaller[k] = less(m, least[k]);", "smaller[k] = less(least[k], m);", KERNELS
    ),
    Mutation("hash, fourth bucket", HASH, "third = less(least[2], pair)", "third = less(pair, least[2])", KERNELS),
    Mutation("exp_minus_2", "csrc/kernels/math-inl.h", "0.2402210749f", "0.2402310749f", KERNELS),
    Mutation(
        "quantise_scores",
        HASH,
        "round_to_int(abs(mul(load(a.scores + slot), factor)))",
        "round_to_int(mul(load(a.scores + slot), factor))",
        KERNELS,
    ),
    Mutation("quantise_scores, negated rows", HASH, "bit_or(code, negated), code)", "code, code)", KERNELS),
    Mutation(
        "prefetch_rows",
        GATHER,
        "tables + t * table_bytes + code[t] * row_bytes + line",
        "tables + t * table_bytes + code[t] * row_bytes",
        "tests/lab/hardware/test_work.py",
    ),
    Mutation("gather, int8", GATHER, "row2 = table + 2 * table_bytes", "row2 = table + 3 * table_bytes", KERNELS),
    Mutation(
        "gather, int8, last tables",
        GATHER,
        "t + k < tables ? table + k * table_bytes",
        "t + k < tables ? table + 0 * table_bytes",
        KERNELS,
    ),
    Mutation(
        "gather, bfloat16", GATHER, "sum[i + 1] = fma(s, high_bf16(pair)", "sum[i + 1] = fma(s, low_bf16(pair)", KERNELS
    ),
    Mutation("gather, blocks of tables", GATHER, "starts ? RowType::zero()", "true ? RowType::zero()", KERNELS),
    Mutation(
        "gather, last slice", GATHER, "left = a.out_features - first;", "left = a.out_features - first + 1;", KERNELS
    ),
    Mutation(
        "gather, bias",
        GATHER,
        "(whole ? row : out) + 16 * i, add(sum[i], load(a.bias + first + 16 * i))",
        "(whole ? row : out) + 16 * i, sum[i]",
        KERNELS,
    ),
    # ---- the plan, the layer, dispatch
    Mutation("workspace", RUN, "p.thread_bytes = std::max(", "p.thread_bytes = std::min(", KERNELS),
    Mutation(
        "workspace, shared",
        RUN,
        "memory.take<uint16_t>(p.chunk * l.slots())",
        "memory.take<uint16_t>(p.chunk)",
        KERNELS,
    ),
    Mutation(
        "shares of tokens",
        "csrc/ops/threads.h",
        "std::min(units, (i + 1) * share)",
        "std::min(units, (i + 1) * share) - (i > 0)",
        KERNELS,
    ),
    Mutation("chunks", RUN, ".y_token = start,", ".y_token = 0,", KERNELS),
    Mutation("floating-point state", RUN, "_mm_setcsr(0x9fc0)", "_mm_setcsr(0x1f80)", CALLS),
    Mutation("early prefetches, codes", RUN, "hashed = ready;", "hashed = 0;", "tests/lab/hardware/test_work.py"),
    Mutation("open_layer", "csrc/model/layer.cpp", "if (position != bytes)", "if (false)", KERNELS),
    Mutation("check_levels", "csrc/model/layer.cpp", "p.levels[i] <= most", "true", KERNELS),
    Mutation(
        "opened again",
        "csrc/bindings/torch_ops.cpp",
        "std::memcmp(data, &e.layer.h, sizeof(PackedHeader)) == 0",
        "true",
        CALLS,
    ),
    Mutation("isa_index", "csrc/kernels/isas.cpp", "if (!name.empty()) return find(name);", "", KERNELS),
    # ---- kernels of training
    Mutation(
        "hash_rows",
        TRAIN,
        "scores[i * a.reads + n] = score[16 * n + i];",
        "scores[i * a.reads + n] = score[i];",
        TRAINING,
    ),
    Mutation(
        "hash_rows_backward", TRAIN, "slope = add(slope, add(score, score));", "slope = add(slope, score);", TRAINING
    ),
    Mutation("pack_slice", TRAIN, "for (int i = left; i < kTrainSlice; i++) to[i] = 0.0f;", "", TRAINING),
    Mutation("pack_rows", TRAIN, "a.to + (size_t)a.rows[i] * kTrainSlice", "a.to + (size_t)i * kTrainSlice", TRAINING),
    Mutation(
        "unpack_slice", TRAIN, "if (!whole) __builtin_memcpy(out, narrow, sizeof(uint16_t) * left);", "", TRAINING
    ),
    Mutation(
        "transpose_words",
        TRAIN,
        "to + j * to_stride + i, from + i * from_stride + j",
        "to + j * to_stride + i, from + i * from_stride",
        TRAINING,
    ),
    Mutation("gather_slice", TRAIN, "a.starts ? zero_f32()", "true ? zero_f32()", TRAINING),
    Mutation(
        "gather_token",
        TRAIN,
        "gather_outputs<1, kBFloat16>(a, a.width - 16)",
        "gather_outputs<1, kBFloat16>(a, e)",
        TRAINING,
    ),
    Mutation(
        "scatter_slice",
        TRAIN,
        "store(sum + 16 * i, fma(s, gi, load(sum + 16 * i)))",
        "store(sum + 16 * i, mul(s, gi))",
        TRAINING,
    ),
    Mutation(
        "gather backward, few tokens",
        "csrc/ops/training.cpp",
        "const bool few = r.tokens * r.reads < t.rows;",
        "const bool few = true;",
        TRAINING,
    ),
    Mutation(
        "find_bad_code",
        "csrc/ops/training.cpp",
        "bad |= uint32_t(codes[i]) >= most;",
        "bad |= uint32_t(codes[i]) > most;",
        TRAINING,
    ),
    # ---- the probe
    Mutation("read_lines", "csrc/lab/probe-inl.h", "return reduce_max(bit_xor(a, b));", "return reduce_max(a);", PROBE),
    Mutation("read_stream", "csrc/lab/probe-inl.h", "(size_t)(i + k) * 64", "(size_t)i * 64", PROBE),
    # ---- operators in PyTorch
    Mutation("ops.bh4", "lookupffn/ops.py", ".add_(stages.x, alpha=1 - decay)", ".add_(stages.x, alpha=decay)", OPS),
    Mutation(
        "ops.bh4 as a matrix",
        "lookupffn/ops.py",
        "return x @ _bh4_matrix(weight, decay, x.dtype)[: x.shape[1], :out_features]",
        "return x @ _bh4_matrix(weight, 1.0, x.dtype)[: x.shape[1], :out_features]",
        OPS,
    ),
    Mutation(
        "ops.bh4 backward",
        "lookupffn/ops.py",
        "grad_x = grad.sum(0) * (1 - decay)",
        "grad_x = grad.sum(0) * decay",
        OPS,
    ),
    Mutation("ops.hash_codes", "lookupffn/ops.py", "costs[3] = torch.minimum(costs[3], pair)", "costs[3] = pair", OPS),
    Mutation(
        "ops.hash_codes backward", "lookupffn/ops.py", "constant[..., None] - correction", "constant[..., None]", OPS
    ),
    Mutation(
        "ops.gather",
        "lookupffn/ops.py",
        "first_row = torch.arange(num_tables, device=tables.device)[:, None] * num_rows",
        "first_row = 0 * torch.arange(num_tables, device=tables.device)[:, None]",
        OPS,
    ),
    # ---- the packed form
    Mutation(
        "encode, tables",
        "lookupffn/runtime/format.py",
        "tables.abs().amax((1, 2)) / 127",
        "tables.abs().amax((1, 2)) / 128",
        FORMAT,
    ),
    Mutation("encode, offsets", "lookupffn/runtime/format.py", "torch.int32) * -128", "torch.int32) * -127", FORMAT),
    Mutation(
        "portable projection",
        "lookupffn/runtime/portable.py",
        "torch.stack([a + b, a - b], 2)",
        "torch.stack([a + b, b - a], 2)",
        PORTABLE,
    ),
]


def run(command: list[str], folder: Path, **more) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, **more)


def build(copy: Path, tests: str) -> str:
    """Builds what these tests of the copy run; returns the errors, if any."""
    libraries = ["lookupffn_kernels", "lookupffn_lab"] if "lab" in tests else ["lookupffn_kernels"]
    targets = [tests] if tests.endswith("_tests") else libraries
    done = run(["cmake", "--build", "build", "--target", *targets], copy)
    if done.returncode:
        return " ".join(line for line in done.stdout.splitlines() if "error" in line)[:300] or done.stderr[:300]
    for library in (copy / "build").glob("*lookupffn_*.so"):
        shutil.copy(library, copy / "lookupffn")
    return ""


def reduce_build(copy: Path) -> None:
    """Loops without optimisation, for the scalar instruction set and the one in use: a build in seconds."""
    kept = {"scalar", native.implementation()}
    lists, header, source = copy / "CMakeLists.txt", copy / "csrc/kernels/isas.h", copy / "csrc/kernels/isas.cpp"
    text = lists.read_text().replace("-O3", "-O1").replace("-O2;-fno-gcse", "-O1")
    for isa in [i["name"] for i in native.implementations() if i["name"] not in kept]:
        text = re.sub(rf"(set\(ISAS .*?) {isa}\b", r"\1", text)
        header.write_text(header.read_text().replace(f"X({isa})", ""))
        source.write_text(re.sub(rf'\n *{{"{isa}",[^}}]*}},', "", source.read_text()))
    lists.write_text(text)


# The checkout's own package is out of the way of the copy's.
PYTEST = """
import sys
sys.meta_path = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
sys.path.insert(0, ".")
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def first_failure(copy: Path, tests: str) -> str:
    """Which test fails, or nothing."""
    if tests.endswith("_tests"):
        done = run([f"build/{tests}"], copy)
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        return failed[0] if failed else "" if not done.returncode else f"exit code {done.returncode}"
    done = run([sys.executable, "-c", PYTEST, "-q", "-x", "-p", "no:cacheprovider", *tests.split()], copy)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else "" if not done.returncode else f"exit code {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of the names of mutations to run")
    words = parser.parse_args().words
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        files = run(["git", "ls-files", "-co", "--exclude-standard"], ROOT, check=True).stdout.splitlines()
        for name in files:
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        reduce_build(copy)
        options = ["-DLOOKUPFFN_TESTS=ON", f"-DPython_EXECUTABLE={sys.executable}", "-GNinja"]
        run(["cmake", "-S", ".", "-B", "build", *options], copy, check=True)
        run(["cmake", "--build", "build", "--target", "lookupffn_kernels"], copy, check=True)
        for m in MUTATIONS:
            if words and not any(word in m.name for word in words):
                continue
            path = copy / m.file
            source = path.read_text()
            if source.count(m.old) != 1:
                raise SystemExit(f"{m.name}: {m.old!r} stands {source.count(m.old)} times in {m.file}")
            path.write_text(source.replace(m.old, m.new))
            wrong = build(copy, m.tests)
            found = f"does not compile: {wrong}" if wrong else first_failure(copy, m.tests)
            survivors += not found or bool(wrong)
            print(
                f"{'SURVIVES' if not found else 'BROKEN  ' if wrong else 'red     '}  {m.name:32}  {found}", flush=True
            )
            path.write_text(source)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
