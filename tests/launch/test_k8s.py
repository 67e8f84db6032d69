"""Manifests against the rules of Kubernetes: its own schema for the jobs, JobSet's around them.

kubernetes-validate has the schemas of Kubernetes itself, here of version 1.34 and strict: a key
that it does not know is an error. JOBSET is written after the CustomResourceDefinition of JobSet
(jobset.x-k8s.io/v1alpha2), of the keys that are used here. No cluster has run them.
"""

import copy
import dataclasses
import pathlib
import re
import subprocess
import sys

import jsonschema
import kubernetes_validate
import pytest
import yaml

from launch import engine, k8s
from mi.config import UserError

SWEEP = """
from launch.sweep import product
CONFIG = 'configs/lm.py:tiny'
TITLE, METRIC, SPLIT, BASELINE, NOTES = 'a test', 'bits_per_byte', 'test', None, []
def sweep():
    return product(**{'model.fusion.name': ['concat', 'mi'], 'model.site': ['encoder', 'both']})
"""


def an_object(required=(), **properties):
    rule = {'type': 'object', 'properties': properties, 'required': list(required)}
    return rule | {'additionalProperties': False}


def an_array(items, **more):
    return {'type': 'array', 'items': items} | more


TEXT, NUMBER, ANY = {'type': 'string'}, {'type': 'integer'}, {'type': 'object'}
NAME = {'type': 'string', 'pattern': '^[a-z]([-a-z0-9]*[a-z0-9])?$', 'maxLength': 63}
ACTIONS = ['FailJobSet', 'RestartJobSet', 'RestartJobSetAndIgnoreMaxRestarts']
REASONS = [
    'BackoffLimitExceeded', 'DeadlineExceeded', 'FailedIndexes', 'MaxFailedIndexesExceeded',
    'PodFailurePolicy',
]  # fmt: skip
JOBSET = an_object(
    ['apiVersion', 'kind', 'metadata', 'spec'],
    apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'},
    kind={'const': 'JobSet'},
    metadata=an_object(['name'], name=NAME, namespace=NAME, labels=ANY, annotations=ANY),
    spec=an_object(
        ['replicatedJobs'],
        network=an_object(
            enableDNSHostnames={'type': 'boolean'},
            publishNotReadyAddresses={'type': 'boolean'},
            subdomain=TEXT,
        ),
        failurePolicy=an_object(
            maxRestarts=NUMBER,
            restartStrategy={'enum': ['Recreate', 'BlockingRecreate']},
            rules=an_array(
                an_object(
                    ['action', 'name'],
                    action={'enum': ACTIONS},
                    name={'type': 'string', 'pattern': '^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$'},
                    onJobFailureReasons=an_array({'enum': REASONS}),
                    targetReplicatedJobs=an_array(TEXT),
                )
            ),
        ),
        replicatedJobs=an_array(
            an_object(
                ['name', 'template'],
                name=NAME,
                replicas=NUMBER,
                template=an_object(['spec'], spec=ANY, metadata=ANY),
            ),
            minItems=1,
        ),
    ),
)


def check(manifest):
    """Raises if Kubernetes or JobSet would refuse it for its form."""
    jsonschema.validate(manifest, JOBSET)
    for job in manifest['spec']['replicatedJobs']:
        manifest_head = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': job['name']}}
        kubernetes_validate.validate(manifest_head | job['template'], '1.34', strict=True)


PATHS = [pathlib.Path('/runs/a') / f'fusion={f},site={s}' for f in ('mi', 'film') for s in 'xy']
COMMANDS = {
    path: ['/venv/bin/python', '-m', 'mi.main', '--config.seeds=(0, 1)', f'--workdir={path}']
    for path in PATHS
}
GPUS = engine.Resources(gpus=8, cores=16, processes=2, retries=3)
PODS = k8s.Options('x/mi:1', 'runs')


def only(manifest):
    (job,) = manifest['spec']['replicatedJobs']
    (container,) = job['template']['spec']['template']['spec']['containers']
    return job, container


def test_manifests_have_the_form_that_kubernetes_asks_for():
    manifests = k8s.make_manifests(COMMANDS, GPUS, PODS)
    assert len({m['metadata']['name'] for m in manifests}) == len(manifests) == 4
    for manifest in manifests:
        check(manifest)
    for key, value in (('backoffLimits', 0), ('parallelism', 'two')):  # the check has teeth
        wrong = copy.deepcopy(manifests[0])
        only(wrong)[0]['template']['spec'][key] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            check(wrong)
    wrong = copy.deepcopy(manifests[0])
    wrong['spec']['failurePolicy']['rules'][0]['action'] = 'Restart'
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


def test_the_pods_of_a_member_are_told_where_the_first_of_them_listens():
    manifest = k8s.make_manifests(COMMANDS, GPUS, PODS)[0]
    job, container = only(manifest)
    *arguments, last = container['command']
    around = ['python', '-m', 'launch.restarts', str(PATHS[0]), '--']
    assert arguments == [*around, 'python', *COMMANDS[PATHS[0]][1:]]
    assert job['template']['spec']['completions'] == job['template']['spec']['parallelism'] == 2
    # JobSet names a pod JOBSET-JOB-INDEX-POD, in the subdomain of the network.
    pod = f'{manifest["metadata"]["name"]}-{job["name"]}-0-0'
    domain = manifest['spec']['network']['subdomain']
    assert re.fullmatch(rf'--distributed={pod}\.{domain}:\d+,2,\$\(JOB_COMPLETION_INDEX\)', last)
    assert container['resources']['limits'] == {'cpu': '16', 'nvidia.com/gpu': '8'}
    assert manifest['spec']['failurePolicy']['maxRestarts'] == 3


def test_pods_that_saved_or_were_evicted_are_started_again_without_being_counted():
    """A job ends by its pod failure policy in these two cases, and JobSet ignores that reason."""
    manifest = k8s.make_manifests(COMMANDS, GPUS, PODS)[0]
    spec = only(manifest)[0]['template']['spec']
    assert spec['backoffLimit'] == 0  # any other end of a pod ends the job as well
    assert spec['podFailurePolicy']['rules'] == [
        {'action': 'FailJob', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]},
        {'action': 'FailJob', 'onExitCodes': {'operator': 'In', 'values': [143]}},
    ]
    (rule,) = manifest['spec']['failurePolicy']['rules']
    assert rule['action'] == 'RestartJobSetAndIgnoreMaxRestarts'
    assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
    assert spec['template']['spec']['restartPolicy'] == 'Never'


def test_a_tpu_slice_is_asked_for_by_kind_and_shape():
    slices = dataclasses.replace(PODS, tpu='tpu-v5-lite-podslice', topology='4x4')
    for manifest in k8s.make_manifests(COMMANDS, engine.Resources(), slices):
        check(manifest)
        job, container = only(manifest)
        assert job['template']['spec']['completions'] == 4
        assert container['resources']['limits'] == {'google.com/tpu': '4'}
        assert container['command'][-1] == '--distributed=auto'
        selector = job['template']['spec']['template']['spec']['nodeSelector']
        assert selector['cloud.google.com/gke-tpu-topology'] == '4x4'


@pytest.mark.parametrize(
    'options, message',
    [
        ({'image': None}, '--image=IMAGE and --claim=NAME'),
        ({'tpu': 'v5'}, '--topology=SHAPE'),
        ({'tpu': 'tpu-v5p', 'topology': '4x4'}, "--tpu=tpu-v5p: did you mean 'tpu-v5p-slice'?"),
        ({'tpu': 'tpu-v5p-slice', 'topology': '4x4'}, '--topology=4x4: expected a slice of'),
        ({'mount': '/elsewhere'}, 'expected a directory in --mount=/elsewhere'),
    ],
)
def test_what_is_missing_is_named(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        k8s.make_manifests(COMMANDS, GPUS, dataclasses.replace(PODS, **options))


def test_a_number_of_simultaneous_members_is_refused():
    with pytest.raises(UserError, match='--parallel=2: expected 0, because Kubernetes'):
        k8s.make_manifests(COMMANDS, dataclasses.replace(GPUS, parallel=2), PODS)


@pytest.mark.slow
def test_the_command_prints_a_document_for_each_member(tmp_path):
    (tmp_path / 'a_sweep.py').write_text(SWEEP)
    command = [sys.executable, '-m', 'launch.k8s', f'--sweep={tmp_path / "a_sweep.py"}']
    command += [f'--workdir={tmp_path}/runs/a', f'--mount={tmp_path}', '--image=x', '--claim=c']
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    manifests = list(yaml.safe_load_all(result.stdout))
    assert [only(m)[1]['command'][-1] for m in manifests] == [
        f'--workdir={tmp_path}/runs/a/fusion={fusion},site={site}'
        for fusion in ('concat', 'mi')
        for site in ('encoder', 'both')
    ]
