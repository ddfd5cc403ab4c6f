"""The command line: one small file a command; parses, calls, prints; no logic.

Exit codes: 0 done, 1 failed, 2 bad usage or input. Command modules import torch and the rest inside their function, so
that `dapt-merge --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

# In the order of the data flow, which is the order in which `--help` lists them.
_COMMANDS = (
    "demo",
    "corpus",
    "pretrain",
    "inspect",
    "methods",
    "explain",
    "statistics",
    "merge",
    "extract-lora",
    "eval",
    "search",
    "plot",
    "export",
)


def build_app(names: Sequence[str] = _COMMANDS):  # type: ignore[no-untyped-def]
    """Assemble the Typer application from the modules of these commands."""
    import typer

    app = typer.Typer(
        name="dapt-merge",
        help="Find, prove and write the best merge of a base model and its continued-pre-training checkpoints.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version and leave.")) -> None:
        if version:
            from dapt_merge import __version__

            print(__version__)
            raise typer.Exit

    for name in names:
        function = name.replace("-", "_")
        command = getattr(import_module(f"dapt_merge.cli.{function}"), function)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    return app


def main() -> None:
    """Run the command line and turn errors into three short lines and an exit code."""
    import atexit
    import gc
    import os

    # What is alive at the end dies with the process: to search a million objects of torch for garbage takes longer.
    atexit.register(gc.freeze)
    # Progress and advice of the libraries underneath would tear our own progress bars apart.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    if sys.argv[1:2] == ["merge"] and not any("mergekit" in word for word in sys.argv):
        from dapt_merge import prefetch

        prefetch.start_for_arguments(sys.argv[2:])
    from dapt_merge.errors import DaptMergeError

    try:
        # A command that is named needs no other's module; for anything else all are there, to be listed or suggested.
        _run([name for name in _COMMANDS if name in sys.argv[1:2]] or _COMMANDS)
    except DaptMergeError as error:
        _print_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished work is kept; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) has gone: that is no fault of the run, and Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _run(names: Sequence[str]) -> None:
    try:
        build_app(names)()
    except SystemExit as ending:
        if ending.code or names != ["merge"]:
            raise
        _leave_at_once()


def _leave_at_once() -> None:
    """End the process without taking apart what dies with it, where nothing is still to be done."""
    import atexit
    import os
    import threading

    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        return  # Python waits for them
    sys.stdout.flush()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _print_error(error: Exception) -> None:
    from rich.markup import escape

    from dapt_merge.cli.console import console

    what, *rest = str(error).split("\n")
    console.print(f"[bold red]error:[/] {escape(what)}", soft_wrap=True, highlight=False)
    for line in rest:
        console.print(escape(line), soft_wrap=True, highlight=False)
