"""The console command `stillroom`: joins the stages and gives every failure one voice.

One idea: a stage raises; this file turns it into one message on stderr and an exit code (0 done,
2 something for the user to put right, 3 incomplete and safe to run again). Programming errors keep
their traceback. Stages import what is heavy inside their commands, after the run file and what it
names have been looked at: `--help` and a mistake that needs no model are answered at once.
"""

import errno
import logging
import os
import re
import shlex
import signal
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from stillroom.cache_schemas.errors import (
    EXIT_INCOMPLETE,
    EXIT_USER_ERROR,
    CacheIncomplete,
    StillroomError,
)
from stillroom.cache_schemas.scrubbing import scrub
from stillroom.pipeline.parent_process import end_with_parent
from stillroom.stages import ask, capture, evaluate, generate, prepare, recommend, teacher, train
from stillroom.stages.cache import group as cache
from stillroom.stages.console import QUIET, show_traceback, warn
from stillroom.stages.corpus import group as corpus
from stillroom.stages.demos import recsys as demo_recsys
from stillroom.stages.demos import text as demo
from stillroom.stages.demos import vision as demo_vision
from stillroom.stages.doctor import doctor
from stillroom.stages.init import init
from stillroom.stages.run_file import config, schema
from stillroom.stages.whole_run import whole_run

app = typer.Typer(
    name="stillroom",
    help="Run a teacher once, keep what it said in a checked cache, train students from it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # `[tables]` in a help text are no markup
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(init)
app.command()(prepare.prepare)
app.add_typer(corpus, name="corpus")
app.command()(generate.generate)
app.command()(capture.capture)
app.add_typer(cache.app, name="cache")
app.command()(train.student)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(ask.ask)
app.command()(recommend.recommend)
app.command()(demo.demo)
app.command()(demo_vision.demo_vision)
app.command()(demo_recsys.demo_recsys)
app.add_typer(teacher.app, name="teacher")
app.command("run")(whole_run)
app.command()(doctor)
app.command()(config)
app.command()(schema)

SURROUNDINGS = {
    errno.ENOSPC: "Free some space and run the same command again; finished work is kept.",
    errno.EDQUOT: "Free some quota and run the same command again; finished work is kept.",
    errno.EROFS: "Choose a [run] directory that can be written.",
    errno.EACCES: "Check the permissions of this path.",
    errno.EPERM: "Check the permissions of this path.",
    errno.ENOTDIR: "A part of this path is a file; choose another.",
    errno.EISDIR: "This is a directory; name a file.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENAMETOOLONG: "Choose a shorter path.",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f), or choose another file system.",
    errno.EIO: "The disk does not answer; choose another one.",
}
"""Failures of the machine rather than of the program, and what to do about each."""

BY_RUST = re.compile(r"\(os error (\d+)\)")
"""How safetensors and tokenizers say an error's number."""

AT_ONCE = frozenset(
    {"init", "prepare", "corpus", "evaluate", "ask", "recommend", "doctor", "config"}
)
LOOK_AT_CACHES = frozenset({"show", "ls", "verify", "sign", "diff", "audit", "plan"})
"""Commands, and those of `cache`, whose result is there when all of it is done: an interrupted one
keeps nothing."""
EVERYWHERE = ("--debug", "--quiet")
"""Options that are understood anywhere on the line."""
INTERRUPTED = 130
"""What typer returns for a KeyboardInterrupt inside a command."""


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of every error.")] = False,
    quiet: Annotated[bool, typer.Option(help="Only results, warnings and errors.")] = False,
) -> None:
    """Options of every command; both are also understood after the command's name."""


def main() -> NoReturn:
    """Run one command and exit with its code."""
    end_with_parent()
    arguments = [argument for argument in sys.argv[1:] if argument not in EVERYWHERE]
    debug = "--debug" in sys.argv
    if "--quiet" in sys.argv:
        os.environ[QUIET] = "1"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: finished work is kept
    sys.excepthook = lambda _, error, __: show_traceback(error)  # without credentials
    if not debug:
        hush_libraries()
    code = run(arguments, debug)
    # All is said. What is left is Python's own end, in which a second one would raise tracebacks.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends a shutdown that hangs
    sys.stdout.flush()
    if arguments[:1] == ["train"] and os.environ.get("WORLD_SIZE", "1") != "1":
        leave_group(code)
    sys.exit(code)


def leave_group(code: int) -> NoReturn:
    """End a rank of several with `code`, without Python's shutdown.

    Gloo's threads outlive destroy_process_group, and one that lets go of a tensor during the
    shutdown aborts a run that was done (pytorch#190489).
    """
    sys.stderr.flush()
    os._exit(code)


def hush_libraries() -> None:
    """One progress style and one voice: ours. Libraries read these when they are first imported,
    in this process and in those of an engine."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_COLOR", "0")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(logging.ERROR)  # until vLLM sets up its own
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning,ignore::DeprecationWarning")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|vllm|zarr)\b")


def run(arguments: list[str], debug: bool = False) -> int:
    """Run one command line and return its exit code; every expected failure becomes one message."""
    try:
        code = app(arguments, standalone_mode=False, prog_name="stillroom")
        return _interrupted(arguments) if code == INTERRUPTED else code or 0
    except KeyboardInterrupt:
        return _interrupted(arguments)
    except StillroomError as error:
        return _fail(str(error), error.exit_code, debug, _again(error, arguments))
    except typer.TyperException as error:
        return _fail(error.format_message(), EXIT_USER_ERROR, debug, _usage(arguments))
    except BrokenPipeError:
        return _reader_gone()
    except Exception as error:
        found = surroundings(error)
        if not found:
            raise
        return _fail(found, EXIT_USER_ERROR, debug)


def surroundings(error: BaseException) -> str:
    """What to tell when the machine, not the program, is at fault; empty otherwise."""
    number = getattr(error, "errno", None)
    if number is None and "No space left on device" in str(error):  # some say it in words alone
        number = errno.ENOSPC
    if number is None and (said := BY_RUST.search(str(error))):
        number = int(said[1])
    if number not in SURROUNDINGS:
        return surroundings(error.__cause__) if error.__cause__ else ""
    where = getattr(error, "filename", None)
    text = os.strerror(number)
    return (
        f"{where}: {text}. {SURROUNDINGS[number]}" if where else f"{text}. {SURROUNDINGS[number]}"
    )


def _fail(message: str, code: int, debug: bool, advice: str = "") -> int:
    if debug and (error := sys.exception()):
        show_traceback(error)
    warn(f"error: {message}" + (f"\n{advice}" if advice else ""))
    return code


def _again(error: StillroomError, arguments: list[str]) -> str:
    """A message about unfinished work ends with the command that goes on with it."""
    resumable = isinstance(error, CacheIncomplete) and not error.remedy
    return f"Run again to go on: {_line(arguments)}" if resumable else ""


def _interrupted(arguments: list[str]) -> int:
    if keeps_nothing(arguments):
        warn(f"interrupted; nothing was changed. Run again: {_line(arguments)}")
    else:
        warn(f"interrupted; finished work is kept. Run again to go on: {_line(arguments)}")
    return EXIT_INCOMPLETE


def keeps_nothing(arguments: list[str]) -> bool:
    """Whether a command that is interrupted begins anew."""
    command, *more = arguments or [""]
    looks = command == "cache" and not LOOK_AT_CACHES.isdisjoint(more[:1])
    return command in AT_ONCE or looks


def _reader_gone() -> int:
    """Whoever read stdout has left (`| head`); a second failure at interpreter exit is silenced."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _usage(arguments: list[str]) -> str:
    """How to see the options of the command that was meant, as far as there is such a one."""
    known, command = [], typer.main.get_command(app)
    for argument in arguments:
        command = getattr(command, "commands", {}).get(argument)
        if command is None:
            break
        known.append(argument)
    return f"Try: {_line([*known, '--help'])}"


def _line(arguments: list[str]) -> str:
    """A command to copy; what stands for a credential is to be typed again."""
    return shlex.join(["stillroom", *(scrub(argument) for argument in arguments)])


if __name__ == "__main__":
    main()
