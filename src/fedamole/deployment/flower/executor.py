"""Flower's SuperExec at the coordinator, which starts the run's process and nothing else.

`python -m fedamole.deployment.flower.executor TOKENS ...`, where the rest are options of `flower-superexec`. Flower's
own starts a command for each kind of task, and gives it the task's token as an argument, which every account of the
machine can read. Here a task that is no ServerApp is refused, and the token lies in a file of the folder TOKENS that
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
    """The command for a task, or None for one of another kind than the run's process."""
    if spec.task_type != TaskType.SERVER_APP:
        return None
    token = private_file(tokens / f"task-{spec.task_id}", spec.token)
    words = [SERVERAPP, TASK_TYPE_TO_APPIO_API_ADDRESS_ARG[spec.task_type], spec.runtime_api_address]
    words += ["--token-file", str(token)]
    if spec.insecure:
        words.append("--insecure")
    elif spec.root_certificates_path is not None:
        words += ["--root-certificates", spec.root_certificates_path]
    return words if spec.parent_pid is None else [*words, "--parent-pid", str(spec.parent_pid)]


def main() -> None:
    """Run Flower's command with the one way to start a task."""
    tokens = Path(sys.argv.pop(1))

    def launch(self: SubprocessExecutor, spec: ExecutionSpec) -> LaunchResult:
        words = arguments(spec, tokens)
        if words is None:
            log.error("refused: a task of the kind %s; somebody has asked for another app", spec.task_type)
            return LaunchResult.failed("this SuperExec starts the run of fedamole and nothing else")
        subprocess.Popen(words)
        return LaunchResult.accepted()

    SubprocessExecutor.launch = launch  # type: ignore[method-assign]
    sys.argv[0] = "flower-superexec"
    flower_superexec()


if __name__ == "__main__":
    main()
