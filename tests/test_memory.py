"""Freed memory stays with the process, where its C library can be told so."""

import subprocess
import sys

import pytest

FAULTS_OF_THE_SECOND = """
import ctypes, resource
from tarq_jax import memory
kept = memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(64 << 20))
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_a_second_buffer_has_the_pages_of_the_first():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_THE_SECOND], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert int(faults) < 100  # of the 16,384 pages that it has
