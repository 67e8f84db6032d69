import os
import subprocess
import sys

from launch import process
from mi.training import host

CPUINFO = """processor : 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC
cpu MHz\t\t: {clock}
flags\t\t: fma avx avx2{features}

processor : 1
model name\t: the other core
"""


def test_cores_are_those_of_the_process_or_all_where_the_system_does_not_say(monkeypatch):
    assert host.get_cores() == sorted(os.sched_getaffinity(0))
    monkeypatch.delattr(os, 'sched_getaffinity')
    assert host.get_cores() == list(range(os.cpu_count()))


def test_a_member_starts_on_its_cores_and_without_pinning_on_macos(monkeypatch):
    code = 'import os; print(sorted(os.sched_getaffinity(0)))'
    core = host.get_cores()[-1]

    def print_cores():
        with process._pin_to_cores({core}):
            return subprocess.check_output([sys.executable, '-c', code], text=True).strip()

    assert print_cores() == f'[{core}]'
    assert core in host.get_cores() and len(host.get_cores()) == len(os.sched_getaffinity(0))
    everyone = str(host.get_cores())
    monkeypatch.delattr(os, 'sched_setaffinity')
    assert print_cores() == everyone


def test_only_the_model_and_the_features_tell_processors_apart(tmp_path, monkeypatch):
    hashes = []
    for clock, features in ((2400, ''), (3100.5, ''), (2400, ' avx512f')):
        monkeypatch.setattr(host, 'CPU_INFO', tmp_path / 'cpuinfo')
        host.CPU_INFO.write_text(CPUINFO.format(clock=clock, features=features))
        hashes.append(host.hash_processor())
    assert hashes[0] == hashes[1] != hashes[2]
    assert host._read_processor_name() == 'AMD EPYC'
    monkeypatch.setattr(host, 'CPU_INFO', tmp_path / 'none')  # as on macOS
    assert host.hash_processor() not in hashes
