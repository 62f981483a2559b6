"""The command `modepress`: puts the commands together and turns errors into one line and an exit status."""

import json
import sys
from typing import NoReturn

import typer
from pydantic import ValidationError

from api_schemas.errors import ErrorBody, ErrorResponse, ModepressError
from modepress import output
from modepress.api_error import ModepressApiError
from modepress.commands import (
    audit_command,
    chat_command,
    import_command,
    job_commands,
    key_commands,
    model_commands,
    operate_commands,
    pull_command,
    quota_commands,
    server_commands,
    trace_command,
    worker_command,
)
from modepress.commands.recipe_options import in_words
from modepress.exit_codes import ExitCode, of_error, of_status

EPILOG = (
    "Exit status: 0 done, 1 server failed or unknown, 2 usage, 3 refused by the server, 4 job failed or cancelled, "
    "5 quality gate failed, 6 server unreachable."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,  # it would write into the user's shell configuration
    pretty_exceptions_enable=False,
    epilog=EPILOG,
    help="Shrink language models and serve them. Start with `modepress up`, then push, compress, chat.",
)
for command in (
    server_commands.up,
    server_commands.doctor,
    model_commands.push,
    model_commands.models,
    model_commands.model,
    model_commands.delete,
    pull_command.files,
    pull_command.pull,
    job_commands.plan,
    job_commands.compress,
    job_commands.jobs,
    job_commands.job,
    job_commands.status,
    job_commands.watch,
    job_commands.events,
    job_commands.cancel,
    job_commands.report,
    trace_command.trace,
    worker_command.workers,
    chat_command.chat,
    audit_command.audit,
    operate_commands.gc,
    operate_commands.backup,
    operate_commands.restore,
):
    app.command()(command)
app.command("import")(import_command.import_model)
app.add_typer(key_commands.keys, name="keys")
app.add_typer(quota_commands.quotas, name="quotas")


def main() -> NoReturn:
    """Run the command line and exit with a status of `ExitCode`."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    as_json = "--json" in arguments
    try:
        app(args=arguments)
    except SystemExit as ending:  # typer's own: it has shown a usage error (2) or an interruption (130) itself
        return ending.code if isinstance(ending.code, int) else ExitCode.SERVER_OR_UNKNOWN
    except ModepressApiError as error:
        _say_error(error.body(), as_json)
        return of_error(error)
    except ModepressError as error:
        _say_error(error.body(), as_json)
        return of_status(error.status)
    except ValidationError as error:
        _say_error(ErrorBody(message=in_words(error), type="usage_error", param=None, code="usage"), as_json)
        return ExitCode.USAGE
    return ExitCode.OK


def _say_error(body: ErrorBody, as_json: bool) -> None:
    if as_json:
        sys.stderr.write(json.dumps(ErrorResponse(error=body).model_dump(mode="json")) + "\n")
    else:
        where = f" ({body.param})" if body.param else ""
        output.err.print(f"error: {body.code}{where}: {body.message}", markup=False, soft_wrap=True)
