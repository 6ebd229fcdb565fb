"""Commands that start a run elsewhere: launch slurm."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fp8train.cli.app import Options, launch_app, write
from fp8train.config.errors import UserError

if TYPE_CHECKING:
    from fp8train.cli.slurm_script import SlurmJob
    from fp8train.config.resolve import ResolvedConfig


@launch_app.callback()
def _group() -> None:
    """Keeps ``slurm`` a command of its own while it is the only one."""


@launch_app.command()
def slurm(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Options = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs, and so processes, of each.")] = 8,
    limit: Annotated[str | None, typer.Option("--time", help="Time limit, as sbatch takes it.")] = None,
    account: Annotated[str | None, typer.Option(help="Who pays.")] = None,
    partition: Annotated[str | None, typer.Option(help="Queue.")] = None,
    qos: Annotated[str | None, typer.Option(help="Quality of service.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Name of the job; default: run.name.")] = None,
    turns: Annotated[
        int | None, typer.Option(min=1, help="Submit a chain of this many jobs, one after the other.")
    ] = None,
    image: Annotated[str | None, typer.Option(help="Container image (needs the plugin pyxis).")] = None,
    mounts: Annotated[str | None, typer.Option(help="SRC:DST[,SRC:DST...] to mount there too.")] = None,
    sbatch: Annotated[
        list[str] | None, typer.Option(help="Another flag of sbatch, such as --sbatch=--constraint=h100.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print script and command; do nothing.")] = False,
) -> None:
    """Check a run for the size of a job, keep its code and configuration in RUN/launch, and submit it."""
    from fp8train.cli.slurm_script import flag

    flags: dict[str, str | None] = {"nodes": str(nodes), "gpus-per-node": str(gpus_per_node)}
    given = {"job-name": job_name, "time": limit, "account": account, "partition": partition, "qos": qos}
    flags |= {name: value for name, value in given.items() if value is not None}
    flags |= dict(flag(text) for text in sbatch or ())
    variables = {"NPROC": str(gpus_per_node)}
    if turns is not None:
        flags |= {"array": f"1-{turns}%1", "no-requeue": None}
        variables |= {"FP8TRAIN_CHAIN": "array", "FP8TRAIN_REQUEUES": "0"}
    if image is not None:
        variables["FP8TRAIN_IMAGE"] = image
    elif (Path(sys.prefix) / "bin" / "python").exists():
        variables["FP8TRAIN_VENV"] = os.environ.get("FP8TRAIN_VENV", sys.prefix)
    if mounts is not None:
        variables["FP8TRAIN_MOUNTS"] = mounts
    _Submission(config, list(overrides or ()), flags, variables).run(nodes * gpus_per_node, dry_run=dry_run)


class _Submission:
    """One call of ``fp8train launch slurm``."""

    def __init__(
        self,
        config: Path,
        overrides: Sequence[str],
        flags: dict[str, str | None],
        variables: dict[str, str],
    ) -> None:
        self.config, self.flags, self.variables = config, flags, variables
        named = any(text.startswith("checkpoint.resume=") for text in overrides)
        self.overrides = [*overrides] if named else ["checkpoint.resume=auto", *overrides]

    def run(self, processes: int, *, dry_run: bool) -> None:
        """Check, write, submit."""
        from fp8train.cli.slurm_script import render, template_path
        from fp8train.config.environment import World
        from fp8train.config.resolve import load_config
        from fp8train.training.preflight import preflight, run_path

        resolved = load_config(self.config, self.overrides)
        preflight(resolved, World(processes))
        template = template_path()
        if not dry_run and shutil.which("sbatch") is None:
            raise UserError(
                "there is no sbatch on this machine; submit where Slurm is, or look with --dry-run"
            )
        run = run_path(resolved.config).absolute()
        folder = _next_folder(run / "launch")
        script = folder / "slurm.sbatch"
        text = render(
            self._job(resolved, folder), template.read_text(), note=f"fp8train launch slurm, run {run}"
        )
        command = ["sbatch", "--parsable", str(script)]
        if dry_run:
            write(f"{text}# would be written to {script} and submitted with\n# {shlex.join(command)}\n")
            return
        record = self._write(folder, text, resolved, command)
        job = _submit(command, script)
        (folder / "launch.json").write_text(json.dumps(record | {"job_id": job}, indent=2) + "\n")
        write(f"submitted job {job}; script, configuration and code are in {folder}\n")

    def _job(self, resolved: ResolvedConfig, folder: Path) -> SlurmJob:
        """The job runs what was checked: a copy of the resolved configuration, not a file that may change."""
        from fp8train.cli.slurm_script import SlurmJob

        settings = resolved.config
        flags = {"job-name": settings.run.name, "output": str(folder / "%x-%j.log"), "chdir": str(Path.cwd())}
        arguments = (str(folder / "config.yaml"), f"checkpoint.resume={settings.checkpoint.resume}")
        return SlurmJob(flags | self.flags, arguments, self.variables)

    def _write(
        self, folder: Path, script: str, resolved: ResolvedConfig, command: Sequence[str]
    ) -> dict[str, Any]:
        """Everything that the job is, in its folder; the description of it."""
        from fp8train import __version__
        from fp8train.checkpoint.errors import explain_os_error
        from fp8train.config.dump import dump_yaml
        from fp8train.run_dir.git import git_diff, git_state

        code = Path(__file__).resolve().parents[1]
        record: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": list(command),
            "fp8train": __version__,
            "git": git_state(code),
            "config": str(self.config.absolute()),
            "overrides": self.overrides,
        }
        files = {
            "config.yaml": dump_yaml(resolved.config),
            "git.diff": git_diff(code),
            "launch.json": json.dumps(record, indent=2) + "\n",
            "slurm.sbatch": script,
        }
        try:
            folder.mkdir(parents=True)
            for name, text in files.items():
                (folder / name).write_text(text, errors="surrogateescape")
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({explain_os_error(error)}); set run.dir to a folder you can "
                "write to"
            ) from error
        return record


def _next_folder(launches: Path) -> Path:
    """The first free one of ``001``, ``002``, ..."""
    taken = [int(path.name) for path in launches.glob("*") if path.name.isdecimal()]
    return launches / f"{max(taken, default=0) + 1:03d}"


def _submit(command: Sequence[str], script: Path) -> str:
    """Call sbatch; the number of the job."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
        raise UserError(
            f"sbatch refused the job: {said}\nthe script is kept; submit it with: sbatch {script}"
        )
    return done.stdout.strip().partition(";")[0]
