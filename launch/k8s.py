"""Print a JobSet in YAML for each unfinished member of a sweep, to run it on Kubernetes.

    python -m launch.k8s --sweep=experiments/lm_fusion.py --workdir=/runs/lm_fusion \\
        --image=registry.example/mi:1 --claim=runs --gpus=8 --processes=2 --retries=3 \\
        | kubectl apply -f -
    python -m launch.k8s … --tpu=tpu-v5-lite-podslice --topology=4x4

The cluster needs the JobSet controller (jobset.x-k8s.io/v1alpha2), an image with the repository as
its working directory, and a volume at `--mount` that all pods can write to and that contains the
sweep directory. Run this command where the volume is mounted at the same path, so that it can skip
finished members and `launch.status` works. A TPU slice determines the number of hosts of a member
and the chips of each host (`launch.tpu`). If GKE offers a slice with hosts of several sizes, --gpus
selects one.

A pod that is evicted or preempted, or exits with 143 because it saved, is restarted as long as it
makes progress (`launch.restarts`, which the containers run). A pod that fails is restarted up to
--retries times. All processes of a member restart together and resume from the checkpoint.

If you repeat the command, it leaves out members that are finished or running. A member that has
failed for good gets a JobSet with a new name, because Kubernetes ignores a known JobSet and rejects
a changed one. Before you change the options of members that have not begun, remove old JobSets with
`kubectl delete jobset --selector=sweep=…`.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import sys
from typing import Any

import yaml
from absl import flags

from launch import restarts, state, tpu
from launch.devices import Devices
from launch.engine import QUEUED, Commands, Resources, States
from mi.config import UserError
from mi.training.run_state import PREEMPTED, read_run_state

IMAGE = flags.DEFINE_string(
    'image', None, 'Container image with the repository as working directory.'
)
CLAIM = flags.DEFINE_string('claim', None, 'PersistentVolumeClaim with the sweep directory.')
MOUNT = flags.DEFINE_string('mount', '/runs', 'Path of the claim in the containers.')
TPU = flags.DEFINE_string('tpu', '', "Kind of TPU on GKE, such as 'tpu-v5-lite-podslice'.")
TOPOLOGY = flags.DEFINE_string('topology', '', "Topology of a member's TPU slice, such as '4x4'.")
MEMORY = flags.DEFINE_string('memory', '', "Memory of each process, such as '64Gi'.")
NAMESPACE = flags.DEFINE_string('namespace', '', "Namespace; '' for that of kubectl.")

PORT = 8476  # the first process of a member listens here
GRACE_PERIOD = 120  # seconds that a pod has to save after SIGTERM


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the pods, with the same names as the flags."""

    image: str | None = None
    claim: str | None = None
    mount: str = '/runs'
    tpu: str = ''
    topology: str = ''
    memory: str = ''
    namespace: str = ''


def make_jobset(
    run_dir: pathlib.Path, command: list[str], resources: Resources, options: Options
) -> dict[str, Any]:
    """Return a member's JobSet, which has one job with a pod for each process."""
    jobset_name = make_dns_name(run_dir.parent.name, run_dir.name, *identify_failure(run_dir))
    pod_spec = _make_pod(run_dir, command, jobset_name, resources, options)

    # A job that its pod failure policy ends was preempted; JobSet counts only the other failures.
    preemption_rules = [
        {'action': 'FailJob', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]},
        {'action': 'FailJob', 'onExitCodes': {'operator': 'In', 'values': [PREEMPTED]}},
    ]
    job_spec = {
        'parallelism': resources.processes,
        'completions': resources.processes,
        'completionMode': 'Indexed',
        'backoffLimit': 0,
        'podFailurePolicy': {'rules': preemption_rules},
        'template': {'spec': pod_spec},
    }
    failure_policy = {
        'maxRestarts': resources.retries,
        'rules': [
            {
                'name': 'preempted',
                'action': 'RestartJobSetAndIgnoreMaxRestarts',
                'onJobFailureReasons': ['PodFailurePolicy'],
            }
        ],
    }

    # Label the JobSet with its sweep, and give a member its TPU slice alone.
    metadata: dict[str, Any] = {
        'name': jobset_name,
        'labels': {'sweep': make_dns_name(run_dir.parent.name)},
    }
    if options.namespace:
        metadata['namespace'] = options.namespace
    if options.tpu:  # a slice is one node pool
        node_pool = 'cloud.google.com/gke-nodepool'
        metadata['annotations'] = {'alpha.jobset.sigs.k8s.io/exclusive-topology': node_pool}
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        'metadata': metadata,
        'spec': {
            'network': {'enableDNSHostnames': True, 'subdomain': jobset_name},
            'failurePolicy': failure_policy,
            'replicatedJobs': [{'name': 'run', 'replicas': 1, 'template': {'spec': job_spec}}],
        },
    }


def _make_pod(
    run_dir: pathlib.Path,
    command: list[str],
    jobset_name: str,
    resources: Resources,
    options: Options,
) -> dict[str, Any]:
    """Return the specification of a member's pods.

    Args:
      run_dir: directory of the member.
      command: command of the member.
      jobset_name: name of the JobSet.
      resources: resources of each member.
      options: options of the pods.
    """
    # Run the command under the rules for restarts.
    arguments = ['python', '-m', 'launch.restarts', str(run_dir), '--', 'python', *command[1:]]
    if resources.processes > 1:
        # Kubernetes substitutes the variable. The name of the first pod is known in advance.
        address = f'{jobset_name}-run-0-0.{jobset_name}:{PORT}'
        peers = f'{address},{resources.processes},$(JOB_COMPLETION_INDEX)'
        arguments.append(f'--distributed={"auto" if options.tpu else peers}')

    # Ask for cores, memory and accelerators.
    limits: dict[str, Any] = {}
    if resources.cores:
        limits['cpu'] = str(resources.cores)
    if options.memory:
        limits['memory'] = options.memory
    if resources.gpus:
        limits['google.com/tpu' if options.tpu else 'nvidia.com/gpu'] = str(resources.gpus)

    pod_spec: dict[str, Any] = {
        'restartPolicy': 'Never',
        'terminationGracePeriodSeconds': GRACE_PERIOD,
        'containers': [
            {
                'name': 'member',
                'image': options.image,
                'command': arguments,
                'env': [{'name': 'PYTHONUNBUFFERED', 'value': '1'}],
                'resources': {'limits': limits, 'requests': limits},
                'volumeMounts': [{'name': 'runs', 'mountPath': options.mount}],
            }
        ],
        'volumes': [{'name': 'runs', 'persistentVolumeClaim': {'claimName': options.claim}}],
    }
    if options.tpu:
        pod_spec['nodeSelector'] = {
            'cloud.google.com/gke-tpu-accelerator': options.tpu,
            'cloud.google.com/gke-tpu-topology': options.topology,
        }
    return pod_spec


def identify_failure(run_dir: pathlib.Path) -> list[str]:
    """Return strings that identify the last failure of a member, or [] if it has not failed.

    They come from files written by the processes of the member, so that the same failure always
    gives the same name.
    """
    if read_run_state(run_dir).phase not in ('failed', 'died'):
        return []
    run_status = state.read_status(run_dir)
    failure_facts = [
        restarts.count_failures(run_dir),
        *map(run_status.get, ('pid', 'host', 'updated')),
    ]
    return [json.dumps(failure_facts)]


def make_dns_name(*parts: str, max_length: int = 40) -> str:
    """Join parts into a name that Kubernetes accepts. Different parts give different names."""
    plain_name = re.sub(r'[^a-z0-9]+', '-', '-'.join(parts).lower()).strip('-')
    digest = hashlib.sha256('/'.join(parts).encode()).hexdigest()[:8]
    prefix = '' if plain_name[:1].isalpha() else 's-'
    return f'{prefix}{plain_name[: max_length - 11].strip("-")}-{digest}'


def make_manifests(
    commands: Commands, resources: Resources, options: Options
) -> list[dict[str, Any]]:
    """Return the JobSets of a sweep.

    Raises:
      UserError: if an option is missing, the sweep directory is not on the volume, or the number of
        simultaneous members is given.
    """
    if resources.parallel:
        raise UserError(
            f'--parallel={resources.parallel}: expected 0, because Kubernetes schedules all '
            f'JobSets. Try a quota of the namespace, or Kueue'
        )
    if not options.image or not options.claim:
        raise UserError(
            '--image=IMAGE and --claim=NAME of a PersistentVolumeClaim are both required'
        )
    if tpu_slice := find_slice(resources, options):
        resources = dataclasses.replace(
            resources, processes=tpu_slice.hosts, gpus=tpu_slice.chips_per_host
        )
    outside_dirs = [run_dir for run_dir in commands if not run_dir.is_relative_to(options.mount)]
    if outside_dirs:
        raise UserError(
            f'--workdir={outside_dirs[0].parent}: expected a directory in --mount={options.mount}, '
            f'where the pods see the claim'
        )
    return [
        make_jobset(run_dir, command, resources, options) for run_dir, command in commands.items()
    ]


def find_slice(resources: Resources, options: Options) -> tpu.Slice | None:
    """Return the TPU slice of each member, or None if no TPU is requested.

    Raises:
      UserError: if GKE does not offer the slice, or not with these hosts.
    """
    if bool(options.tpu) != bool(options.topology):
        raise UserError('--tpu=KIND and --topology=SHAPE: expected both or neither')
    if not options.tpu:
        return None
    num_hosts = resources.processes if resources.processes > 1 else 0
    return tpu.find_slice(options.tpu, options.topology, resources.gpus, num_hosts)


def find_devices(resources: Resources) -> Devices:
    """Return the devices of a member.

    Raises:
      UserError: if GKE does not offer the TPU slice.
    """
    options = get_options()
    if tpu_slice := find_slice(resources, options):
        return Devices(tpu_slice.devices, tpu_slice.hosts, tpu_slice.topology)
    return Devices(resources.processes * (resources.gpus or 1), resources.processes)


def get_options() -> Options:
    """Return the options given by the flags."""
    return Options(
        image=IMAGE.value,
        claim=CLAIM.value,
        mount=MOUNT.value,
        tpu=TPU.value,
        topology=TOPOLOGY.value,
        memory=MEMORY.value,
        namespace=NAMESPACE.value,
    )


def submit(commands: Commands, resources: Resources) -> States:
    """Print the JobSets of members that are not running, without submitting them."""
    options = get_options()
    phases = {run_dir: read_run_state(run_dir).phase for run_dir in commands}
    idle_commands = {
        run_dir: command for run_dir, command in commands.items() if phases[run_dir] != 'running'
    }
    yaml.safe_dump_all(
        make_manifests(idle_commands, resources, options), sys.stdout, sort_keys=False
    )
    for phase in ('running', 'failed', 'died'):
        if member_names := [run_dir.name for run_dir in commands if phases[run_dir] == phase]:
            action = 'left alone' if phase == 'running' else 'in a JobSet of a new name'
            print(
                f'{len(member_names)} {phase}, {action}: {", ".join(member_names)}', file=sys.stderr
            )
    return dict.fromkeys(commands, QUEUED)


if __name__ == '__main__':
    from launch import cli

    cli.main('k8s', submit, find_devices)
