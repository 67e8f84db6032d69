"""Renders a sweep for Kubernetes: a JobSet for each unfinished member, as YAML on standard output.

    python -m launch.k8s --sweep=experiments/lm_fusion.py --workdir=/runs/lm_fusion \\
        --image=registry.example/mi:1 --claim=runs --gpus=8 --processes=2 --retries=3 \\
        | kubectl apply -f -
    python -m launch.k8s … --tpu=tpu-v5-lite-podslice --topology=4x4

It needs the JobSet controller (jobset.x-k8s.io/v1alpha2) in the cluster, an image with the
repository as its working directory, and a volume that all pods can write to, at `--mount`, with the
sweep directory on it; launch this where the same path is there, so that finished members are
skipped and `launch.status` works. A TPU slice sets the hosts of a member and the chips of each
host (`launch.tpu`); --gpus chooses where GKE makes the same slice of larger and of smaller hosts.

A pod that is evicted or preempted, or that ends with 143 because it saved, is started again as long
as it gets further each time (`launch.restarts`, which the containers run); one that fails, as often
as --retries says. All processes of a member are started again together, and go on from what they
saved.

Given again, the command leaves out what is finished or runs just now. A member that has failed for
good gets a JobSet of another name: Kubernetes would take the same one for done, and a changed one
for an error. Those of before are left as they are; `kubectl delete jobset --selector=sweep=…`
removes them, and so does a change of options want it of those that have not begun.
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
from mi.training.run_dir import PREEMPTED

IMAGE = flags.DEFINE_string('image', None, 'Container image, the repository its working directory.')
CLAIM = flags.DEFINE_string('claim', None, 'PersistentVolumeClaim with the sweep directory.')
MOUNT = flags.DEFINE_string('mount', '/runs', 'Where the claim is in the containers.')
TPU = flags.DEFINE_string('tpu', '', "Kind of TPU on GKE, such as 'tpu-v5-lite-podslice'.")
TOPOLOGY = flags.DEFINE_string('topology', '', "Of the TPU slice of a member, such as '4x4'.")
MEMORY = flags.DEFINE_string('memory', '', "Of each process, such as '64Gi'.")
NAMESPACE = flags.DEFINE_string('namespace', '', 'Namespace; that of kubectl if left out.')

PORT = 8476  # at which the first process of a member listens
GRACE = 120  # seconds that a pod has to save after SIGTERM


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say of the pods; see there."""

    image: str | None = None
    claim: str | None = None
    mount: str = '/runs'
    tpu: str = ''
    topology: str = ''
    memory: str = ''
    namespace: str = ''


def jobset(
    path: pathlib.Path, command: list[str], resources: Resources, options: Options
) -> dict[str, Any]:
    """The JobSet of one member: one job of as many pods as it has processes."""
    name = dns_name(path.parent.name, path.name, *failure(path))
    words = ['python', '-m', 'launch.restarts', str(path), '--', 'python', *command[1:]]
    if resources.processes > 1:
        # Kubernetes puts the variable in; the first pod's name is known before it is there.
        where = f'{name}-run-0-0.{name}:{PORT}'
        how = 'auto' if options.tpu else f'{where},{resources.processes},$(JOB_COMPLETION_INDEX)'
        words.append(f'--distributed={how}')
    wants: dict[str, Any] = {}
    if resources.cores:
        wants['cpu'] = str(resources.cores)
    if options.memory:
        wants['memory'] = options.memory
    if resources.gpus:
        wants['google.com/tpu' if options.tpu else 'nvidia.com/gpu'] = str(resources.gpus)
    pod: dict[str, Any] = {
        'restartPolicy': 'Never',
        'terminationGracePeriodSeconds': GRACE,
        'containers': [
            {
                'name': 'member',
                'image': options.image,
                'command': words,
                'env': [{'name': 'PYTHONUNBUFFERED', 'value': '1'}],
                'resources': {'limits': wants, 'requests': wants},
                'volumeMounts': [{'name': 'runs', 'mountPath': options.mount}],
            }
        ],
        'volumes': [{'name': 'runs', 'persistentVolumeClaim': {'claimName': options.claim}}],
    }
    if options.tpu:
        pod['nodeSelector'] = {
            'cloud.google.com/gke-tpu-accelerator': options.tpu,
            'cloud.google.com/gke-tpu-topology': options.topology,
        }
    # A job that ends by its pod failure policy is one that was preempted; JobSet counts the others.
    preempted = [
        {'action': 'FailJob', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]},
        {'action': 'FailJob', 'onExitCodes': {'operator': 'In', 'values': [PREEMPTED]}},
    ]
    job = {
        'parallelism': resources.processes,
        'completions': resources.processes,
        'completionMode': 'Indexed',
        'backoffLimit': 0,
        'podFailurePolicy': {'rules': preempted},
        'template': {'spec': pod},
    }
    metadata: dict[str, Any] = {'name': name, 'labels': {'sweep': dns_name(path.parent.name)}}
    if options.namespace:
        metadata['namespace'] = options.namespace
    if options.tpu:  # a slice is one node pool, and a member has it alone
        pools = 'cloud.google.com/gke-nodepool'
        metadata['annotations'] = {'alpha.jobset.sigs.k8s.io/exclusive-topology': pools}
    return {
        'apiVersion': 'jobset.x-k8s.io/v1alpha2',
        'kind': 'JobSet',
        'metadata': metadata,
        'spec': {
            'network': {'enableDNSHostnames': True, 'subdomain': name},
            'failurePolicy': {
                'maxRestarts': resources.retries,
                'rules': [
                    {
                        'name': 'preempted',
                        'action': 'RestartJobSetAndIgnoreMaxRestarts',
                        'onJobFailureReasons': ['PodFailurePolicy'],
                    }
                ],
            },
            'replicatedJobs': [{'name': 'run', 'replicas': 1, 'template': {'spec': job}}],
        },
    }


def failure(path: pathlib.Path) -> list[str]:
    """What tells the failure of a member from any other; [] if it has not failed.

    Read from what its processes left, so that the same failure always gives the same name.
    """
    if state.read(path).word not in ('failed', 'died'):
        return []
    status = state.status(path)
    left = [restarts.failures(path), *(status.get(key) for key in ('pid', 'host', 'updated'))]
    return [json.dumps(left)]


def dns_name(*words: str, most: int = 40) -> str:
    """A name that Kubernetes takes, of words that it may not; different for different words."""
    plain = re.sub(r'[^a-z0-9]+', '-', '-'.join(words).lower()).strip('-')
    mark = hashlib.sha256('/'.join(words).encode()).hexdigest()[:8]
    return f'{"" if plain[:1].isalpha() else "s-"}{plain[: most - 11].strip("-")}-{mark}'


def manifests(commands: Commands, resources: Resources, options: Options) -> list[dict[str, Any]]:
    """The JobSets of a sweep.

    Raises:
      UserError: if something is missing that every manifest needs.
    """
    if not options.image or not options.claim:
        raise UserError('--image=IMAGE and --claim=NAME of a PersistentVolumeClaim are both needed')
    if slice_ := find_slice(resources, options):
        resources = dataclasses.replace(resources, processes=slice_.hosts, gpus=slice_.chips)
    outside = [p for p in commands if not p.is_relative_to(options.mount)]
    if outside:
        raise UserError(
            f'--workdir={outside[0].parent}: the pods see the claim at --mount={options.mount}; '
            f'name a directory in it'
        )
    return [jobset(path, command, resources, options) for path, command in commands.items()]


def find_slice(resources: Resources, options: Options) -> tpu.Slice | None:
    """Return the TPU slice of each member; None if it has no TPU.

    Raises:
      UserError: if GKE has no such slice, or no such hosts for it.
    """
    if bool(options.tpu) != bool(options.topology):
        raise UserError('--tpu=KIND and --topology=SHAPE go together')
    if not options.tpu:
        return None
    hosts = resources.processes if resources.processes > 1 else 0
    return tpu.find_slice(options.tpu, options.topology, resources.gpus, hosts)


def find_devices(resources: Resources) -> Devices:
    """Return the devices of a member.

    Raises:
      UserError: if GKE has no such slice.
    """
    options = flag_options()
    if slice_ := find_slice(resources, options):
        return Devices(slice_.devices, slice_.hosts, slice_.topology)
    return Devices(resources.processes * (resources.gpus or 1), resources.processes)


def flag_options() -> Options:
    """Return the options that the flags name."""
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
    """Prints the JobSets of those that do not run; nothing is sent anywhere."""
    options = flag_options()
    words = {path: state.read(path).word for path in commands}
    idle = {path: command for path, command in commands.items() if words[path] != 'running'}
    yaml.safe_dump_all(manifests(idle, resources, options), sys.stdout, sort_keys=False)
    for word in ('running', 'failed', 'died'):
        if names := [path.name for path in commands if words[path] == word]:
            what = 'left alone' if word == 'running' else 'in a JobSet of a new name'
            print(f'{len(names)} {word}, {what}: {", ".join(names)}', file=sys.stderr)
    return dict.fromkeys(commands, QUEUED)


if __name__ == '__main__':
    from launch import cli

    cli.main('k8s', submit, find_devices)
