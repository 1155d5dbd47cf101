"""The `fedamole` command. Heavy packages are imported inside the commands, so that `--help` is fast."""

import typer

from fedamole.cli import personal
from fedamole.cli.audit import audit
from fedamole.cli.certs import certs
from fedamole.cli.choose import choose
from fedamole.cli.client import audit_log, client
from fedamole.cli.clients import app as clients
from fedamole.cli.compare import compare
from fedamole.cli.config_file import config, init
from fedamole.cli.deploy import server, simulate
from fedamole.cli.doctor import doctor
from fedamole.cli.explain import explain
from fedamole.cli.export import export
from fedamole.cli.health import health
from fedamole.cli.merge import merge
from fedamole.cli.options import Commands, run_command_line
from fedamole.cli.plan import partition, plan
from fedamole.cli.report import report
from fedamole.cli.run import demo, methods, resume, run, show
from fedamole.cli.runs import runs
from fedamole.cli.serve import serve
from fedamole.terminal import set_up

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Personalised federated fine-tuning of large language models.\n\n"
    "FedAMoLE gives each client its own mixture of LoRA experts and assigns the experts by the clients' data. It is "
    "compared with other federated methods on the same data.\n\n"
    "[b]First steps:[/b]\n\n"
    "  fedamole demo              compare four methods on bundled data (some minutes, no GPU)\n"
    "  fedamole methods           list the methods\n"
    "  fedamole init DATA         write a config for your data files\n"
    "  fedamole run CONFIG.toml   train one method on your data\n"
    "  fedamole show runs/*       compare finished runs\n"
    "  fedamole COMMAND --help    explain a command\n\n"
    "[b]Exit codes:[/b] 0 success · 1 other error · 2 config or arguments · 3 data · 4 base model or adapter · "
    "5 run folder · 130 interrupted (`fedamole resume` continues the run)",
)

PANELS = {
    "Experiments": (demo, init, run, resume, runs, show, report, compare, choose, plan, partition, methods, config),
    "Personal models": (personal.generate, personal.chat, explain, export, merge, personal.adapt, serve, audit),
    "Deployment": (server, client, certs, doctor, health, audit_log, simulate),
}
"""The commands by their panel in `fedamole --help`."""
for panel, commands in PANELS.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
app.add_typer(clients, name="clients", rich_help_panel="Deployment")


def main() -> None:
    """Run the command line. An error of the user is reported in one line, without a traceback."""
    run_command_line(app, set_up())


if __name__ == "__main__":
    main()
