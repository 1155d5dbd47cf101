"""Flower's SuperExec at the coordinator, restricted to starting the run's process.

`python -m fedamole.deployment.flower.executor TOKENS ...`, followed by options of `flower-superexec`. The original
starts a command for every type of task, and passes the task's token as an argument, which every account of the machine
can read. This one refuses any task that is not a ServerApp, and writes the token to a file in the folder TOKENS that
only this account can read.
"""

import logging
import subprocess
import sys
from pathlib import Path

from flwr.supercore.cli import flower_superexec
from flwr.supercore.constant import TASK_TYPE_TO_APPIO_API_ADDRESS_ARG, TaskType
from flwr.supercore.superexec.executor.subprocess_executor import SubprocessExecutor
from flwr.supercore.superexec.executor.types import ExecutionSpec, LaunchResult

from fedamole.deployment.flower.command_allowlist import SERVERAPP
from fedamole.deployment.processes import private_file

log = logging.getLogger(__name__)


def arguments(spec: ExecutionSpec, tokens: Path) -> list[str] | None:
    """Return the command of a task, or None if it is not the run's process."""
    if spec.task_type != TaskType.SERVER_APP:
        return None
    token = private_file(tokens / f"task-{spec.task_id}", spec.token)
    command = [SERVERAPP, TASK_TYPE_TO_APPIO_API_ADDRESS_ARG[spec.task_type], spec.runtime_api_address]
    command += ["--token-file", str(token)]
    if spec.insecure:
        command.append("--insecure")
    elif spec.root_certificates_path is not None:
        command += ["--root-certificates", spec.root_certificates_path]
    return command if spec.parent_pid is None else [*command, "--parent-pid", str(spec.parent_pid)]


def main() -> None:
    """Run Flower's command with the restricted launcher."""
    tokens = Path(sys.argv.pop(1))

    def launch(self: SubprocessExecutor, spec: ExecutionSpec) -> LaunchResult:
        command = arguments(spec, tokens)
        if command is None:
            log.error("refused: a task of type %s; somebody has requested another app", spec.task_type)
            return LaunchResult.failed("this SuperExec only starts the run of fedamole")
        subprocess.Popen(command)
        return LaunchResult.accepted()

    SubprocessExecutor.launch = launch  # type: ignore[method-assign]
    sys.argv[0] = "flower-superexec"
    flower_superexec()


if __name__ == "__main__":
    main()
