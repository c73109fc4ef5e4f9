"""Heaps, and memory that was freed, with a C library that allows such settings: glibc."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

FAULTS = """
import ctypes, resource
from tarq_jax import memory
assert memory.keep_freed()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def use():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(64 << 20))
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
use()
use()
"""


RESIDENT_AFTER = """
import ctypes
from tarq_jax import memory
assert memory.keep_freed()
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
kept = used - resident()
print(kept, memory.give_back() and used - resident())
"""


HEAPS_OF_SIX_THREADS = """
import ctypes, threading
from tarq_jax import memory
assert memory.few_heaps()
libc, barrier = ctypes.CDLL(None), threading.Barrier(6)
libc.malloc.restype = ctypes.c_void_p
def use():
    barrier.wait()
    libc.malloc(1000)
    barrier.wait()
threads = [threading.Thread(target=use) for _ in range(6)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
"""


def output(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def printed(program):
    return [int(word) for word in output(program).split()]


def test_threads_share_two_heaps():
    assert output(HEAPS_OF_SIX_THREADS).count("<heap ") == 2
    assert output(HEAPS_OF_SIX_THREADS.replace("memory.few_heaps()", "True")).count("<heap ") == 7


def test_what_was_kept_is_given_back():
    kept, given = printed(RESIDENT_AFTER)
    assert kept < 8 and given >= 56  # MiB by which memory fell; 64 were in use


def test_a_second_buffer_has_the_pages_of_the_first():
    first, second = printed(FAULTS)
    assert first > 16_000 and second < 100  # of 16,384 pages
