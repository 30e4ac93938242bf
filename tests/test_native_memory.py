"""Memory of the native kernels: what is freed is kept for the next call, and can be had back."""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import attlas
from attlas import masks
from attlas.kernels import native
from attlas.kernels.native import library

from .helpers import NATIVE
from .native_calls import Problem

pytestmark = list(NATIVE.marks)

MB = 1 << 20


def weights(size: int) -> torch.Tensor:
    """Memory for dense weights, in bytes."""
    return library.fresh("weights", (size,), torch.uint8)


@pytest.fixture(autouse=True)
def empty():
    attlas.empty_cache()
    yield
    attlas.empty_cache()


@pytest.mark.parametrize("size", [1, 8, 40, 100])
def test_freed_weights_are_kept_for_the_next(size):
    first = weights(size * MB).fill_(1)
    place = first.data_ptr()
    del first
    again = weights(size * MB)
    assert again.data_ptr() == place
    assert attlas.empty_cache() == 0  # it is in use


def test_what_is_alive_is_never_given_twice():
    alive = [weights(40 * MB) for _ in range(3)]
    for value, tensor in enumerate(alive):
        tensor.fill_(value)
    view, place = alive[1][MB:], alive[1].data_ptr()
    del alive[1], tensor
    other = weights(40 * MB).fill_(9)
    assert other.data_ptr() != place  # a view keeps it
    assert [int(t.max()) for t in (*alive, view)] == [0, 2, 1]


def test_memory_is_not_wasted_on_what_is_much_smaller():
    big = weights(200 * MB)
    place = big.data_ptr()
    del big
    assert weights(64 * MB).data_ptr() != place


def test_empty_cache_gives_everything_back():
    both = weights(40 * MB), weights(8 * MB)
    del both
    assert 48 * MB <= attlas.empty_cache() <= 52 * MB
    assert attlas.empty_cache() == 0


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="asks the system for its memory")
def test_no_more_than_an_eighth_of_the_memory_is_kept():
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8
    part = most // 3
    tensors = [weights(part) for _ in range(5)]  # not touched: addresses only
    places = [t.data_ptr() for t in tensors]
    while tensors:
        tensors.pop(0)
    again = weights(part)
    assert again.data_ptr() in places[2:]  # the last ones are kept
    assert 0 < attlas.empty_cache() <= most
    del again
    too_large = weights(most + 4 * MB)
    attlas.empty_cache()
    del too_large
    assert attlas.empty_cache() == 0


def test_tensors_in_kept_memory_are_as_any_other():
    tensor = library.fresh("weights", (1024, 512), torch.float32).normal_()
    assert pickle.loads(pickle.dumps(tensor)).equal(tensor)
    assert tensor.clone().equal(tensor)
    array = tensor.numpy()
    array[0, 0] = 7
    assert tensor[0, 0] == 7
    shared = tensor.clone().share_memory_()
    assert tensor.share_memory_().is_shared()
    assert tensor.equal(shared)


def test_threads_share_it():
    wrong = []

    def work(value: int) -> None:
        for step in range(50):
            tensor = weights((1 + step % 3) * MB).fill_(value)
            if int(tensor.min()) != value or int(tensor.max()) != value:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_cannot_be_had_is_refused():
    with pytest.raises(MemoryError, match=r"weights must fit into memory, got no .* use fewer"):
        weights(1 << 60)


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from attlas.kernels.native import library

library.FOLDER = Path(sys.argv[1])
library.fresh("weights", (600 << 20,), torch.uint8)  # freed at once: kept
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20),) * 2)
library.fresh("weights", (800 << 20,), torch.uint8).fill_(1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_is_kept_never_makes_a_call_fail():
    command = [sys.executable, "-c", LIMITED, str(library.FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


KEEPS_NOTHING = """
import resource, sys
from pathlib import Path
import torch
from attlas.kernels.native import library

library.FOLDER = Path(sys.argv[1])
library.fresh("weights", (300 << 20,), torch.uint8)  # freed at once: kept
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(getattr(resource, sys.argv[2]), (used + (400 << 20),) * 2)
library.fresh("weights", (200 << 20,), torch.uint8)
torch.empty(500 << 20, dtype=torch.uint8)  # which knows nothing of what is kept
print(library.release())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_nothing_is_kept_where_addresses_are_limited(limit):
    command = [sys.executable, "-c", KEEPS_NOTHING, str(library.FOLDER), limit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def flags(address: int) -> set[str]:
    """What the system knows of the memory at an address: see VmFlags in proc(5)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"nothing is at {address:x}")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("size", [8, 40])
def test_what_is_kept_is_left_out_of_core_dumps(size):
    tensor = weights(size * MB).fill_(1)
    place = tensor.data_ptr()
    ends = (place, place + size * MB - 1)
    assert all("dd" not in flags(end) for end in ends)
    del tensor
    assert all("dd" in flags(end) for end in ends)
    tensor = weights(size * MB)
    assert tensor.data_ptr() == place
    assert all("dd" not in flags(end) for end in ends)


LIMITS = """
#include "limits.h"
extern "C" int64_t limit(const char* list, const char* root) {
  return attlas::group_limit(list, root);
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are of Linux")
@pytest.mark.parametrize("version", [1, 2])
def test_the_least_limit_of_the_control_groups_counts(tmp_path, version):
    compiler = next((name for name in ("g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("no C++ compiler is here")
    (tmp_path / "limit.cpp").write_text(LIMITS)
    sources = ["-I", str(Path(native.__file__).parent), str(tmp_path / "limit.cpp")]
    made = tmp_path / "limit.so"
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", *sources, "-o", made], check=True)
    compiled = ctypes.CDLL(str(made))
    compiled.limit.restype = ctypes.c_int64
    files = tmp_path / "cgroup", tmp_path / "root"
    line = {1: "9:cpu:/elsewhere\n4:memory:/outer/inner\n0::/\n", 2: "0::/outer/inner\n"}[version]
    files[0].write_text(line)
    name = {1: "memory/{}/memory.limit_in_bytes", 2: "{}/memory.max"}[version]

    def put(group: str, limit: str) -> int:
        path = files[1] / name.format(group)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit + "\n")
        return compiled.limit(*(str(path).encode() for path in files))

    none = (1 << 63) - 1
    assert put(".", "max") == none
    assert put("outer/inner", "7000000") == 7000000
    assert put("outer", "5000000") == 5000000
    assert put("elsewhere", "1") == 5000000
    assert put("outer/inner", "max") == 5000000
    assert put(".", "4000000") == 4000000


FORKED = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from attlas.kernels.native import library

library.FOLDER = Path(sys.argv[1])
stop, until = threading.Event(), time.monotonic() + float(sys.argv[2])

def work():
    while not stop.is_set():
        library.fresh("weights", (2 << 20,), torch.uint8)

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
forks = hung = 0
while time.monotonic() < until and not hung:
    forks += 1
    child = os.fork()
    if child == 0:
        signal.alarm(5)  # ends a child that waits for a lock of its parent's threads
        library.fresh("weights", (2 << 20,), torch.uint8)
        os._exit(0)
    hung = os.waitpid(child, 0)[1]
stop.set()
print(forks, "forks, one ended by", hung)
sys.exit(hung != 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_busy_process_can_use_it():
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(library.FOLDER), "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dense_weights_in_used_memory_have_the_same_bits():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 1100, 16)
    mask = torch.rand(1100, 1100) < 0.5
    first = [t.clone() for t in attlas.scaled_dot_product_attention(q, k, v, mask)]
    weights(4 * 2 * 1100 * 1100).fill_(255)  # NaN, where the next will lie
    second = attlas.scaled_dot_product_attention(q, k, v, mask)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


# --- workspace, which is kept after a call and so can be weighed ----------------------------


def test_readouts_pack_a_few_heads_at_a_time():
    q, k, v = (torch.randn(1, 16, n, 64) for n in (600, 8192, 8192))
    weights = attlas.attention(q, k, v).weights
    for name, read in {
        "entropy": lambda w: w.entropy(),
        "product": lambda w: w @ v[:, : w.shape[1]],
        "pool": lambda w: w.pool(64, how="max"),
    }.items():
        attlas.empty_cache()
        found = read(weights)
        assert 4 * MB < attlas.empty_cache() < k.nbytes, name  # 4 heads of 16, keys and operand
        for head in (0, 5, 15):
            one = attlas.attention(q[:, head : head + 1], k[:, head : head + 1], v[:, :1]).weights
            if name != "product":
                assert read(one)[0, 0].equal(found[0, head]), (name, head)


def test_gradients_of_a_few_heads_are_summed_at_a_time():
    problem = Problem.of(
        *(torch.zeros(1, 40, n, 64) for n in (4096, 8192, 8192)),
        masks=[masks.padding(torch.tensor([0]))],  # nothing to compute
    )
    call, args = problem.call(), library.Backward()
    given = problem.forward(("output", "normaliser"))
    for name, tensor in (
        ("normaliser", "normaliser"),
        ("output", "output"),
        ("d_output", "output"),
    ):
        call.read(args, name, given[tensor])
    found = [call.write(args, name) for name in ("dq", "dk", "dv")]
    call.problem.num_threads, call.problem.parallel_for = 64, None
    attlas.empty_cache()
    call.run("backward", args)
    heads = attlas.empty_cache() / (4 * 8192 * 128 * 4)  # four partial sums of dK and dV each
    assert 16 < heads < 32, "16 heads give each of 64 threads a partial sum"
    assert all((gradient == 0).all() for gradient in found)
