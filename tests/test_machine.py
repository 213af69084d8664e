"""What Linux says of a machine, as values."""

from mxcompile import machine
from mxcompile.machine import Machine

FILES = {
    "/proc/cpuinfo": "processor : 0\nmodel name : A CPU\nmodel : 7\nflags : sse avx2 fma\n\n"
    "processor : 1\nflags : sse\n",
    "/proc/self/status": "Name:\tx\nCpus_allowed_list:\t0-1,4\n",
    "/sys/devices/system/cpu/cpu0/topology/thread_siblings_list": "0,4\n",
    "/sys/devices/system/cpu/cpu4/topology/thread_siblings_list": "0,4\n",
}


def described(files: dict[str, str]) -> Machine:
    return Machine.described(lambda path: files.get(path, ""))


def test_a_machine_is_described_by_its_files() -> None:
    found = described(FILES)
    assert found.features == {"sse", "avx2", "fma"}
    assert (found.cpus, found.cores) == ((0, 1, 4), 2)
    assert found.hardware.startswith("A CPU x3 ")


def test_arm_has_other_names() -> None:
    found = described({"/proc/cpuinfo": "Features : fp asimd\nCPU part : 0xd0b\n"})
    assert found.features == {"fp", "asimd"}
    assert found.hardware.startswith("0xd0b x1 ")


def test_other_features_make_other_hardware() -> None:
    other = {**FILES, "/proc/cpuinfo": FILES["/proc/cpuinfo"].replace("fma", "f16c")}
    assert described(other).hardware != described(FILES).hardware


def test_what_says_nothing_is_one_cpu_without_features() -> None:
    found = described({})
    assert (found.features, found.cpus, found.cores) == (frozenset(), (0,), 1)


def test_this_machine_describes_itself() -> None:
    assert machine.here() == machine.here()
    assert 1 <= machine.here().cores <= len(machine.here().cpus)
