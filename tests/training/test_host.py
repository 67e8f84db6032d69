import os
import subprocess
import sys

from launch import process
from mi.training import host


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
