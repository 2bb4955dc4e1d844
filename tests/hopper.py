"""Build Triton's kernels for an NVIDIA H100 or H200 that is not there, and see what the assembler says of them."""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple


class Built(NamedTuple):
    name: str
    spilled: int  # bytes of registers that are written to memory and read back
    shared: int  # bytes of a multiprocessor's shared memory, of which it has 232,448 for one program
    products: int  # instructions of the matrix unit
    copies: int  # of tiles that are read ahead


def run(script, folder):
    """What the `build` calls of a script saw; in a process of its own, since this one may interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": os.path.dirname(__file__)}
    path = folder / "building.py"
    path.write_text(script)
    said = subprocess.run([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return [Built(*json.loads(line)) for line in said.stdout.splitlines()]


def build(function, types, fixed, aligned=(), **options):
    """Print what the kernel with these types of its arguments and these fixed ones becomes.

    Args:
        function: of Triton.
        types: of each argument that is not fixed, such as "*fp32"; may name more than there are.
        fixed: the values of constants.
        aligned: arguments that are multiples of 16, as Triton sees pointers and most sizes of a call.
        options: num_warps and such.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: "constexpr" if name in fixed else types[name] for name in names}
    constants = {(names.index(name),): value for name, value in fixed.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in fixed}
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, GPUTarget("cuda", 90, 32), options=options)
    code = compiled.asm["ptx"]
    ptxas = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.ptx")
        path.write_text(code)
        command = [ptxas, "-v", "--gpu-name", "sm_90a", path, "-o", path.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    products = len(re.findall(r"wgmma\.mma_async|\bmma\.sync", code))
    copies = len(re.findall(r"cp\.async\.c[ag]", code))
    print(json.dumps([function.__name__, spilled, compiled.metadata.shared, products, copies]))
