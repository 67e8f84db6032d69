"""A Slurm of one node, this machine, with daemons and a key of its own; nothing of it stays."""

import contextlib
import fcntl
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time

import pytest

PROGRAMS = ('slurmctld', 'slurmd', 'munged', 'sbatch', 'srun', 'scontrol')
PACKAGES = ('slurmctld', 'slurmd', 'slurm-client', 'munge')
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def programs():
    """Skips the test where Slurm is not here.

    With MI_TEST_SLURM=install, as in CI, Debian's packages are installed; never otherwise.
    """
    if os.geteuid() != 0:
        pytest.skip('the daemons of Slurm have to be started by root')
    path = f'{os.environ["PATH"]}:/usr/sbin:/sbin'
    with open(pathlib.Path(tempfile.gettempdir()) / 'mi-test-slurm.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other workers of this test run may want the same
        if all(shutil.which(name, path=path) for name in PROGRAMS):
            return path
        if os.environ.get('MI_TEST_SLURM') != 'install':
            pytest.skip(f'no Slurm: apt-get install {" ".join(PACKAGES)}, or MI_TEST_SLURM=install')
        quiet = {'env': os.environ | {'DEBIAN_FRONTEND': 'noninteractive'}, 'check': True}
        subprocess.run(['apt-get', '-qq', 'update'], **quiet)
        install = ['apt-get', '-qq', 'install', '-y', '--no-install-recommends', *PACKAGES]
        subprocess.run(install, stdout=subprocess.DEVNULL, **quiet)
    return path


@contextlib.contextmanager
def slurm(folder: pathlib.Path):
    """Yields the environment in which its commands find it."""
    path = programs()
    (folder / 'munge.key').write_bytes(secrets.token_bytes(1024))
    (folder / 'munge.key').chmod(0o400)
    for name in ('state', 'spool'):
        (folder / name).mkdir()
    config = folder / 'slurm.conf'
    host = socket.gethostname().partition('.')[0]
    config.write_text(CONFIG.format(host=host, folder=folder, ports=[free_port(), free_port()]))
    environment = os.environ | {'SLURM_CONF': str(config), 'PATH': path}
    munged = ['munged', '--force', f'--key-file={folder}/munge.key']
    munged += [f'--{name}={folder}/munge.{name}' for name in ('socket',)]
    munged += [f'--{name}-file={folder}/munge.{name}' for name in ('pid', 'log', 'seed')]
    try:
        for daemon in (munged, ['slurmctld'], ['slurmd']):
            subprocess.run(daemon, check=True, env=environment)
        deadline = time.monotonic() + 60
        while 'idle' not in run(environment, 'sinfo', '--noheader', '--format=%T'):
            assert time.monotonic() < deadline, (folder / 'slurmctld.log').read_text()[-3000:]
            time.sleep(0.2)
        yield environment
        run(environment, 'scancel', '--me')
        while run(environment, 'squeue', '--noheader') and time.monotonic() < deadline + 120:
            time.sleep(0.2)
    finally:
        for name in ('slurmd.pid', 'slurmctld.pid', 'munge.pid'):
            if (folder / name).exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int((folder / name).read_text()), signal.SIGTERM)


def run(environment, *command):
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result.stdout.strip()


def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]
