"""Freed memory stays with the process if its C library, glibc, allows such a setting."""

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


RESIDENT_AFTER = """
import ctypes
from tarq_jax import memory
kept = memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc.argtypes = [ctypes.c_size_t]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
blocks = [libc.malloc(8 << 20) for _ in range(8)]
for block in blocks:
    ctypes.memset(block, 1, 8 << 20)
used = resident()
for block in blocks:
    libc.free(block)
kept = kept and used - resident()
print(kept, memory.give_back() and used - resident())
"""


def test_what_was_kept_is_given_back():
    done = subprocess.run([sys.executable, "-c", RESIDENT_AFTER], capture_output=True, text=True, check=True)
    kept, given = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert int(kept) < 8 and int(given) >= 56  # MiB by which memory fell; 64 were in use


def test_a_second_buffer_has_the_pages_of_the_first():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS_OF_THE_SECOND], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert int(faults) < 100  # out of its 16,384 pages
