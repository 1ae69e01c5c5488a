"""The launch scripts, against stand-ins for the commands that they call."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
STAND_IN = Path(__file__).parent / "stand_in.py"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), ROOT / ".ci" / "run"]

# Whatever a shell could make something else of.
AWKWARD = [
    "--config",
    "configs/lm_ft.py",
    "--config.lm=/my models/it's 65B",
    '--config.data.train="a", b',
    "--config.workdir=$HOME/`x`/\\n",
    "--config.note=two\nlines; rm -rf *",
    "",
    "--config.é=~&|<>(){}[]!#",
]
RUN = ["--config", "configs/lm_ft.py"]


def test_scripts_are_shellcheck_clean():
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = shutil.which("shellcheck", path=path)
    assert command, "shellcheck is not installed; it comes with the extra test"
    found = subprocess.run(
        [command, "-x", *map(str, SCRIPTS)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout
    assert len(SCRIPTS) >= 8


class Machine:
    """A PATH whose commands are stand-ins, and what was asked of them."""

    def __init__(self, folder, commands, workers=2):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for command in commands:
            file = self.bin / command
            file.write_text(f"#!{sys.executable} -ISs\n{STAND_IN.read_text()}")
            file.chmod(0o755)
        for number in range(workers):
            (folder / f"worker-{number}").mkdir()
        # environment.sh takes this one as it is.
        (folder / "venv").mkdir()
        self.environment = {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "STAND_IN": str(folder),
            "VIRTUAL_ENV": str(folder / "venv"),
            "HOME": str(folder),
            "POLL": "0",
            "PAUSE": "0",
        }
        self.answer()

    def answer(self, *rules):
        """Rules of (words, answers); an answer is what is printed, or a dict."""
        content = [
            {
                "words": words.split(),
                "answers": [
                    a if isinstance(a, dict) else {"stdout": a} for a in answers
                ],
            }
            for words, *answers in rules
        ]
        (self.folder / "answers.json").write_text(json.dumps(content))

    def run(self, script, *arguments, **environment):
        return subprocess.run(
            ["bash", str(script), *arguments],
            env=self.environment | environment,
            cwd=environment.get("cwd", self.folder),
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def records(self):
        file = self.folder / "calls.jsonl"
        return (
            [json.loads(line) for line in file.read_text().splitlines()]
            if (file.exists())
            else []
        )

    def calls(self, *names):
        found = [record["call"] for record in self.records]
        return [call for call in found if not names or call[0] in names]

    def verbs(self):
        """What was done in the cloud, looks apart: create, delete, scp, ssh."""
        known = ("create", "delete", "scp", "ssh", "describe")
        found = [next(w for w in call if w in known) for call in self.calls("gcloud")]
        return [verb for verb in found if verb != "describe"]

    def runs(self):
        """What the front door was given, run by run."""
        calls = self.calls("python")
        return [c[3:] for c in calls if c[1:3] == ["-m", "radit_jax.main"]]


@pytest.fixture
def cloud(tmp_path):
    """Commands of a user's machine and of two workers."""
    return Machine(tmp_path, ["gcloud", "tmux", "python"])


def tpu(machine, command, *arguments, **environment):
    return machine.run(
        LAUNCH / "tpu_vm.sh",
        command,
        "pod",
        "--zone=us-east5-a",
        *arguments,
        **environment,
    )


STATE = "queued-resources describe state.state"
SLICE = "tpu-vm describe"
PLACE = ["--zone=us-east5-a"]


# Creating ---------------------------------------------------------------------------


def test_create_waits_until_the_slice_is_there(cloud):
    cloud.answer((STATE, "WAITING_FOR_RESOURCES\n", "PROVISIONING\n", "ACTIVE\n"))
    found = tpu(cloud, "create", "--type", "v5p-128", "--spot", "--project=my project")
    assert found.returncode == 0, found.stderr
    create, *looks = cloud.calls()
    assert create == [
        *("gcloud", "compute", "tpus", "queued-resources", "create", "pod"),
        *("--node-id=pod", *PLACE, "--project=my project"),
        *("--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--spot"),
    ]
    assert len(looks) == 3
    assert looks[0] == [
        *("gcloud", "compute", "tpus", "queued-resources", "describe", "pod"),
        *(*PLACE, "--project=my project", "--format=value(state.state)"),
    ]
    for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"):
        assert f"pod: {state}" in found.stderr


def test_a_request_that_fails_ends_with_its_reason(cloud):
    cloud.answer(
        (STATE, "WAITING_FOR_RESOURCES", "FAILED"),
        ("describe state.failedData.error.message", "no capacity left in this zone"),
    )
    found = tpu(cloud, "create", "--type=v5p-128")
    assert found.returncode == 1
    assert "no capacity left in this zone" in found.stderr
    assert "delete pod --zone us-east5-a" in found.stderr


@pytest.mark.parametrize("state", ["SUSPENDING", "SUSPENDED", "DELETING", ""])
def test_a_request_that_is_gone_is_not_waited_for(cloud, state):
    cloud.answer((STATE, "PROVISIONING", state))
    found = tpu(cloud, "create", "--type=v5p-128")
    assert found.returncode == 1
    assert "pod did not become ACTIVE" in found.stderr


def test_a_request_that_is_refused_is_not_waited_for(cloud):
    refusal = {"stderr": "ERROR: quota exceeded\n", "code": 1}
    cloud.answer(("queued-resources create", refusal))
    found = tpu(cloud, "create", "--type=v5p-128")
    assert found.returncode == 1
    assert "quota exceeded" in found.stderr
    assert len(cloud.calls()) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--type=v6e-8"], ["--runtime-version=v2-alpha-tpuv6e"]),
        (["--type=v5litepod-16"], ["--runtime-version=v2-alpha-tpuv5-lite"]),
        (["--type=v4-8"], ["--runtime-version=tpu-ubuntu2204-base"]),
        (["--type=v9-8", "--version=mine"], ["--runtime-version=mine"]),
        (["--type=v4-8", "--reserved"], ["--reserved"]),
        (["--type=v4-8", "--internal-ips"], ["--internal-ips"]),
        (
            [
                "--type=v4-8",
                "--create-flag=--network=a b",
                "--create-flag",
                "--labels=x=y",
            ],
            ["--network=a b", "--labels=x=y"],
        ),
    ],
)
def test_flags_of_the_request(cloud, flags, expected):
    cloud.answer((STATE, "ACTIVE"))
    assert tpu(cloud, "create", *flags).returncode == 0
    assert set(expected) <= set(cloud.calls()[0])
    if "--reserved" not in flags:
        assert not {"--reserved", "--spot"} & set(cloud.calls()[0])


def test_settings_come_from_the_environment_too(cloud):
    cloud.answer((STATE, "ACTIVE"))
    settings = {"ZONE": "z", "PROJECT": "p", "TYPE": "v4-8", "VERSION": "mine"}
    found = cloud.run(LAUNCH / "tpu_vm.sh", "create", "pod", **settings)
    assert found.returncode == 0, found.stderr
    expected = ["--zone=z", "--project=p", "--accelerator-type=v4-8"]
    assert {*expected, "--runtime-version=mine"} <= set(cloud.calls()[0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["crate", "pod"], "no command 'crate'; did you mean create?"),
        (["tear_down", "pod"], "no command 'tear_down'; did you mean "),
        (["create"], "create: which slice? Give its name first: create NAME"),
        (["create", "--zone=z"], "Give its name first"),
        (["create", "pod"], "the zone is not set; give --zone us-east5-a or ZONE="),
        (["create", "pod", "--zone"], "--zone: its value is missing"),
        (
            ["create", "pod", "--zone=z"],
            "the type is not set; give --type v5p-128 or TYPE=",
        ),
        (["watch", "pod", "--zone=z", "--", "x"], "the type is not set"),
        (
            ["create", "pod", "--zone=z", "--type=v5e-8"],
            "none of v4-N, v5litepod-N, v5p-N",
        ),
        (["create", "pod", "--zone=z", "--type=v6-8"], "(nearest: v6e-8)"),
        (["create", "pod", "--zne=z"], "no flag '--zne'; did you mean --zone?"),
        (
            ["create", "pod", "--zone=z", "--spot", "--reserved"],
            "--spot or --reserved, not",
        ),
        (["start", "pod", "--zone=z"], "start: what is to run? Give it after --"),
        (["start", "pod", "--zone=z", "--config=x"], "no flag '--config'"),
        (["watch", "pod", "--zone=z", "--type=v4-8"], "watch: what is to run?"),
        (["run", "pod", "--zone=z"], "run: which command? Give it after --"),
        (["copy", "pod", "--zone=z"], "copy: which folder? Give --from runs/paper"),
        (["copy", "pod", "--zone=z", "--from=x"], "give --to gs://BUCKET/FOLDER"),
        (["copy", "pod", "--zone=z", "--from=x", "--to=/y"], "'/y' is no bucket"),
        (["setup", "pod", "--zone=z", "--repository=x"], "--repository without --ref"),
    ],
)
def test_what_is_missing_or_unknown_is_said_and_nothing_runs(cloud, arguments, words):
    found = cloud.run(LAUNCH / "tpu_vm.sh", *arguments)
    assert found.returncode == 1
    assert found.stderr.startswith("error: ")
    assert words in found.stderr
    assert cloud.calls() == []


def test_help_shows_every_command_and_flag(cloud):
    for arguments in ([], ["--help"]):
        found = cloud.run(LAUNCH / "tpu_vm.sh", *arguments)
        assert found.returncode == 0
        text = (LAUNCH / "tpu_vm.sh").read_text()
        lists = text.split("commands=(")[1].split("--dry-run)")[0]
        names = [
            w for w in lists.replace(")", " ").split() if not w.startswith("flags=")
        ]
        assert len(names) > 20
        for name in names:
            assert name.removeprefix("flags=(") in found.stdout
        assert "set -euo" not in found.stdout


# Setting up and starting ------------------------------------------------------------


def test_setup_sends_the_checkout_as_it_is_and_installs_it(cloud, tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("launch", "radit_jax"):
        (checkout / name).mkdir(parents=True)
    for script in LAUNCH.glob("*.sh"):
        shutil.copy(script, checkout / "launch")
    shutil.copy(ROOT / "pyproject.toml", checkout)
    (checkout / "radit_jax" / "tracked gone.py").write_text("")
    (checkout / ".gitignore").write_text("runs/\n")
    for command in ("init --quiet", "add ."):
        subprocess.run(["git", *command.split()], cwd=checkout, check=True)
    (checkout / "radit_jax" / "tracked gone.py").unlink()
    (checkout / "radit_jax" / "new file.py").write_text("new")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "huge").write_text("huge")
    stale = tmp_path / "worker-1" / "radit_jax" / "radit_jax"
    stale.mkdir(parents=True)
    (stale / "moved.py").write_text("old")
    (stale.parent / "runs").mkdir()
    (stale.parent / "runs" / "precious").write_text("kept")

    found = cloud.run(checkout / "launch" / "tpu_vm.sh", "setup", "pod", *PLACE)
    assert found.returncode == 0, found.stderr
    for number in (0, 1):
        folder = tmp_path / f"worker-{number}" / "radit_jax"
        assert (folder / "radit_jax" / "new file.py").read_text() == "new"
        assert (folder / "pyproject.toml").exists()
        assert not (folder / "runs" / "huge").exists()
        assert not (folder / "radit_jax" / "moved.py").exists()
    assert (tmp_path / "worker-1" / "radit_jax" / "runs" / "precious").exists()
    installs = [c for c in cloud.calls("python") if "pip" in c]
    # The environment is shared between the two workers here, so once.
    assert [c[-2:] for c in installs] == [["--editable", ".[tpu]"]]
    scp, extract, install = cloud.calls("gcloud")
    assert scp[4] == "scp"
    assert scp[-3:] == [*PLACE, "--quiet", "--worker=all"]
    assert "--worker=all" in extract
    assert install[-1] == "--command=bash radit_jax/launch/worker.sh install"


def test_setup_ends_with_what_the_user_asks_for(cloud, tmp_path):
    install_workers(cloud)
    cloud.answer(("scp", ""), ("tar --extract", ""), ("worker.sh install", ""))
    command = "mkdir -p 'a b' && echo $((1 + 1)) > 'a b/two'"
    found = tpu(cloud, "setup", "--prepare", command)
    assert found.returncode == 0, found.stderr
    for number in (0, 1):
        assert (tmp_path / f"worker-{number}" / "a b" / "two").read_text() == "2\n"
    assert tpu(cloud, "setup", "--prepare", "false").returncode != 0
    cloud.answer(("scp", ""), ("tar --extract", ""), ("worker.sh install", {"code": 1}))
    (tmp_path / "calls.jsonl").unlink()
    assert tpu(cloud, "setup", "--prepare", command).returncode == 1
    assert not any("--command=mkdir -p 'a b'" in str(call) for call in cloud.calls())


def test_setup_stops_at_the_first_step_that_fails(cloud):
    cloud.answer(("scp", {"stderr": "no route\n", "code": 1}))
    found = tpu(cloud, "setup")
    assert found.returncode == 1
    assert "no route" in found.stderr
    assert len(cloud.calls("gcloud")) == 1


def test_setup_of_a_ref_clones_it(cloud, tmp_path):
    origin = tmp_path / "the origin"
    (origin / "launch").mkdir(parents=True)
    run = {"cwd": origin, "check": True, "capture_output": True}
    subprocess.run(["git", "init", "-b", "main"], **run)
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for version in ("one", "two"):
        body = f'[ "$1" = install ] && echo {version} >installed'
        (origin / "launch" / "worker.sh").write_text(body)
        subprocess.run(["git", "add", "."], **run)
        subprocess.run(["git", *identity, "commit", "-m", version], **run)
        subprocess.run(["git", "tag", f"v-{version}"], **run)
    for ref in ("v-one", "v-two", "v-one"):
        found = tpu(cloud, "setup", f"--repository={origin}", "--ref", ref)
        assert found.returncode == 0, found.stderr
        for number in (0, 1):
            installed = (tmp_path / f"worker-{number}" / "installed").read_text()
            assert installed.strip() == ref.removeprefix("v-")
    found = tpu(cloud, "setup", f"--repository={origin}", "--ref=v-three")
    assert found.returncode != 0


def install_workers(machine):
    """As ``setup`` leaves them."""
    for folder in machine.folder.glob("worker-*"):
        shutil.copytree(LAUNCH, folder / "radit_jax" / "launch", dirs_exist_ok=True)
        (folder / "radit_jax" / "pyproject.toml").touch()


def test_the_command_arrives_whole_on_every_worker(cloud, tmp_path):
    install_workers(cloud)
    found = tpu(cloud, "start", "--", *AWKWARD)
    assert found.returncode == 0, found.stderr
    assert cloud.runs() == [AWKWARD, AWKWARD]
    run = [r for r in cloud.records if r["call"][0] == "python"]
    assert {r["cwd"] for r in run} == {
        str(tmp_path / f"worker-{number}" / "radit_jax") for number in (0, 1)
    }
    assert {r["JAX_PLATFORMS"] for r in run} == {"tpu,cpu"}
    new = next(c for c in cloud.calls("tmux") if c[1] == "new-session")
    assert new[1:5] == ["new-session", "-d", "-s", "radit_jax"]
    assert new[-len(AWKWARD) :] == AWKWARD


def test_output_and_exit_status_are_kept_on_the_worker(cloud, tmp_path):
    install_workers(cloud)
    cloud.answer(
        (
            "python radit_jax.main",
            {"stdout": "step 1\n", "stderr": "oh\n", "code": 3},
            {"stdout": "ok\n"},
        )
    )
    assert tpu(cloud, "start", "--", *RUN).returncode == 0
    logs = {
        f.name: (f / "radit_jax.log").read_text() for f in tmp_path.glob("worker-*")
    }
    codes = {
        f.name: (f / "radit_jax.exit").read_text() for f in tmp_path.glob("worker-*")
    }
    assert logs == {"worker-0": "step 1\noh\n", "worker-1": "ok\n"}
    assert codes == {"worker-0": "3\n", "worker-1": "0\n"}
    found = tpu(cloud, "status")
    host = os.uname().nodename
    assert f"{host}: 3\noh\n{host}: 0\nok\n" in found.stdout


def test_a_run_that_was_lost_leaves_no_status_of_an_earlier_one(cloud, tmp_path):
    install_workers(cloud)
    (tmp_path / "worker-0" / "radit_jax.exit").write_text("0\n")
    cloud.answer(("new-session", ""))
    assert tpu(cloud, "start", "--", *RUN).returncode == 0
    assert ": none\n" in tpu(cloud, "status").stdout
    assert ": 0\n" not in tpu(cloud, "status").stdout


def test_a_second_run_is_refused(cloud, tmp_path):
    install_workers(cloud)
    (tmp_path / "worker-1" / "asleep").touch()
    found = tpu(cloud, "start", "--", *RUN)
    assert found.returncode == 1
    assert "a run goes on here; stop it first" in found.stderr
    assert ": running\n" in tpu(cloud, "status").stdout


# Watching ---------------------------------------------------------------------------


def test_watch_makes_a_slice_sets_it_up_starts_and_ends_with_the_run(cloud):
    cloud.answer(
        (STATE, "", "", "PROVISIONING", "ACTIVE"),
        (SLICE, "READY"),
    )
    found = tpu(cloud, "watch", "--type=v5p-8", "--", *AWKWARD)
    assert found.returncode == 0, found.stderr
    # Created, sent, unpacked, installed, started; one look at the run.
    assert cloud.verbs() == ["create", "scp", "ssh", "ssh", "ssh", "ssh"]
    assert cloud.runs() == [AWKWARD, AWKWARD]
    assert "pod: the run is finished" in found.stderr


def test_after_a_preemption_the_same_command_goes_on_on_a_new_slice(cloud):
    cloud.answer(
        ("worker.sh state", "running", "running", "0"),
        (SLICE, "READY"),
        (STATE, *["ACTIVE"] * 2, *["SUSPENDED"] * 2, "WAITING_FOR_RESOURCES", "ACTIVE"),
    )
    found = tpu(cloud, "watch", "--type=v5p-8", "--spot", "--", *AWKWARD)
    assert found.returncode == 0, found.stderr
    verbs = cloud.verbs()
    assert verbs[:2] == ["ssh", "ssh"]  # two looks
    assert verbs[2:8] == ["delete", "create", "scp", "ssh", "ssh", "ssh"]
    assert "--spot" in next(c for c in cloud.calls() if "create" in c)
    delete = next(c for c in cloud.calls() if "delete" in c)
    assert delete[3:] == [
        "queued-resources",
        "delete",
        "pod",
        *PLACE,
        "--force",
        "--quiet",
    ]
    assert cloud.runs() == [AWKWARD, AWKWARD]  # once on each worker


def test_a_preempted_node_is_seen_while_the_request_is_active(cloud):
    cloud.answer(
        ("worker.sh state", "running", "0"),
        (SLICE, "READY", "PREEMPTED", "READY"),
        (STATE, "ACTIVE"),
    )
    found = tpu(cloud, "watch", "--type=v5p-8", "--", *RUN)
    assert found.returncode == 0, found.stderr
    assert cloud.verbs()[1:3] == ["delete", "create"]


def test_a_run_that_saved_and_stopped_is_started_again_in_place(cloud):
    install_workers(cloud)
    cloud.answer(
        ("worker.sh state", "running", "75", "running", "0"),
        (SLICE, "READY"),
        (STATE, "ACTIVE"),
    )
    found = tpu(cloud, "watch", "--type=v5p-8", "--", *RUN)
    assert found.returncode == 0, found.stderr
    assert "create" not in cloud.verbs()
    assert cloud.runs() == [RUN, RUN]


def test_a_run_that_fails_is_not_repeated(cloud, tmp_path):
    install_workers(cloud)
    (tmp_path / "worker-0" / "radit_jax.log").write_text("error: no such file\n")
    cloud.answer(
        ("worker.sh state", "running", "1"),
        (SLICE, "READY"),
        (STATE, "ACTIVE"),
    )
    found = tpu(cloud, "watch", "--type=v5p-8", "--", *RUN)
    assert found.returncode == 1
    assert "error: no such file" in found.stdout + found.stderr
    assert "the run on pod ended with status 1" in found.stderr
    assert cloud.runs() == []
    assert "delete" not in cloud.verbs()


def test_workers_that_die_with_their_slice_are_no_failure_of_the_run(cloud):
    cloud.answer(
        ("worker.sh state", "running", "1", "0"),
        (SLICE, "READY"),
        (STATE, "ACTIVE", "ACTIVE", "SUSPENDING", "SUSPENDED", "ACTIVE"),
    )
    found = tpu(cloud, "watch", "--type=v5p-8", "--", *RUN)
    assert found.returncode == 0, found.stderr
    assert "delete" in cloud.verbs()


def test_what_an_earlier_run_left_does_not_count(cloud):
    install_workers(cloud)
    cloud.answer(("worker.sh state", "0", "0"), (SLICE, "READY"), (STATE, "ACTIVE"))
    found = tpu(cloud, "watch", "--type=v5p-8", "--", *RUN)
    assert found.returncode == 0, found.stderr
    assert cloud.runs() == [RUN, RUN]


@pytest.mark.parametrize(
    "rules",
    [
        [(STATE, {"stderr": "could not reach the server\n", "code": 1})],
        [
            (STATE, "FAILED"),
            ("describe state.failedData", "no capacity"),
        ],
        [(STATE, "ACTIVE"), (SLICE, "READY"), ("ssh", {"code": 255})],
        [(STATE, ""), ("create", {"stderr": "quota\n", "code": 1})],
        [(STATE, "ACTIVE"), (SLICE, "READY"), ("state", "none"), ("scp", {"code": 1})],
        [
            *((STATE, "ACTIVE"), (SLICE, "READY"), ("worker.sh state", "none")),
            *(("scp", ""), ("tar", ""), ("worker.sh install", {"code": 1})),
        ],
    ],
    ids=["no cloud", "no capacity", "no ssh", "no quota", "no setup", "no install"],
)
def test_failures_in_a_row_end_the_watch(cloud, rules):
    cloud.answer(*rules)
    found = tpu(cloud, "watch", "--type=v5p-8", "--", *RUN, TRIES="3")
    assert found.returncode == 1
    assert "3 failures in a row" in found.stderr
    assert len(cloud.calls("gcloud")) < 20
    if rules[0][1] != "" and rules[0][1] != "FAILED":
        assert not {"create", "delete"} & set(cloud.verbs())
    assert cloud.runs() == []
    # What comes after a step that failed is not done.
    assert not any("worker.sh start" in str(call) for call in cloud.calls())
    if rules[-1][0] == "scp":
        assert not any("worker.sh install" in str(call) for call in cloud.calls())


def test_the_pause_between_tries_doubles_up_to_a_bound(cloud):
    cloud.answer((STATE, "FAILED"), ("failedData", "no capacity"))
    sleeper = cloud.bin / "sleep"
    shutil.copy(cloud.bin / "gcloud", sleeper)
    settings = {"POLL": "1", "PAUSE": "60", "PAUSE_MOST": "300", "TRIES": "6"}
    found = tpu(cloud, "watch", "--type=v5p-8", "--", *RUN, **settings)
    assert found.returncode == 1
    pauses = [int(c[1]) for c in cloud.calls("sleep") if c[1] != "1"]
    assert pauses == [120, 240, 300, 300, 300]


# The rest ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "flags", "workers", "remote"),
    [
        ("logs", [], "0", "tail -n 100 -F radit_jax.log"),
        ("logs", ["--worker=3"], "3", "tail -n 100 -F radit_jax.log"),
        ("stop", [], "all", "bash radit_jax/launch/worker.sh stop"),
        (
            "copy",
            ["--from=runs/my run", "--to=gs://bucket/a b"],
            "0",
            "cd radit_jax && gcloud storage rsync --recursive "
            "runs/my\\ run gs://bucket/a\\ b",
        ),
        ("run", ["--", "ls", "a b"], "all", "cd radit_jax && ls a\\ b "),
    ],
)
def test_commands_for_workers(cloud, command, flags, workers, remote):
    cloud.answer(("ssh", "from the worker"))
    found = tpu(cloud, command, *flags)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "from the worker"
    assert cloud.calls() == [
        [
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod", *PLACE, "--quiet"),
            *(f"--worker={workers}", f"--command={remote}"),
        ]
    ]


def test_internal_addresses_are_used_for_ssh_too(cloud):
    cloud.answer(("ssh", ""))
    tpu(cloud, "stop", "--internal-ips")
    assert "--internal-ip" in cloud.calls()[0]


def test_stop_interrupts_the_run(cloud):
    install_workers(cloud)
    assert tpu(cloud, "stop").returncode == 0
    assert cloud.calls("tmux") == [["tmux", "send-keys", "-t", "radit_jax", "C-c"]] * 2


def test_delete(cloud):
    assert tpu(cloud, "delete").returncode == 0
    expected = ["queued-resources", "delete", "pod", *PLACE, "--force", "--quiet"]
    assert cloud.calls() == [["gcloud", "compute", "tpus", *expected]]


def test_status_of_what_is_not_there(cloud):
    missing = {"stderr": "ERROR: NOT_FOUND: pod\n", "code": 1}
    cloud.answer(("describe", missing), ("ssh", ""))
    found = tpu(cloud, "status")
    assert found.stdout.startswith("request: none\nslice: none\n")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("create", ["--type=v5p-8", "--spot"]),
        ("setup", []),
        ("setup", ["--ref=v1", "--repository=https://example.com/a b"]),
        ("start", ["--", *AWKWARD]),
        ("status", []),
        ("logs", []),
        ("stop", []),
        ("run", ["--", "ls", "a b"]),
        ("copy", ["--from=a", "--to=gs://b/c d"]),
        ("delete", []),
    ],
)
def test_a_dry_run_prints_what_a_run_would_run(cloud, command, flags):
    """The lines, given to a shell, are the very calls of the real thing."""
    dry = tpu(cloud, command, "--dry-run", *flags)
    assert dry.returncode == 0, dry.stderr
    assert cloud.calls() == []
    printed = [line for line in dry.stdout.splitlines() if line.startswith("gcloud ")]
    assert printed
    script = cloud.folder / "printed.sh"
    script.write_text("\n".join(printed))
    cloud.answer((STATE, "ACTIVE"), ("describe", "READY"), ("ssh", ""), ("scp", ""))
    cloud.run(script)
    from_print = cloud.calls("gcloud")
    (cloud.folder / "calls.jsonl").unlink()
    for used in cloud.folder.glob("used-*"):
        used.unlink()
    real = tpu(cloud, command, *flags)
    assert real.returncode == 0, real.stderr
    assert [same_archive(c) for c in cloud.calls("gcloud")] == [
        same_archive(c) for c in from_print
    ]


def same_archive(call):
    """The archive lies in a temporary folder of its own."""
    return [Path(w).name if w.endswith("/radit_jax.tar.gz") else w for w in call]


def test_a_dry_watch_prints_all_of_it(cloud):
    found = tpu(cloud, "watch", "--type=v5p-8", "--dry-run", "--", *AWKWARD)
    assert found.returncode == 0, found.stderr
    assert cloud.calls() == []
    commands = [
        shlex.split(line)[4]
        for line in found.stdout.splitlines()
        if line.startswith("gcloud")
    ]
    expected = ["create", "describe", "scp", "ssh", "ssh", "ssh"]
    assert commands == [*expected, "describe", "describe", "ssh", "delete"]


# One machine with GPUs, and SLURM -----------------------------------------------------


@pytest.fixture
def gpu(tmp_path):
    return Machine(tmp_path, ["nvidia-smi", "python"], workers=0)


def test_gpu_shows_the_gpus_installs_and_runs(gpu):
    gpu.answer(("nvidia-smi", "NVIDIA H100, 81559 MiB, 580.1\n"))
    found = gpu.run(LAUNCH / "gpu.sh", *AWKWARD)
    assert found.returncode == 0, found.stderr
    assert "NVIDIA H100, 81559 MiB, 580.1" in found.stdout
    install, run = gpu.records[1:]
    assert install["call"][-1] == ".[cuda]"
    assert run["call"] == ["python", "-m", "radit_jax.main", *AWKWARD]
    assert run["JAX_PLATFORMS"] == "cuda,cpu"
    assert run["cwd"] == str(ROOT)


@pytest.mark.parametrize(
    "answer", [{"stdout": "driver too old", "code": 9}, {"stdout": ""}]
)
def test_gpu_without_a_working_driver_stops(gpu, answer):
    gpu.answer(("nvidia-smi", answer))
    found = gpu.run(LAUNCH / "gpu.sh", *RUN)
    assert found.returncode == 1
    assert "nvidia-smi shows no GPU" in found.stderr
    assert answer["stdout"] in found.stderr
    assert gpu.calls("python") == []


def test_gpu_without_a_driver_stops(gpu):
    (gpu.bin / "nvidia-smi").unlink()
    found = gpu.run(LAUNCH / "gpu.sh", *RUN)
    assert found.returncode == 1
    assert "nvidia-smi is not there" in found.stderr
    assert gpu.calls() == []


def test_gpu_without_a_recipe_stops(gpu):
    assert "Give a recipe" in gpu.run(LAUNCH / "gpu.sh").stderr
    assert gpu.calls() == []


def test_gpu_dry_run(gpu):
    found = gpu.run(LAUNCH / "gpu.sh", "--dry-run", *RUN, "a b")
    lines = found.stdout.splitlines()
    assert shlex.split(lines[-1])[2:] == ["python", "-m", "radit_jax.main", *RUN, "a b"]
    assert lines[1] == "source launch/environment.sh && install cuda"
    assert gpu.calls() == []


@pytest.fixture
def slurm(tmp_path):
    """As SLURM starts a batch script: a copy of it, elsewhere."""
    machine = Machine(tmp_path, ["srun", "scontrol", "python"], workers=0)
    shutil.copy(LAUNCH / "slurm.sh", tmp_path / "slurm_script")
    machine.environment |= {
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "12",
    }
    return machine


def test_slurm_installs_once_and_starts_a_process_per_gpu(slurm, tmp_path):
    found = slurm.run(tmp_path / "slurm_script", *AWKWARD)
    assert found.returncode == 0, found.stderr
    install, run = slurm.records
    assert install["call"][-1] == ".[cuda]"
    assert run["call"] == [
        *("srun", "--kill-on-bad-exit=0", "--wait=0", "--gpu-bind=none"),
        *("--cpus-per-task=12", "python", "-m", "radit_jax.main", *AWKWARD),
    ]
    assert run["JAX_PLATFORMS"] == "cuda,cpu"
    assert run["cwd"] == str(ROOT)


def test_slurm_without_gpus(slurm, tmp_path):
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK"):
        del slurm.environment[name]
    assert slurm.run(tmp_path / "slurm_script", *RUN).returncode == 0
    install, run = slurm.records
    assert install["call"][-1] == "."
    assert "--cpus-per-task" not in " ".join(run["call"])
    assert run["JAX_PLATFORMS"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"SLURM_NTASKS_PER_NODE": "1"}, "1 processes and 4 GPUs a node"),
        ({"SLURM_NTASKS_PER_NODE": "1"}, "give --ntasks-per-node=4"),
        ({"SLURM_SUBMIT_DIR": "/"}, "/ is not the folder of the checkout"),
    ],
)
def test_slurm_stops_before_anything_runs(slurm, tmp_path, change, words):
    found = slurm.run(tmp_path / "slurm_script", *RUN, **change)
    assert found.returncode == 1
    assert words in found.stderr
    assert slurm.calls() == []


@pytest.mark.parametrize(("code", "again"), [(75, True), (1, False), (0, False)])
def test_slurm_queues_a_run_again_that_saved_and_stopped(slurm, tmp_path, code, again):
    slurm.answer(("srun", {"code": code}))
    assert slurm.run(tmp_path / "slurm_script", *RUN).returncode == code
    expected = [["scontrol", "requeue", "17"]] if again else []
    assert slurm.calls("scontrol") == expected


def test_slurm_dry_run(slurm, tmp_path):
    found = slurm.run(tmp_path / "slurm_script", "--dry-run", *RUN, "a b")
    assert shlex.split(found.stdout.splitlines()[-1])[-4:] == [
        "radit_jax.main",
        *RUN,
        "a b",
    ]
    assert slurm.calls() == []


def test_slurm_options_are_read_by_sbatch():
    """They end at the first line that is no comment."""
    lines = (LAUNCH / "slurm.sh").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert len(options) > 5
    assert max(options) < first
